//! Pools: one number from each window of each channel (MaxPool, AveragePool, LpPool), or from a whole channel
//! (the Global forms), MaxPool's inverse, and the gradients.

use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{UPDRAFT_DOMAIN, ValueId};
use crate::op::conv::{expect_shape, shape_operand};
use crate::op::window::{Window, WindowSpec, spatial};
use crate::op::{
    AFTER_STRUCTURE, Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, Rule, SECOND_ORDER, Shapes, filled,
    no_flops,
};
use crate::tensor::Tensor;

/// The family.
pub(super) const OPS: &[Op] = &[
    Op {
        name: "MaxPool",
        domain: "",
        versions: &[1, 8, 10, 11, 12, 22],
        arity: Arity::exact(1).outputs(1, 2),
        infer: infer_pool,
        eval: Rule::Is(eval_max_pool),
        gradient: Rule::Is(max_pool_gradient),
        flops: pool_flops,
        channels: Rule::Is(pool_channels),
    },
    Op {
        name: "AveragePool",
        domain: "",
        versions: &[1, 7, 10, 11, 19, 22],
        arity: Arity::exact(1),
        infer: infer_pool,
        eval: Rule::Is(eval_average_pool),
        gradient: Rule::Is(average_pool_gradient),
        flops: pool_flops,
        channels: Rule::Is(pool_channels),
    },
    Op {
        name: "LpPool",
        domain: "",
        versions: &[2, 11, 18, 22],
        arity: Arity::exact(1),
        infer: infer_pool,
        eval: Rule::Is(eval_lp_pool),
        gradient: Rule::None("networks that are trained pool by maximum or average"),
        flops: pool_flops,
        channels: Rule::Is(pool_channels),
    },
    global("GlobalMaxPool", &[1, 22], eval_global_max, Rule::Is(global_max_gradient)),
    global("GlobalAveragePool", &[1, 22], eval_global_average, Rule::Is(global_average_gradient)),
    global(
        "GlobalLpPool",
        &[2, 22],
        eval_global_lp,
        Rule::None("networks that are trained pool by maximum or average"),
    ),
    Op {
        name: "MaxUnpool",
        domain: "",
        versions: &[9, 11, 22],
        arity: Arity::range(2, 3),
        infer: infer_max_unpool,
        eval: Rule::Is(eval_max_unpool),
        gradient: Rule::None("networks that are trained grow by Resize or ConvTranspose"),
        flops: no_flops,
        channels: Rule::Is(pool_channels),
    },
    Op {
        name: "MaxPoolGradient",
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        arity: Arity::exact(2),
        infer: infer_like_first,
        eval: Rule::Is(eval_max_pool_gradient),
        gradient: Rule::None(SECOND_ORDER),
        flops: max_pool_gradient_flops,
        channels: Rule::None(AFTER_STRUCTURE),
    },
    Op {
        name: "AveragePoolGradient",
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        arity: Arity::exact(2),
        infer: infer_average_pool_gradient,
        eval: Rule::Is(eval_average_pool_gradient),
        gradient: Rule::None(SECOND_ORDER),
        flops: average_pool_gradient_flops,
        channels: Rule::None(AFTER_STRUCTURE),
    },
];

const fn global(
    name: &'static str,
    versions: &'static [u32],
    eval: fn(&Eval) -> Result<Vec<Tensor>, OpError>,
    gradient: Rule<crate::op::GradientRule>,
) -> Op {
    Op {
        name,
        domain: "",
        versions,
        arity: Arity::exact(1),
        infer: infer_global,
        eval: Rule::Is(eval),
        gradient,
        flops: global_flops,
        channels: Rule::Is(pool_channels),
    }
}

fn infer_pool(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "input")?;
    let spec = WindowSpec::of_pool(cx.attributes())?;
    let shape = match &x.shape {
        Some(x) => Some([&x[..x.len().min(2)], &spec.output_dims(spatial(x, "the input")?)?].concat()),
        None => None,
    };
    let pooled = Fact { dtype: x.dtype, shape, content: None };
    let indices = Fact { dtype: Some(DType::I64), ..pooled.clone() };
    Ok(vec![pooled, indices])
}

fn infer_global(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "input")?;
    let shape = match &x.shape {
        Some(x) => Some([&x[..x.len().min(2)], &vec![Dim::Known(1); spatial(x, "the input")?.len()]].concat()),
        None => None,
    };
    Ok(vec![Fact { dtype: x.dtype, shape, content: None }])
}

fn infer_like_first(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let fact = cx.input(0, "input")?.fact.clone();
    Ok(vec![Fact { content: None, ..fact }])
}

fn infer_average_pool_gradient(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let shape = cx.input(1, "shape of the input")?.content();
    Ok(vec![Fact { dtype: cx.dtype(0), shape, content: None }])
}

fn infer_max_unpool(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "input")?;
    let spec = WindowSpec::of_pool(cx.attributes())?;
    let shape = match (cx.optional(2), &x.shape) {
        (Some(stated), _) => stated.content(),
        (None, Some(x)) => {
            let grown = spec.transposed_dims(cx.attributes(), spatial(x, "the input")?)?;
            Some([&x[..x.len().min(2)], &grown].concat())
        }
        (None, None) => None,
    };
    Ok(vec![Fact { dtype: x.dtype, shape, content: None }])
}

/// The pool of a node over an input `[N, C, ...]`: how many channels of all examples, the windows over each, and the
/// output's shape.
struct Pool {
    planes: usize,
    window: Window,
    output: Vec<usize>,
}

impl Pool {
    fn new(cx: &Eval, x: &[usize]) -> Result<Pool, OpError> {
        let sizes = spatial(x, "the input")?;
        Ok(Pool::over(x, WindowSpec::of_pool(cx.attributes())?.resolve(sizes)?))
    }

    /// One window over all of each channel.
    fn global(x: &[usize]) -> Result<Pool, OpError> {
        let kernel = spatial(x, "the input")?.to_vec();
        let spec = WindowSpec::new(&crate::attribute::Attributes::new(), kernel.clone())?;
        Ok(Pool::over(x, spec.resolve(&kernel)?))
    }

    fn over(x: &[usize], window: Window) -> Pool {
        let output = [&x[..2], &window.output].concat();
        Pool { planes: x[0] * x[1], window, output }
    }

    /// Calls `f` with the linear positions (input, output) of each element of each window, in row-major order within
    /// a window.
    fn visit(&self, mut f: impl FnMut(usize, usize)) {
        let (inputs, outputs) = (self.window.input_len(), self.window.output_len());
        self.window.visit(|output, _, input| {
            for plane in 0..self.planes {
                f(plane * inputs + input, plane * outputs + output);
            }
        });
    }

    /// The position of the first maximum of each window. Not-a-number counts as larger than any number.
    fn maxima(&self, x: &[f64]) -> Result<Vec<usize>, OpError> {
        let mut best = filled(&self.output, usize::MAX)?;
        self.visit(|i, o| {
            let larger = |than: f64| x[i] > than || (x[i].is_nan() && !than.is_nan());
            if x.get(best[o]).is_none_or(|than| larger(*than)) {
                best[o] = i;
            }
        });
        if best.contains(&usize::MAX) {
            return Err(OpError::shape("a window holds only padding, which has no maximum"));
        }
        Ok(best)
    }

    /// [`Window::averaged_counts`] of one channel.
    fn counts(&self, include_padding: bool) -> Result<Vec<f64>, OpError> {
        let counts = self.window.averaged_counts(include_padding);
        if counts.contains(&0.0) {
            return Err(OpError::shape("a window holds only padding, which has no average"));
        }
        Ok(counts)
    }

    fn sum(&self, x: &[f64], term: impl Fn(f64) -> f64) -> Result<Vec<f64>, OpError> {
        let mut sums = filled(&self.output, 0.0)?;
        self.visit(|i, o| sums[o] += term(x[i]));
        Ok(sums)
    }

    fn average(&self, x: &[f64], include_padding: bool) -> Result<Vec<f64>, OpError> {
        let (counts, mut sums) = (self.counts(include_padding)?, self.sum(x, |x| x)?);
        for (o, sum) in sums.iter_mut().enumerate() {
            *sum /= counts[o % counts.len()];
        }
        Ok(sums)
    }

    /// `(sum |x|^p)^(1/p)`.
    fn norm(&self, cx: &Eval, x: &[f64]) -> Result<Vec<f64>, OpError> {
        let p = cx.attributes().int("p", 2)?;
        if p < 1 {
            return Err(OpError::attribute("p", format!("is {p}, expected a positive number")));
        }
        let p = p as f64;
        let sums = self.sum(x, |x| x.abs().powf(p))?;
        Ok(sums.into_iter().map(|sum| sum.powf(1.0 / p)).collect())
    }
}

fn eval_max_pool(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let pool = Pool::new(cx, x.shape())?;
    let values = x.to_f64()?;
    let best = pool.maxima(&values)?;
    let maxima: Vec<f64> = best.iter().map(|i| values[*i]).collect();
    let column_major = cx.attributes().flag("storage_order", false)?;
    let indices: Vec<i64> =
        best.iter().map(|i| if column_major { transposed(*i, &pool.window.input) } else { *i } as i64).collect();
    Ok(vec![Tensor::from_f64(x.dtype(), &pool.output, &maxima)?, Tensor::new(&pool.output, &indices)?])
}

/// The position of an element if the spatial axes of each channel were stored in column-major order.
fn transposed(position: usize, sizes: &[usize]) -> usize {
    let plane: usize = sizes.iter().product();
    let (mut rest, mut within) = (position % plane, 0);
    let mut stride = plane;
    for size in sizes.iter().rev() {
        stride /= size;
        within += rest % size * stride;
        rest /= size;
    }
    position - position % plane + within
}

fn eval_average_pool(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let pool = Pool::new(cx, x.shape())?;
    let averages = pool.average(&x.to_f64()?, cx.attributes().flag("count_include_pad", false)?)?;
    Ok(vec![Tensor::from_f64(x.dtype(), &pool.output, &averages)?])
}

fn eval_lp_pool(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let pool = Pool::new(cx, x.shape())?;
    Ok(vec![Tensor::from_f64(x.dtype(), &pool.output, &pool.norm(cx, &x.to_f64()?)?)?])
}

fn eval_global_max(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let (pool, values) = (Pool::global(x.shape())?, x.to_f64()?);
    let maxima: Vec<f64> = pool.maxima(&values)?.into_iter().map(|i| values[i]).collect();
    Ok(vec![Tensor::from_f64(x.dtype(), &pool.output, &maxima)?])
}

fn eval_global_average(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let pool = Pool::global(x.shape())?;
    Ok(vec![Tensor::from_f64(x.dtype(), &pool.output, &pool.average(&x.to_f64()?, false)?)?])
}

fn eval_global_lp(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let x = cx.input(0)?;
    let pool = Pool::global(x.shape())?;
    Ok(vec![Tensor::from_f64(x.dtype(), &pool.output, &pool.norm(cx, &x.to_f64()?)?)?])
}

/// Puts each element back where its index says. Indices count in the shape that the pool's attributes imply; a larger
/// `output_shape` adds zeros at the end of each axis.
fn eval_max_unpool(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (x, indices) = (cx.input(0)?, cx.input(1)?);
    expect_shape(indices, x.shape(), "the indices")?;
    let spec = WindowSpec::of_pool(cx.attributes())?;
    let window = spec.resolve_transposed(cx.attributes(), spatial(x.shape(), "the input")?)?;
    let implied = [&x.shape()[..2], &window.input].concat();
    let shape = cx.optional(2).map(shape_operand).transpose()?.unwrap_or_else(|| implied.clone());
    if shape.len() != implied.len() {
        return Err(OpError::shape(format!("output_shape {shape:?} for an input of shape {:?}", x.shape())));
    }
    let mut out = filled(&shape, 0.0)?;
    for (value, index) in x.to_f64()?.into_iter().zip(indices.to_i64()?) {
        let mut rest = usize::try_from(index).unwrap_or(usize::MAX);
        let (mut position, mut stride) = (0, 1);
        let mut inside = true;
        for (size, implied) in shape.iter().zip(&implied).rev() {
            if *implied == 0 {
                break;
            }
            let at = rest % implied;
            inside &= at < *size;
            position += at * stride;
            stride *= size;
            rest /= implied;
        }
        match out.get_mut(position) {
            Some(slot) if inside && rest == 0 => *slot = value,
            _ => return Err(OpError::value(format!("index {index} is outside an output of shape {shape:?}"))),
        }
    }
    Ok(vec![Tensor::from_f64(x.dtype(), &shape, &out)?])
}

/// dx = dy at the first maximum of each window, summed over windows.
fn eval_max_pool_gradient(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (x, dy) = (cx.input(0)?, cx.input(1)?);
    let pool = Pool::new(cx, x.shape())?;
    expect_shape(dy, &pool.output, "the gradient of the output")?;
    let mut dx = filled(x.shape(), 0.0)?;
    for (best, dy) in pool.maxima(&x.to_f64()?)?.into_iter().zip(dy.to_f64()?) {
        dx[best] += dy;
    }
    Ok(vec![Tensor::from_f64(x.dtype(), x.shape(), &dx)?])
}

/// dx = dy / count, summed over the windows that read x.
fn eval_average_pool_gradient(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (dy, shape) = (cx.input(0)?, shape_operand(cx.input(1)?)?);
    let pool = Pool::new(cx, &shape)?;
    expect_shape(dy, &pool.output, "the gradient of the output")?;
    let counts = pool.counts(cx.attributes().flag("count_include_pad", false)?)?;
    let dy_values = dy.to_f64()?;
    let mut dx = filled(&shape, 0.0)?;
    pool.visit(|i, o| dx[i] += dy_values[o] / counts[o % counts.len()]);
    Ok(vec![Tensor::from_f64(dy.dtype(), &shape, &dx)?])
}

fn max_pool_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let mut attributes = cx.node.attributes.clone();
    attributes.remove("storage_order");
    Ok(vec![Some(cx.graph.own_op("MaxPoolGradient", &[x, dy], attributes)?)])
}

fn average_pool_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let shape = cx.op("Shape", &[x])?;
    let attributes = cx.node.attributes.clone();
    Ok(vec![Some(cx.graph.own_op("AveragePoolGradient", &[dy, shape], attributes)?)])
}

fn global_max_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let shape = cx.shape(x)?;
    let kernel = crate::dim::known_shape(spatial(&shape, "the input")?)
        .ok_or_else(|| OpError::unsupported("gradient of GlobalMaxPool over sizes that are not known"))?;
    let kernel: Vec<i64> = kernel.into_iter().map(|k| k as i64).collect();
    Ok(vec![Some(cx.graph.own_op("MaxPoolGradient", &[x, dy], [("kernel_shape", kernel.into())])?)])
}

/// dx = dy / (elements of a channel), the same for all of them.
fn global_average_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (x, dy) = (cx.input(0)?, cx.grad()?);
    let shape = cx.shape(x)?;
    let share = match Dim::product(spatial(&shape, "the input")?).known() {
        Some(count) => {
            let factor = cx.scalar_like(1.0 / count as f64, dy)?;
            cx.op("Mul", &[dy, factor])?
        }
        None => {
            let (all, channels) = (cx.op("Size", &[x])?, cx.op("Size", &[dy])?);
            let count = cx.op("Div", &[all, channels])?;
            let count = cx.op("CastLike", &[count, dy])?;
            cx.op("Div", &[dy, count])?
        }
    };
    let shape = cx.op("Shape", &[x])?;
    Ok(vec![Some(cx.op("Expand", &[share, shape])?)])
}

/// One operation for each tap of each window.
fn pool_flops(shapes: &Shapes) -> u64 {
    shapes.output_len(0) * taps(shapes)
}

fn max_pool_gradient_flops(shapes: &Shapes) -> u64 {
    shapes.input_len(1) * taps(shapes)
}

fn average_pool_gradient_flops(shapes: &Shapes) -> u64 {
    shapes.input_len(0) * taps(shapes)
}

fn taps(shapes: &Shapes) -> u64 {
    WindowSpec::of_pool(shapes.attributes).map_or(0, |spec| spec.kernel.iter().map(|k| *k as u64).product())
}

fn global_flops(shapes: &Shapes) -> u64 {
    shapes.input_len(0)
}

fn pool_channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let x = cx.shape(0).ok_or_else(|| OpError::shape("the rank of the input must be known"))?;
    spatial(x, "the input")?;
    let same = (0..2).map(|axis| Link::Same(Axis::Input(0, axis), Axis::Output(0, axis)));
    let slid = (2..x.len()).map(|axis| Link::Fixed(Axis::Input(0, axis), "a window slides along it"));
    Ok(same.chain(slid).collect())
}
