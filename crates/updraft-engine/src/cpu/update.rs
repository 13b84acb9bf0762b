//! Updates of parameters in place: one pass over parameter, gradient and moments.

use updraft_graph::{DType, OpError};

use crate::cpu::build::{Build, Built};
use crate::cpu::isa::{dispatch, multiply_add};
use crate::cpu::kernel::{Io, Kernel, Pool, Shared};
use crate::cpu::rows::{part, sum_of_squares};

/// Elements in one task.
const TASK_ELEMENTS: usize = 1 << 13;

/// An optimizer's rule with the numbers of one step.
#[derive(Debug, Clone, Copy)]
enum Rule {
    Sgd { rate: f32, scale: f32, momentum: f32, weight_decay: f32, nesterov: bool },
    Adam { step: f32, scale: f32, decay: f32, weight_decay: f32, beta1: f32, beta2: f32, epsilon: f32, root: f32 },
}

struct Update {
    is_adam: bool,
    /// Inputs that are replaced: the parameter and its moments.
    moments: usize,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    momentum: f32,
    weight_decay: f64,
    decoupled: bool,
    nesterov: bool,
}

/// Builds SgdUpdate and AdamUpdate.
pub(crate) fn update(cx: &mut Build) -> Result<Option<Built>, OpError> {
    let is_adam = cx.view.node.op == "AdamUpdate";
    let operands = if is_adam { 4 } else { 3 };
    let floats = (0..operands).all(|i| cx.dtype(i).is_none_or(|d| d == DType::F32));
    if !floats || cx.outputs.iter().any(Option::is_none) {
        return Ok(None);
    }
    let moments = if is_adam { 2 } else { usize::from(cx.input(2).is_some()) };
    if cx.outputs.len() != 1 + moments || (is_adam && cx.dtype(5) != Some(DType::I64)) {
        return Ok(None);
    }
    let attributes = cx.attributes();
    let number = |name, default| attributes.float(name, default).map(f64::from);
    let kernel = Update {
        is_adam,
        moments,
        beta1: number("beta1", 0.9)?,
        beta2: number("beta2", 0.999)?,
        epsilon: number("epsilon", 1e-8)?,
        momentum: attributes.float("momentum", 0.0)?,
        weight_decay: number("weight_decay", 0.0)?,
        decoupled: attributes.flag("decoupled", false)?,
        nesterov: attributes.flag("nesterov", false)?,
    };
    let built = Built::whole(kernel).in_place(0, 0);
    Ok(Some((0..moments).fold(built, |built, i| built.in_place(1 + i, 2 + i))))
}

impl Update {
    fn rule(&self, io: &Io) -> Rule {
        let scalar = |index: usize, default: f32| io.input::<f32>(index).first().copied().unwrap_or(default);
        if !self.is_adam {
            return Rule::Sgd {
                rate: scalar(3, 0.0),
                scale: scalar(4, 1.0),
                momentum: self.momentum,
                weight_decay: self.weight_decay as f32,
                nesterov: self.nesterov,
            };
        }
        let rate = f64::from(scalar(4, 0.0));
        let count = io.input::<i64>(5).first().copied().unwrap_or(0) as f64 + 1.0;
        let (correction1, correction2) = (1.0 - self.beta1.powf(count), 1.0 - self.beta2.powf(count));
        let (decay, weight_decay) =
            if self.decoupled { (1.0 - rate * self.weight_decay, 0.0) } else { (1.0, self.weight_decay) };
        Rule::Adam {
            step: (rate / correction1) as f32,
            scale: scalar(6, 1.0),
            decay: decay as f32,
            weight_decay: weight_decay as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            epsilon: self.epsilon as f32,
            root: (1.0 / correction2.sqrt()) as f32,
        }
    }
}

impl Kernel for Update {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let rule = self.rule(io);
        let gradient = io.input::<f32>(1);
        let mut kept: Vec<&mut [f32]> = Vec::new();
        for output in 0..1 + self.moments {
            let input = if output == 0 { 0 } else { 1 + output };
            let out = io.output::<f32>(output);
            if io.has(input) {
                out.copy_from_slice(io.input::<f32>(input));
            }
            kept.push(out);
        }
        let kept: Vec<Shared<f32>> = kept.into_iter().map(Shared::new).collect();
        pool.for_each(gradient.len().div_ceil(TASK_ELEMENTS), |task| {
            let range = part(gradient.len(), TASK_ELEMENTS, task);
            let slice = |index: usize| match kept.get(index) {
                // SAFETY: tasks have disjoint ranges.
                Some(shared) => unsafe { shared.range(range.clone()) },
                None => &mut [],
            };
            let (p, m, v) = (slice(0), slice(1), slice(2));
            apply(rule, &gradient[range.clone()], p, m, v);
        });
        Ok(())
    }
}

dispatch! {
    fn apply(rule: Rule, g: &[f32], p: &mut [f32], m: &mut [f32], v: &mut [f32]) = apply_body
}

#[inline(always)]
fn apply_body<const FMA: bool>(rule: Rule, g: &[f32], p: &mut [f32], m: &mut [f32], v: &mut [f32]) {
    match rule {
        Rule::Sgd { rate, scale, momentum, weight_decay, nesterov } => {
            if m.is_empty() {
                for (p, g) in p.iter_mut().zip(g) {
                    let d = multiply_add::<FMA>(weight_decay, *p, scale * g);
                    *p -= rate * d;
                }
                return;
            }
            for ((p, g), m) in p.iter_mut().zip(g).zip(m) {
                let d = multiply_add::<FMA>(weight_decay, *p, scale * g);
                *m = multiply_add::<FMA>(momentum, *m, d);
                let step = if nesterov { multiply_add::<FMA>(momentum, *m, d) } else { *m };
                *p -= rate * step;
            }
        }
        Rule::Adam { step, scale, decay, weight_decay, beta1, beta2, epsilon, root } => {
            for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                let d = multiply_add::<FMA>(weight_decay, *p, scale * g);
                *m = multiply_add::<FMA>(beta1, *m, (1.0 - beta1) * d);
                *v = multiply_add::<FMA>(beta2, *v, (1.0 - beta2) * d * d);
                *p = *p * decay - step * *m / (v.sqrt() * root + epsilon);
            }
        }
    }
}

struct GlobalNorm;

/// Builds GlobalNorm.
pub(crate) fn global_norm(cx: &mut Build) -> Result<Option<Built>, OpError> {
    Ok(cx.all_are(DType::F32).then(|| Built::whole(GlobalNorm)))
}

impl Kernel for GlobalNorm {
    fn run(&self, io: &mut Io<'_>, pool: &Pool) -> Result<(), OpError> {
        let parts: Vec<&[f32]> = (0..io.inputs.len()).flat_map(|i| io.input::<f32>(i).chunks(TASK_ELEMENTS)).collect();
        let mut sums = vec![0f64; parts.len()];
        pool.for_each_chunk(&mut sums, 1, |i, sum| sum[0] = sum_of_squares(parts[i]));
        if let Some(out) = io.output::<f32>(0).first_mut() {
            *out = sums.iter().sum::<f64>().sqrt() as f32;
        }
        Ok(())
    }
}
