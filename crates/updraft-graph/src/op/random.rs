//! Random tensors and dropout.
//!
//! Numbers come from the counter-based generator of `updraft-base`, keyed by what the node says: element `i` of an
//! output is number `i` of the key's stream, so the result depends neither on order nor on threads. ONNX leaves the
//! generator open and lets a node have no seed; such a node is refused, since nothing ambient is drawn here.

use updraft_base::random::{Key, fill_normal, fill_uniform};

use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::ValueId;
use crate::op::cast::dtype_of;
use crate::op::elementwise::channels;
use crate::op::{Arity, Eval, Fact, Gradient, Infer, Op, OpError, OpView, one_flop_per_output};
use crate::tensor::Tensor;

type Evaluated = Result<Vec<Tensor>, OpError>;
type Grads = Result<Vec<Option<ValueId>>, OpError>;

const DRAWN: &str = "the result is drawn at random";

/// The family.
pub(super) const OPS: &[Op] = &[
    generator("RandomNormal", &[1, 22], 0, infer_shaped, eval_normal),
    generator("RandomUniform", &[1, 22], 0, infer_shaped, eval_uniform),
    generator("RandomNormalLike", &[1, 22], 1, infer_like, eval_normal),
    generator("RandomUniformLike", &[1, 22], 1, infer_like, eval_uniform),
    generator("Bernoulli", &[15, 22], 1, infer_like, eval_bernoulli),
    generator("Multinomial", &[7, 22], 1, infer_multinomial, eval_multinomial),
    Op::onnx("Dropout", &[7, 10, 12, 13, 22], Arity::range(1, 3).outputs(1, 2), infer_dropout, eval_dropout)
        .gradient(dropout_gradient)
        .channels(dropout_channels),
    Op::onnx("DropoutMask", &[1], Arity::exact(4), infer_dropout_mask, eval_dropout_mask)
        .own()
        .flops(one_flop_per_output)
        .no_gradient(DRAWN)
        .no_channels("the input is a shape"),
];

const fn generator(
    name: &'static str,
    versions: &'static [u32],
    inputs: usize,
    infer: fn(&Infer) -> Result<Vec<Fact>, OpError>,
    eval: fn(&Eval) -> Evaluated,
) -> Op {
    Op::onnx(name, versions, Arity::exact(inputs), infer, eval)
        .flops(one_flop_per_output)
        .no_gradient(DRAWN)
        .no_channels(DRAWN)
}

/// The stream of a node with attribute `seed`.
fn key(cx: &OpView) -> Result<Key, OpError> {
    let seed = cx.attributes().optional_float("seed")?;
    let seed = seed.ok_or_else(|| OpError::unsupported("random numbers without attribute \"seed\""))?;
    Ok(Key::new(u64::from(seed.to_bits())))
}

fn given_dtype(cx: &OpView) -> Result<Option<DType>, OpError> {
    cx.attributes().optional_int("dtype")?.map(|number| dtype_of("dtype", number)).transpose()
}

/// Shape and type are attributes.
fn infer_shaped(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let sizes = cx.attributes().ints("shape")?.ok_or_else(|| OpError::attribute("shape", "is missing"))?;
    let size = |n: &i64| usize::try_from(*n).map(Dim::Known);
    let shape: Result<Vec<Dim>, _> = sizes.iter().map(size).collect();
    let shape = shape.map_err(|_| OpError::attribute("shape", format!("{sizes:?} has a negative size")))?;
    Ok(vec![Fact::tensor(Some(given_dtype(cx)?.unwrap_or(DType::F32)), shape)])
}

/// The shape is the input's, and so is the type unless an attribute gives one.
fn infer_like(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    Ok(vec![Fact { dtype: given_dtype(cx)?.or(x.dtype), shape: x.shape.clone(), content: None }])
}

/// Numbers of the node's stream in the shape and type of its output, each mapped by a function of place and number.
fn draw(cx: &Eval, fill: fn(&Key, u64, &mut [f32]), map: impl Fn(usize, f64) -> f64) -> Evaluated {
    let infer = if cx.inputs.is_empty() { infer_shaped } else { infer_like };
    let shape = cx.output_shape(infer)?;
    let dtype = given_dtype(cx)?.or(cx.optional(0).map(Tensor::dtype)).unwrap_or(DType::F32);
    let mut drawn = Tensor::zeros(DType::F32, &shape)?;
    fill(&key(cx)?, 0, drawn.as_mut_slice()?);
    let values: Vec<f64> = drawn.to_f64()?.into_iter().enumerate().map(|(i, v)| map(i, v)).collect();
    Ok(vec![Tensor::from_f64(dtype, &shape, &values)?])
}

fn eval_normal(cx: &Eval) -> Evaluated {
    let (mean, scale) = (cx.attributes().float("mean", 0.0)?, cx.attributes().float("scale", 1.0)?);
    draw(cx, fill_normal, |_, v| f64::from(mean) + f64::from(scale) * v)
}

fn eval_uniform(cx: &Eval) -> Evaluated {
    let (low, high) = (cx.attributes().float("low", 0.0)?, cx.attributes().float("high", 1.0)?);
    draw(cx, fill_uniform, |_, v| f64::from(low) + (f64::from(high) - f64::from(low)) * v)
}

/// One with the probability that the input holds.
fn eval_bernoulli(cx: &Eval) -> Evaluated {
    let chances = cx.input(0)?.to_f64()?;
    draw(cx, fill_uniform, |i, v| f64::from(u8::from(v < chances[i])))
}

fn infer_multinomial(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    cx.expect_rank(0, 2, "the log-probabilities")?;
    let samples = cx.attributes().int("sample_size", 1)?;
    let samples = usize::try_from(samples).map_err(|_| OpError::attribute("sample_size", "is negative"))?;
    let batch = cx.shape(0).map_or(Dim::Unknown, |s| s[0].clone());
    Ok(vec![Fact::tensor(Some(given_dtype(cx)?.unwrap_or(DType::I32)), vec![batch, samples.into()])])
}

/// Classes by the inverse of the cumulated probabilities; the input holds their logarithms, up to a constant.
fn eval_multinomial(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let shape = cx.output_shape(infer_multinomial)?;
    let classes = x.shape()[1];
    if classes == 0 {
        return Err(OpError::shape("there are no classes to draw from"));
    }
    let (values, key) = (x.to_f64()?, key(cx)?);
    let mut drawn = Vec::with_capacity(shape[0] * shape[1]);
    for (sample, row) in values.chunks_exact(classes).enumerate() {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = row.iter().map(|v| libm::exp(v - largest)).collect();
        let total: f64 = weights.iter().sum();
        for draw in 0..shape[1] {
            let mut left = f64::from(key.uniform_f32((sample * shape[1] + draw) as u64)) * total;
            let class = weights.iter().position(|w| {
                left -= w;
                left < 0.0
            });
            drawn.push(class.unwrap_or(classes - 1) as i128);
        }
    }
    Ok(vec![Tensor::from_i128(given_dtype(cx)?.unwrap_or(DType::I32), &shape, &drawn)?])
}

/// Before version 10 the mask has the type of the data.
fn mask_dtype(cx: &OpView, data: Option<DType>) -> Option<DType> {
    if cx.opset < 10 { data } else { Some(DType::Bool) }
}

fn infer_dropout(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = cx.input(0, "a tensor")?;
    let fact = |dtype| Fact { dtype, shape: x.shape.clone(), content: None };
    Ok(vec![fact(x.dtype), fact(mask_dtype(cx, x.dtype))])
}

fn dropout_channels(cx: &Infer) -> Result<Vec<crate::op::Link>, OpError> {
    let first = Infer { view: cx.view, inputs: cx.inputs.iter().take(1).cloned().collect() };
    channels(&first)
}

/// The identity. Training mode is refused unless its ratio is zero: it becomes DropoutMask and a product first.
fn eval_dropout(cx: &Eval) -> Evaluated {
    let x = cx.input(0)?;
    let training = match cx.optional(2) {
        Some(t) => t.to_bools()?.contains(&true),
        None => false,
    };
    let ratio = match cx.optional(1) {
        Some(t) => t.to_f64()?.first().copied().unwrap_or(0.5),
        None => 0.5,
    };
    if training && ratio != 0.0 {
        return Err(OpError::unsupported("Dropout in training mode, whose generator ONNX leaves open; lower it first"));
    }
    let ones = vec![1; x.len()];
    let mask = Tensor::from_i128(mask_dtype(cx, Some(x.dtype())).unwrap_or(DType::Bool), x.shape(), &ones)?;
    Ok(vec![x.clone(), mask])
}

fn dropout_gradient(cx: &mut Gradient) -> Grads {
    let training = match cx.optional(2) {
        Some(mode) => match cx.graph.value(mode).constant() {
            Some(t) => t.to_bools()?.contains(&true),
            None => true,
        },
        None => false,
    };
    if training {
        return Err(OpError::unsupported("gradient of Dropout in training mode; lower it to DropoutMask first"));
    }
    let dx = Some(cx.grad()?);
    Ok(std::iter::once(dx).chain(vec![None; cx.node.inputs.len() - 1]).collect())
}

/// Inputs: shape, ratio, seed, step.
fn infer_dropout_mask(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let input = cx.input(0, "a shape")?;
    let rank = || input.shape.as_ref().and_then(|s| s.first()?.known());
    let shape = input.content().or_else(|| rank().map(|rank| vec![Dim::Unknown; rank]));
    Ok(vec![Fact { dtype: Some(DType::F32), shape, content: None }])
}

fn eval_dropout_mask(cx: &Eval) -> Evaluated {
    fn scalar<T: Copy>(values: &[T], name: &str) -> Result<T, OpError> {
        values.first().copied().ok_or_else(|| OpError::shape(format!("the {name} must be a scalar")))
    }
    let ratio = scalar(&cx.input(1)?.to_f64()?, "ratio")? as f32;
    let seed = scalar(&cx.input(2)?.to_i64()?, "seed")?;
    let step = scalar(&cx.input(3)?.to_i64()?, "step")?;
    let mut mask = Tensor::zeros(DType::F32, &cx.output_shape(infer_dropout_mask)?)?;
    let stream = cx.attributes().int("stream", 0)?;
    fill_dropout_mask(seed, stream, step, ratio, mask.as_mut_slice()?)?;
    Ok(vec![mask])
}

/// Writes a dropout mask: zero with probability `ratio`, else `1 / (1 - ratio)`. Which elements are zero is a function
/// of seed, stream (one for each dropout of a network), step and place.
pub fn fill_dropout_mask(seed: i64, stream: i64, step: i64, ratio: f32, mask: &mut [f32]) -> Result<(), OpError> {
    if !(0.0..1.0).contains(&ratio) {
        return Err(OpError::value(format!("dropout ratio {ratio} is outside [0, 1)")));
    }
    let key = Key::new(seed as u64).child_index(stream as u64).child_index(step as u64);
    let scale = 1.0 / (1.0 - ratio);
    fill_uniform(&key, 0, mask);
    for value in mask {
        *value = if *value < ratio { 0.0 } else { scale };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::evaluate;
    use crate::graph::{Graph, UPDRAFT_DOMAIN};
    use crate::{Attributes, ValueId};

    const N: usize = 1 << 14;

    fn run(op: &str, domain: &str, attributes: Attributes, inputs: &[Tensor]) -> Result<Tensor, String> {
        let mut graph = Graph::new("draw");
        let inputs: Vec<Option<ValueId>> = inputs.iter().map(|t| Some(graph.add_constant("c", t.clone()))).collect();
        let made = graph.op_n(domain, op, &inputs, attributes, 1).map_err(|e| e.to_string())?;
        graph.set_outputs(made);
        Ok(evaluate(&graph, &Default::default()).map_err(|e| e.to_string())?.remove(0))
    }

    fn seeded(seed: f32) -> Attributes {
        Attributes::from([("seed", seed.into())])
    }

    fn mean_and_variance(t: &Tensor) -> (f64, f64) {
        let values = t.to_f64().unwrap();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        (mean, values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64)
    }

    #[test]
    fn numbers_have_the_mean_and_variance_that_the_node_asks_for() {
        let like = Tensor::zeros(DType::F32, &[N]).unwrap();
        let shaped = |mut attributes: Attributes| {
            attributes.set("shape", vec![N as i64]);
            attributes
        };
        let mut normal = seeded(1.0);
        normal.set("mean", 3.0);
        normal.set("scale", 2.0);
        let mut uniform = seeded(2.0);
        uniform.set("low", -1.0);
        uniform.set("high", 3.0);
        // Five standard errors of the mean of N numbers; the variance's are smaller than three times those.
        let error = |variance: f64| 5.0 * (variance / N as f64).sqrt();
        for (made, mean, variance) in [
            (run("RandomNormal", "", shaped(normal.clone()), &[]).unwrap(), 3.0, 4.0),
            (run("RandomNormalLike", "", normal, std::slice::from_ref(&like)).unwrap(), 3.0, 4.0),
            (run("RandomUniform", "", shaped(uniform.clone()), &[]).unwrap(), 1.0, 16.0 / 12.0),
            (run("RandomUniformLike", "", uniform, &[like]).unwrap(), 1.0, 16.0 / 12.0),
        ] {
            let found = mean_and_variance(&made);
            assert!((found.0 - mean).abs() < error(variance), "{found:?}, expected {mean}");
            assert!((found.1 - variance).abs() < 3.0 * error(variance), "{found:?}, expected {variance}");
        }
    }

    #[test]
    fn draws_have_the_probabilities_of_the_input() {
        let chances = Tensor::new(&[N], &vec![0.3f32; N]).unwrap();
        let (mean, _) = mean_and_variance(&run("Bernoulli", "", seeded(3.0), &[chances]).unwrap());
        // Five standard deviations of a share of N draws, sqrt(p (1 - p) / N).
        assert!((mean - 0.3).abs() < 5.0 * (0.21 / N as f64).sqrt(), "{mean}");

        let logits = Tensor::new(&[1, 3], &[0f32, libm::logf(3.0), f32::NEG_INFINITY]).unwrap();
        let mut attributes = seeded(4.0);
        attributes.set("sample_size", N as i64);
        let classes = run("Multinomial", "", attributes, &[logits]).unwrap();
        let (mean, _) = mean_and_variance(&classes);
        assert_eq!(classes.shape(), [1, N]);
        assert!((mean - 0.75).abs() < 5.0 * (0.1875 / N as f64).sqrt(), "{mean}");
    }

    #[test]
    fn a_node_without_a_seed_is_refused() {
        let like = Tensor::zeros(DType::F32, &[2]).unwrap();
        let error = run("RandomNormalLike", "", Attributes::new(), &[like]).unwrap_err();
        assert!(error.contains("\"seed\""), "{error}");
    }

    #[test]
    fn a_dropout_mask_is_a_function_of_seed_stream_and_step() {
        let mask = |seed: i64, stream: i64, step: i64| {
            let inputs = [
                Tensor::vector(&[4i64, N as i64 / 4]),
                Tensor::scalar(0.25f32),
                Tensor::scalar(seed),
                Tensor::scalar(step),
            ];
            run("DropoutMask", UPDRAFT_DOMAIN, [("stream", stream.into())].into(), &inputs).unwrap()
        };
        let first = mask(1, 2, 3);
        assert_eq!(first.shape(), [4, N / 4]);
        assert!(first.to_f64().unwrap().iter().all(|v| *v == 0.0 || *v == f64::from(1.0f32 / 0.75)));
        // The mean of a mask is one; five standard errors, the variance being ratio / (1 - ratio).
        assert!((mean_and_variance(&first).0 - 1.0).abs() < 5.0 * (1.0 / 3.0 / N as f64).sqrt());
        assert_eq!(first, mask(1, 2, 3));
        assert!([mask(2, 2, 3), mask(1, 3, 3), mask(1, 2, 4)].iter().all(|other| *other != first));
    }
}
