//! Convolutions: Conv, ConvTranspose, and the gradients of both.
//!
//! All of them are the same sum of products over the triples (input element, weight element, output element) that a
//! window joins; they differ in which of the three is summed into. [`ConvShape::visit`] enumerates the triples once,
//! for every operator here and for the integer forms in `quant`. A transposed convolution is the gradient of a
//! convolution with respect to its input.

use crate::attribute::Attributes;
use crate::dim::{Dim, known_shape};
use crate::dtype::DType;
use crate::graph::{UPDRAFT_DOMAIN, ValueId};
use crate::op::window::{Padding, Window, WindowSpec, spatial};
use crate::op::{Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, Rule, Shapes, filled, show_shape};
use crate::tensor::Tensor;

/// The family.
pub(super) const OPS: &[Op] = &[
    Op {
        name: "Conv",
        domain: "",
        versions: &[1, 11, 22],
        arity: Arity::range(2, 3),
        infer: infer_conv,
        eval: Rule::Is(eval_conv),
        gradient: Rule::Is(conv_gradient),
        flops: conv_flops,
        channels: Rule::Is(conv_channels),
    },
    Op {
        name: "ConvTranspose",
        domain: "",
        versions: &[1, 11, 22],
        arity: Arity::range(2, 3),
        infer: infer_conv_transpose,
        eval: Rule::Is(eval_conv_transpose),
        gradient: Rule::Is(conv_transpose_gradient),
        flops: conv_transpose_flops,
        channels: Rule::Is(conv_transpose_channels),
    },
    Op {
        name: "ConvInputGradient",
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        arity: Arity::exact(3),
        infer: infer_input_gradient,
        eval: Rule::Is(eval_input_gradient),
        gradient: Rule::None(crate::op::SECOND_ORDER),
        flops: input_gradient_flops,
        channels: Rule::None(crate::op::AFTER_STRUCTURE),
    },
    Op {
        name: "ConvWeightGradient",
        domain: UPDRAFT_DOMAIN,
        versions: &[1],
        arity: Arity::exact(2),
        infer: infer_weight_gradient,
        eval: Rule::Is(eval_weight_gradient),
        gradient: Rule::None(crate::op::SECOND_ORDER),
        flops: weight_gradient_flops,
        channels: Rule::None(crate::op::AFTER_STRUCTURE),
    },
];

/// Every size of a convolution of known shapes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ConvShape {
    /// Examples.
    pub batch: usize,
    /// Groups, each of which joins its own channels.
    pub groups: usize,
    /// Input channels of one group.
    pub inputs_per_group: usize,
    /// Output channels of one group.
    pub outputs_per_group: usize,
    /// Windows over the spatial axes.
    pub window: Window,
}

impl ConvShape {
    /// The convolution of `x` `[N, C, ...]` with a weight `[M, C / groups, ...]` under a node's attributes.
    pub fn of_conv(attributes: &Attributes, x: &[usize], weight: &[usize]) -> Result<ConvShape, OpError> {
        let spec = WindowSpec::of_conv(attributes, spatial(weight, "the weight")?)?;
        let window = spec.resolve(spatial(x, "the input")?)?;
        ConvShape::new(attributes, x[0], x[1], weight, window)
    }

    /// The convolution whose gradient with respect to its input is the transposed convolution of `x` `[N, M, ...]`
    /// with a weight `[M, C / groups, ...]` under a node's attributes.
    pub fn of_conv_transpose(attributes: &Attributes, x: &[usize], weight: &[usize]) -> Result<ConvShape, OpError> {
        let spec = WindowSpec::of_conv(attributes, spatial(weight, "the weight")?)?;
        let window = spec.resolve_transposed(attributes, spatial(x, "the input")?)?;
        if weight[0] != x[1] {
            return Err(OpError::shape(format!("an input of {} channels for a weight of shape {weight:?}", x[1])));
        }
        let groups = groups(attributes)?;
        ConvShape::new(attributes, x[0], weight[1].saturating_mul(groups), weight, window)
    }

    fn new(
        attributes: &Attributes,
        batch: usize,
        channels: usize,
        weight: &[usize],
        window: Window,
    ) -> Result<ConvShape, OpError> {
        let groups = groups(attributes)?;
        if weight[1].checked_mul(groups) != Some(channels) || !weight[0].is_multiple_of(groups) {
            return Err(OpError::shape(format!(
                "an input of {channels} channels for a weight of shape {weight:?} in {groups} groups"
            )));
        }
        Ok(ConvShape { batch, groups, inputs_per_group: weight[1], outputs_per_group: weight[0] / groups, window })
    }

    /// Shape of the convolution's input.
    pub fn input(&self) -> Vec<usize> {
        [&[self.batch, self.groups * self.inputs_per_group], self.window.input.as_slice()].concat()
    }

    /// Shape of the weight.
    pub fn weight(&self) -> Vec<usize> {
        [&[self.groups * self.outputs_per_group, self.inputs_per_group], self.window.kernel.as_slice()].concat()
    }

    /// Shape of the convolution's output.
    pub fn output(&self) -> Vec<usize> {
        [&[self.batch, self.groups * self.outputs_per_group], self.window.output.as_slice()].concat()
    }

    /// Floating-point operations of the convolution, and of each of its gradients: two for each product, those with
    /// padding included.
    pub fn flops(&self) -> u64 {
        let products = [&self.output(), &self.weight()[1..]].map(|s| s.iter().map(|d| *d as u64).product::<u64>());
        2 * products[0] * products[1]
    }

    /// Calls `f` with the linear positions (input, weight, output) of every product. Those of one output element come
    /// with taps outermost and channels innermost.
    pub fn visit(&self, mut f: impl FnMut(usize, usize, usize)) {
        let (inputs, outputs, taps) = (self.window.input_len(), self.window.output_len(), self.window.taps());
        self.window.visit(|output, tap, input| {
            for image in 0..self.batch {
                for m in 0..self.groups * self.outputs_per_group {
                    let group = m / self.outputs_per_group;
                    let y = (image * self.groups * self.outputs_per_group + m) * outputs + output;
                    for c in 0..self.inputs_per_group {
                        let channel = (image * self.groups + group) * self.inputs_per_group + c;
                        f(channel * inputs + input, (m * self.inputs_per_group + c) * taps + tap, y);
                    }
                }
            }
        });
    }
}

/// The attribute `group`.
fn groups(attributes: &Attributes) -> Result<usize, OpError> {
    let groups = attributes.int("group", 1)?;
    usize::try_from(groups)
        .ok()
        .filter(|g| *g > 0)
        .ok_or_else(|| OpError::attribute("group", format!("is {groups}, expected a positive number")))
}

fn same_dtype(cx: &Infer, inputs: &[usize]) -> Result<Option<DType>, OpError> {
    let mut dtype = None;
    for index in inputs {
        match (dtype, cx.dtype(*index)) {
            (Some(a), Some(b)) if a != b => {
                return Err(OpError::dtype(format!("input {index} is {b}, but the inputs before it are {a}")));
            }
            (a, b) => dtype = a.or(b),
        }
    }
    Ok(dtype)
}

pub(super) fn infer_conv(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let dtype = same_dtype(cx, &[0, 1, 2])?;
    let (x, weight) = (cx.input(0, "input")?, cx.input(1, "weight")?);
    Ok(vec![Fact { dtype, shape: conv_dims(cx, x.shape.as_deref(), weight.shape.as_deref())?, content: None }])
}

/// The shape of a convolution's output, as far as it is known.
pub(super) fn conv_dims(cx: &Infer, x: Option<&[Dim]>, weight: Option<&[Dim]>) -> Result<Option<Vec<Dim>>, OpError> {
    let groups = groups(cx.attributes())?;
    let Some(x) = x else { return Ok(None) };
    let sizes = spatial(x, "the input")?;
    let Some(weight) = weight else { return Ok(Some(unknown_from(x, Dim::Unknown))) };
    check_weight(x, weight)?;
    if weight[1].times(&Dim::Known(groups)).differs(&x[1]) {
        return Err(OpError::shape(format!(
            "an input of {} channels for a weight of shape {} in {groups} groups",
            x[1],
            show_shape(weight)
        )));
    }
    Ok(Some(match known_shape(&weight[2..]) {
        Some(kernel) => {
            let spec = WindowSpec::of_conv(cx.attributes(), &kernel)?;
            [vec![x[0].clone(), weight[0].clone()], spec.output_dims(sizes)?].concat()
        }
        None => unknown_from(x, weight[0].clone()),
    }))
}

fn check_weight(x: &[Dim], weight: &[Dim]) -> Result<(), OpError> {
    if weight.len() == x.len() {
        return Ok(());
    }
    Err(OpError::shape(format!("an input of shape {} for a weight of shape {}", show_shape(x), show_shape(weight))))
}

fn unknown_from(x: &[Dim], channels: Dim) -> Vec<Dim> {
    [vec![x[0].clone(), channels], vec![Dim::Unknown; x.len() - 2]].concat()
}

fn infer_conv_transpose(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let dtype = same_dtype(cx, &[0, 1, 2])?;
    let groups = groups(cx.attributes())?;
    let (Some(x), weight) = (cx.shape(0), cx.shape(1)) else { return Ok(vec![Fact::of_dtype(dtype)]) };
    let sizes = spatial(x, "the input")?;
    let shape = match weight {
        None => unknown_from(x, Dim::Unknown),
        Some(weight) => {
            check_weight(x, weight)?;
            if weight[0].differs(&x[1]) {
                return Err(OpError::shape(format!(
                    "an input of {} channels for a weight of shape {}",
                    x[1],
                    show_shape(weight)
                )));
            }
            let channels = weight[1].times(&Dim::Known(groups));
            match known_shape(&weight[2..]) {
                Some(kernel) => {
                    let spec = WindowSpec::of_conv(cx.attributes(), &kernel)?;
                    [vec![x[0].clone(), channels], spec.transposed_dims(cx.attributes(), sizes)?].concat()
                }
                None => unknown_from(x, channels),
            }
        }
    };
    Ok(vec![Fact::tensor(dtype, shape)])
}

fn infer_input_gradient(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let dtype = same_dtype(cx, &[0, 1])?;
    Ok(vec![Fact { dtype, shape: cx.input(2, "shape of the input")?.content(), content: None }])
}

fn infer_weight_gradient(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let dtype = same_dtype(cx, &[0, 1])?;
    let kernel = cx.attributes().ints("kernel_shape")?;
    let kernel = kernel.ok_or_else(|| OpError::attribute("kernel_shape", "is missing"))?;
    let groups = groups(cx.attributes())?;
    let (Some(x), Some(dy)) = (cx.shape(0), cx.shape(1)) else { return Ok(vec![Fact::of_dtype(dtype)]) };
    spatial(x, "the input")?;
    spatial(dy, "the gradient of the output")?;
    let per_group = x[1].divide_exact(&Dim::Known(groups)).unwrap_or(Dim::Unknown);
    let spec = WindowSpec::of_pool(cx.attributes())?;
    debug_assert_eq!(spec.kernel.len(), kernel.len());
    let kernel = spec.kernel.iter().map(|k| Dim::Known(*k));
    Ok(vec![Fact::tensor(dtype, [dy[1].clone(), per_group].into_iter().chain(kernel).collect())])
}

fn eval_conv(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (x, weight) = (cx.input(0)?, cx.input(1)?);
    let conv = ConvShape::of_conv(cx.attributes(), x.shape(), weight.shape())?;
    let (x_values, w_values) = (x.to_f64()?, weight.to_f64()?);
    let mut y = with_bias(&conv.output(), cx.optional(2))?;
    conv.visit(|i, w, o| y[o] += x_values[i] * w_values[w]);
    Ok(vec![Tensor::from_f64(x.dtype(), &conv.output(), &y)?])
}

fn eval_conv_transpose(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (x, weight) = (cx.input(0)?, cx.input(1)?);
    let conv = ConvShape::of_conv_transpose(cx.attributes(), x.shape(), weight.shape())?;
    let (x_values, w_values) = (x.to_f64()?, weight.to_f64()?);
    let mut y = with_bias(&conv.input(), cx.optional(2))?;
    conv.visit(|i, w, o| y[i] += x_values[o] * w_values[w]);
    Ok(vec![Tensor::from_f64(x.dtype(), &conv.input(), &y)?])
}

/// An accumulator `[N, C, ...]` that begins at the bias of its channel.
pub(super) fn with_bias(shape: &[usize], bias: Option<&Tensor>) -> Result<Vec<f64>, OpError> {
    let mut out = filled(shape, 0.0)?;
    let Some(bias) = bias else { return Ok(out) };
    if bias.shape() != [shape[1]] {
        return Err(OpError::shape(format!("a bias of shape {:?} for {} channels", bias.shape(), shape[1])));
    }
    let bias = bias.to_f64()?;
    let plane: usize = shape[2..].iter().product();
    for (i, v) in out.iter_mut().enumerate() {
        *v = bias[i / plane % shape[1]];
    }
    Ok(out)
}

/// dx[i] = sum of w dy over the windows that read x[i].
fn eval_input_gradient(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (dy, weight) = (cx.input(0)?, cx.input(1)?);
    let shape = shape_operand(cx.input(2)?)?;
    let conv = ConvShape::of_conv(cx.attributes(), &shape, weight.shape())?;
    expect_shape(dy, &conv.output(), "the gradient of the output")?;
    let (dy_values, w_values) = (dy.to_f64()?, weight.to_f64()?);
    let mut dx = filled(&shape, 0.0)?;
    conv.visit(|i, w, o| dx[i] += dy_values[o] * w_values[w]);
    Ok(vec![Tensor::from_f64(dy.dtype(), &shape, &dx)?])
}

/// dw[w] = sum of x dy over all places of the window.
fn eval_weight_gradient(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (x, dy) = (cx.input(0)?, cx.input(1)?);
    let conv = weight_gradient_shape(cx.attributes(), x.shape(), dy.shape())?;
    expect_shape(dy, &conv.output(), "the gradient of the output")?;
    let (x_values, dy_values) = (x.to_f64()?, dy.to_f64()?);
    let mut dw = filled(&conv.weight(), 0.0)?;
    conv.visit(|i, w, o| dw[w] += x_values[i] * dy_values[o]);
    Ok(vec![Tensor::from_f64(dy.dtype(), &conv.weight(), &dw)?])
}

/// The convolution that ConvWeightGradient belongs to: the kernel's spatial sizes are the attribute `kernel_shape`.
pub fn weight_gradient_shape(attributes: &Attributes, x: &[usize], dy: &[usize]) -> Result<ConvShape, OpError> {
    spatial(x, "the input")?;
    spatial(dy, "the gradient of the output")?;
    let kernel = WindowSpec::of_pool(attributes)?.kernel;
    let weight = [&[dy[1], x[1] / groups(attributes)?], kernel.as_slice()].concat();
    ConvShape::of_conv(attributes, x, &weight)
}

/// A shape given as a tensor of integers.
pub(super) fn shape_operand(tensor: &Tensor) -> Result<Vec<usize>, OpError> {
    let sizes = tensor.to_i64()?;
    let shape = sizes.iter().map(|d| usize::try_from(*d).map_err(|_| OpError::value(format!("shape {sizes:?}"))));
    shape.collect()
}

pub(super) fn expect_shape(tensor: &Tensor, shape: &[usize], what: &str) -> Result<(), OpError> {
    if tensor.shape() == shape {
        return Ok(());
    }
    Err(OpError::shape(format!("{what} has shape {:?}, expected {shape:?}", tensor.shape())))
}

/// The gradient of a bias `[C]`: the sum over all axes of `[N, C, ...]` but that of the channels.
pub(super) fn bias_gradient(cx: &mut Gradient, dy: ValueId) -> Result<ValueId, OpError> {
    let rank = cx.shape(dy)?.len() as i64;
    let axes: Vec<i64> = (0..rank).filter(|axis| *axis != 1).collect();
    cx.reduce_sum(dy, &axes, false)
}

fn conv_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (x, weight, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let kernel = known_kernel(cx, weight)?;
    let mut attributes = cx.node.attributes.clone();
    attributes.set("kernel_shape", kernel);
    let dx = if cx.wants(0) {
        let shape = cx.op("Shape", &[x])?;
        Some(cx.graph.own_op("ConvInputGradient", &[dy, weight, shape], attributes.clone())?)
    } else {
        None
    };
    let dw = if cx.wants(1) { Some(cx.graph.own_op("ConvWeightGradient", &[x, dy], attributes)?) } else { None };
    let db = if cx.wants(2) { Some(bias_gradient(cx, dy)?) } else { None };
    Ok(vec![dx, dw, db])
}

/// The convolution with the same weight maps the gradient back; the weight sees input and gradient in swapped roles.
fn conv_transpose_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    let (x, weight, dy) = (cx.input(0)?, cx.input(1)?, cx.grad()?);
    let kernel = known_kernel(cx, weight)?;
    let attributes = back_attributes(cx, x, &kernel)?;
    let dx = if cx.wants(0) { Some(cx.graph.op("Conv", &[dy, weight], attributes.clone())?) } else { None };
    let dw = if cx.wants(1) { Some(cx.graph.own_op("ConvWeightGradient", &[dy, x], attributes)?) } else { None };
    let db = if cx.wants(2) { Some(bias_gradient(cx, dy)?) } else { None };
    Ok(vec![dx, dw, db])
}

/// The attributes of the convolution that a transposed convolution is the gradient of, with explicit pads.
fn back_attributes(cx: &Gradient, x: ValueId, kernel: &[i64]) -> Result<Attributes, OpError> {
    let given = &cx.node.attributes;
    let sizes: Vec<usize> = kernel.iter().map(|k| *k as usize).collect();
    let spec = WindowSpec::of_conv(given, &sizes)?;
    let extra = given.ints("output_padding")?.unwrap_or(&[]);
    if extra.iter().zip(&spec.strides).any(|(e, s)| *e >= *s as i64) {
        return Err(OpError::unsupported(
            "gradient of a transposed convolution with output_padding of a stride or more",
        ));
    }
    let mut attributes = match (&spec.padding, given.get("output_shape")) {
        (Padding::Explicit { .. } | Padding::Valid, None) => {
            let mut same = given.clone();
            same.remove("output_padding");
            same.set("kernel_shape", kernel);
            same
        }
        _ => {
            let shape = known_shape(spatial(&cx.shape(x)?, "the input")?).ok_or_else(|| {
                OpError::unsupported("gradient of a transposed convolution that pads by a size that is not known")
            })?;
            let window = spec.resolve_transposed(given, &shape)?;
            if spec.resolve(&window.input).map(|w| w.output) != Ok(window.output.clone()) {
                return Err(OpError::unsupported("gradient of a transposed convolution with a free output_shape"));
            }
            window.attributes()
        }
    };
    attributes.set("group", given.int("group", 1)?);
    Ok(attributes)
}

fn known_kernel(cx: &Gradient, weight: ValueId) -> Result<Vec<i64>, OpError> {
    let shape = cx.shape(weight)?;
    let kernel = known_shape(spatial(&shape, "the weight")?).ok_or_else(|| {
        OpError::shape(format!("the gradient needs the kernel's sizes, found {}", show_shape(&shape)))
    })?;
    Ok(kernel.into_iter().map(|k| k as i64).collect())
}

fn operand(operands: &[Option<(DType, Vec<usize>)>], index: usize) -> &[usize] {
    operands.get(index).and_then(Option::as_ref).map_or(&[], |(_, shape)| shape)
}

pub(super) fn conv_flops(shapes: &Shapes) -> u64 {
    let (x, weight) = (operand(&shapes.inputs, 0), operand(&shapes.inputs, 1));
    ConvShape::of_conv(shapes.attributes, x, weight).map_or(0, |conv| conv.flops())
}

fn conv_transpose_flops(shapes: &Shapes) -> u64 {
    let (x, weight) = (operand(&shapes.inputs, 0), operand(&shapes.inputs, 1));
    ConvShape::of_conv_transpose(shapes.attributes, x, weight).map_or(0, |conv| conv.flops())
}

fn input_gradient_flops(shapes: &Shapes) -> u64 {
    let (dx, weight) = (operand(&shapes.outputs, 0), operand(&shapes.inputs, 1));
    ConvShape::of_conv(shapes.attributes, dx, weight).map_or(0, |conv| conv.flops())
}

fn weight_gradient_flops(shapes: &Shapes) -> u64 {
    let (x, dw) = (operand(&shapes.inputs, 0), operand(&shapes.outputs, 0));
    ConvShape::of_conv(shapes.attributes, x, dw).map_or(0, |conv| conv.flops())
}

fn conv_channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    with_bias_link(cx, weighted_channels(cx, 1, [0, 1])?)
}

fn conv_transpose_channels(cx: &Infer) -> Result<Vec<Link>, OpError> {
    with_bias_link(cx, weighted_channels(cx, 1, [1, 0])?)
}

fn with_bias_link(cx: &Infer, mut links: Vec<Link>) -> Result<Vec<Link>, OpError> {
    if cx.optional(2).is_some() {
        links.push(Link::Same(Axis::Input(2, 0), Axis::Output(0, 1)));
    }
    Ok(links)
}

/// Links of a convolution whose weight, input number `index`, has its output channels along axis `made` and its input
/// channels along axis `read`.
pub(super) fn weighted_channels(cx: &Infer, index: usize, [made, read]: [usize; 2]) -> Result<Vec<Link>, OpError> {
    let (Some(x), Some(weight)) = (cx.shape(0), cx.shape(index)) else {
        return Err(OpError::shape("the ranks of input and weight must be known"));
    };
    spatial(x, "the input")?;
    check_weight(x, weight)?;
    let groups = groups(cx.attributes())?;
    let mut links = vec![Link::Same(Axis::Input(0, 0), Axis::Output(0, 0))];
    let (input, output) = (Axis::Input(0, 1), Axis::Output(0, 1));
    if groups == 1 {
        links.push(Link::Same(Axis::Input(index, made), output));
        links.push(Link::Same(Axis::Input(index, read), input));
    } else if weight[0] == Dim::Known(groups) && weight[1] == Dim::Known(1) {
        links.push(Link::Same(Axis::Input(index, 0), output));
        links.push(Link::Same(input, output));
    } else {
        links.push(Link::Grouped(Axis::Input(index, 0), if made == 0 { output } else { input }, groups));
        links.push(Link::Grouped(input, output, groups));
        links.push(Link::Fixed(Axis::Input(index, 1), "all groups share it"));
    }
    for axis in 2..x.len() {
        links.push(Link::Fixed(Axis::Input(0, axis), "a window slides along it"));
        links.push(Link::Fixed(Axis::Input(index, axis), "it is the kernel's extent"));
    }
    Ok(links)
}
