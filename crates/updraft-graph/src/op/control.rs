//! Control flow: operators whose attributes are graphs.
//!
//! A subgraph sees the values of the graphs around it by name. Only tensors flow here: sequences and optional values are
//! refused by the operators that would make them.

use crate::dim::Dim;
use crate::graph::Graph;
use crate::op::join::join;
use crate::op::{Arity, Eval, Fact, Infer, Op, OpError, OpView, resolve_axis};
use crate::tensor::Tensor;

type Evaluated = Result<Vec<Tensor>, OpError>;

const BRANCHES: &str = "not implemented: gradients through subgraphs";
const INSIDE: &str = "the relations are inside the subgraph";
const VERSIONS: &[u32] = &[1, 11, 13, 16, 19, 21, 23, 24, 25];

/// Iterations after which a loop without a trip count is taken to run forever.
const ITERATIONS_MAX: i64 = 1 << 24;

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("If", VERSIONS, Arity::exact(1).outputs(1, usize::MAX), infer_if, eval_if)
        .no_gradient(BRANCHES)
        .no_channels(INSIDE),
    Op::onnx("Loop", VERSIONS, Arity::range(2, usize::MAX).open(2).outputs(1, usize::MAX), infer_loop, eval_loop)
        .no_gradient(BRANCHES)
        .no_channels(INSIDE),
    Op::onnx(
        "Scan",
        &[8, 9, 11, 16, 19, 21, 23, 24, 25],
        Arity::range(1, usize::MAX).outputs(1, usize::MAX),
        infer_scan,
        eval_scan,
    )
    .no_gradient(BRANCHES)
    .no_channels(INSIDE),
];

/// What is known of a subgraph's outputs.
fn outputs_of(graph: &Graph) -> Vec<Fact> {
    let fact = |v: &crate::ValueId| Fact {
        dtype: graph.dtype(*v),
        shape: graph.shape(*v).map(<[Dim]>::to_vec),
        content: None,
    };
    graph.outputs().iter().map(fact).collect()
}

/// A size that both may have: the same one, or unknown.
fn either(a: Fact, b: Fact) -> Fact {
    let shape = match (a.shape, b.shape) {
        (Some(a), Some(b)) if a.len() == b.len() => {
            Some(a.into_iter().zip(b).map(|(a, b)| if a.same(&b) { a } else { Dim::Unknown }).collect())
        }
        _ => None,
    };
    Fact { dtype: a.dtype.or(b.dtype), shape, content: None }
}

fn infer_if(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let (then, other) = (cx.attributes().graph("then_branch")?, cx.attributes().graph("else_branch")?);
    Ok(outputs_of(then).into_iter().zip(outputs_of(other)).map(|(a, b)| either(a, b)).collect())
}

fn eval_if(cx: &Eval) -> Evaluated {
    let condition = cx.input(0)?.to_bools()?;
    let [condition] = condition[..] else {
        return Err(OpError::shape(format!("the condition must be one element, found {}", condition.len())));
    };
    cx.scope.run(cx.attributes().graph(if condition { "then_branch" } else { "else_branch" })?, &[])
}

/// Dimensions inside a body that name no size of the graph around it are unknown outside; ranks are kept.
fn seen_from_outside(fact: Fact, stacked: bool) -> Fact {
    let shape = fact.shape.map(|shape| {
        let inside = shape.into_iter().map(|dim| dim.known().map_or(Dim::Unknown, Dim::Known));
        (stacked.then_some(Dim::Unknown)).into_iter().chain(inside).collect()
    });
    Fact { shape, ..fact }
}

fn infer_loop(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let carried = cx.inputs.len() - 2;
    let body = outputs_of(cx.attributes().graph("body")?).into_iter().skip(1).enumerate();
    // A carried value may change its shape from one iteration to the next.
    let fact = |(i, fact): (usize, Fact)| match i < carried {
        true => Fact { shape: None, ..fact },
        false => seen_from_outside(fact, true),
    };
    Ok(body.map(fact).collect())
}

/// Inputs: trip count, condition, carried values. Outputs: carried values, then what each iteration yields, stacked.
fn eval_loop(cx: &Eval) -> Evaluated {
    let body = cx.attributes().graph("body")?;
    let count = match cx.optional(0) {
        Some(t) => t.to_i64()?.first().copied().ok_or_else(|| OpError::shape("the trip count must be a scalar"))?,
        None => i64::MAX,
    };
    let is_on = |t: &Tensor| Ok::<_, OpError>(t.to_bools()?.first().copied().unwrap_or(false));
    let mut on = cx.optional(1).map_or(Ok(true), is_on)?;
    let mut carried: Vec<Tensor> = (2..cx.inputs.len()).map(|i| cx.input(i).cloned()).collect::<Result<_, _>>()?;
    let yields = body.outputs().len().checked_sub(1 + carried.len());
    let yields = yields.ok_or_else(|| OpError::value("the body has fewer outputs than carried values"))?;
    let mut stacks: Vec<Vec<Tensor>> = vec![Vec::new(); yields];
    let mut iteration = 0;
    while on && iteration < count {
        if iteration >= ITERATIONS_MAX {
            return Err(OpError::value(format!("the loop did not end after {ITERATIONS_MAX} iterations")));
        }
        let mut inputs = vec![Tensor::scalar(iteration), Tensor::from_bools(&[], &[true])?];
        inputs.append(&mut carried);
        let mut outputs = cx.scope.run(body, &inputs)?.into_iter();
        on = outputs.next().map_or(Ok(false), |t| is_on(&t))?;
        carried = outputs.by_ref().take(inputs.len() - 2).collect();
        for (stack, made) in stacks.iter_mut().zip(outputs) {
            stack.push(made);
        }
        iteration += 1;
    }
    let facts = outputs_of(body).into_iter().skip(1 + carried.len());
    for (stack, fact) in stacks.iter().zip(facts) {
        carried.push(stack_up(stack, 0, &fact)?);
    }
    Ok(carried)
}

/// Tensors of one shape along a new axis. Of none at all, the body's declared type and shape make an empty stack.
fn stack_up(parts: &[Tensor], axis: i64, declared: &Fact) -> Result<Tensor, OpError> {
    let Some(first) = parts.first() else {
        let shape = declared.shape.as_deref().and_then(crate::dim::known_shape);
        let (Some(dtype), Some(shape)) = (declared.dtype, shape) else {
            return Err(OpError::value("the type of what a loop yields in no iteration is not known"));
        };
        return Ok(Tensor::zeros(dtype, &[vec![0], shape].concat())?);
    };
    let at = resolve_axis(axis, first.rank() + 1)?;
    let mut parts_with_axis = Vec::with_capacity(parts.len());
    for part in parts {
        let mut shape = part.shape().to_vec();
        shape.insert(at.min(shape.len()), 1);
        parts_with_axis.push(part.reshaped(&shape)?);
    }
    join(&parts_with_axis.iter().collect::<Vec<_>>(), |rank| resolve_axis(at as i64, rank))
}

/// Axes and directions of the operands that Scan runs over.
struct ScanPlan<'a> {
    body: &'a Graph,
    states: usize,
    scans: usize,
}

fn scan_plan<'a>(cx: &OpView<'a>, inputs: usize) -> Result<ScanPlan<'a>, OpError> {
    if cx.opset < 9 {
        return Err(OpError::unsupported("Scan of version 8, which runs over a batch axis"));
    }
    let scans = cx.attributes().int("num_scan_inputs", 0)?;
    let scans = usize::try_from(scans).ok().filter(|n| (1..=inputs).contains(n));
    let scans = scans.ok_or_else(|| OpError::attribute("num_scan_inputs", format!("must be 1 to {inputs}")))?;
    Ok(ScanPlan { body: cx.attributes().graph("body")?, states: inputs - scans, scans })
}

fn infer_scan(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    if cx.opset < 9 {
        return Ok(vec![Fact::default(); cx.output_count()]);
    }
    let plan = scan_plan(cx, cx.inputs.len())?;
    let fact = |(i, fact): (usize, Fact)| match i < plan.states {
        true => match cx.optional(i) {
            Some(state) => Fact { dtype: fact.dtype.or(state.dtype), shape: state.shape.clone(), content: None },
            None => seen_from_outside(fact, false),
        },
        // The axis of iterations may be any.
        false => Fact { shape: fact.shape.map(|s| vec![Dim::Unknown; s.len() + 1]), ..fact },
    };
    Ok(outputs_of(plan.body).into_iter().enumerate().map(fact).collect())
}

/// One entry of an attribute that lists one integer for each operand; zero without it.
fn listed(cx: &OpView, name: &str, index: usize) -> Result<i64, OpError> {
    match cx.attributes().ints(name)? {
        Some(list) => list.get(index).copied().ok_or_else(|| OpError::attribute(name, "is too short")),
        None => Ok(0),
    }
}

/// Inputs: states, then tensors to run over. Outputs: states, then what each iteration yields, stacked.
fn eval_scan(cx: &Eval) -> Evaluated {
    let plan = scan_plan(cx, cx.inputs.len())?;
    let mut states: Vec<Tensor> = (0..plan.states).map(|i| cx.input(i).cloned()).collect::<Result<_, _>>()?;
    let mut runs = Vec::new();
    for scan in 0..plan.scans {
        let t = cx.input(plan.states + scan)?;
        let axis = resolve_axis(listed(cx, "scan_input_axes", scan)?, t.rank())?;
        runs.push((t, axis, listed(cx, "scan_input_directions", scan)? != 0));
    }
    let len = runs[0].0.shape()[runs[0].1];
    if let Some((t, axis, _)) = runs.iter().find(|(t, axis, _)| t.shape()[*axis] != len) {
        return Err(OpError::shape(format!("axis {axis} of {:?} is not of length {len}", t.shape())));
    }
    let yields = plan.body.outputs().len().checked_sub(plan.states);
    let yields = yields.ok_or_else(|| OpError::value("the body has fewer outputs than states"))?;
    let mut stacks: Vec<Vec<Tensor>> = vec![Vec::new(); yields];
    for step in 0..len {
        let mut inputs = std::mem::take(&mut states);
        for (t, axis, backwards) in &runs {
            let at = if *backwards { len - 1 - step } else { step };
            let choices: Vec<_> = (t.shape().iter().enumerate())
                .map(|(a, n)| if a == *axis { vec![Some(at)] } else { crate::op::rearrange::whole(*n) })
                .collect();
            let mut shape = t.shape().to_vec();
            shape.remove(*axis);
            inputs.push(crate::op::rearrange::by_axis(t, &choices, None)?.reshaped(&shape)?);
        }
        let mut outputs = cx.scope.run(plan.body, &inputs)?.into_iter();
        states = outputs.by_ref().take(plan.states).collect();
        for (stack, made) in stacks.iter_mut().zip(outputs) {
            stack.push(made);
        }
    }
    let facts = outputs_of(plan.body).into_iter().skip(plan.states);
    for (i, (mut stack, fact)) in stacks.into_iter().zip(facts).enumerate() {
        if listed(cx, "scan_output_directions", i)? != 0 {
            stack.reverse();
        }
        states.push(stack_up(&stack, listed(cx, "scan_output_axes", i)?, &fact)?);
    }
    Ok(states)
}
