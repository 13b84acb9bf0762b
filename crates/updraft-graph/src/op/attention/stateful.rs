//! Attention that carries a state from call to call: LinearAttention, CausalConvWithState, and TensorScatter, which
//! writes into a cache.

use super::{Heads, NEWER, head_count};
use crate::dim::Dim;
use crate::op::conv::expect_shape;
use crate::op::{Arity, Axis, Eval, Fact, Infer, Link, Op, OpError, Shapes, filled, no_flops, resolve_axis};
use crate::tensor::Tensor;

const CARRIED: &str = "its state ties all channels of a head together";

/// The family.
pub(in crate::op) const OPS: &[Op] = &[
    Op::onnx("LinearAttention", &[27], Arity::range(3, 6).outputs(1, 2), infer_linear, eval_linear)
        .no_gradient(NEWER)
        .flops(linear_flops)
        .no_channels(CARRIED),
    Op::onnx("CausalConvWithState", &[27], Arity::range(2, 4).outputs(1, 2), infer_causal_conv, eval_causal_conv)
        .no_gradient(NEWER)
        .flops(causal_conv_flops)
        .channels(causal_conv_links),
    Op::onnx("TensorScatter", &[24], Arity::range(2, 3), infer_tensor_scatter, eval_tensor_scatter)
        .no_gradient(NEWER)
        .flops(no_flops)
        .channels(tensor_scatter_links),
];

fn required_heads(cx: &crate::op::OpView, name: &str) -> Result<usize, OpError> {
    head_count(cx, name)?.ok_or_else(|| OpError::attribute(name, "is missing"))
}

fn infer_linear(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let dtype = cx.input(0, "query")?.dtype;
    let (q_heads, kv_heads) = (required_heads(&cx.view, "q_num_heads")?, required_heads(&cx.view, "kv_num_heads")?);
    let state_dtype = if cx.optional(3).is_some() { cx.dtype(3) } else { dtype };
    let (Some([n, t, q]), Some([_, _, v])) = (cx.shape(0), cx.shape(2)) else {
        return Ok(vec![Fact::of_dtype(dtype), Fact::of_dtype(state_dtype)]);
    };
    let size = |width: &Dim, heads: usize| width.divide_exact(&Dim::Known(heads)).unwrap_or(Dim::Unknown);
    let (d_k, d_v) = (size(q, q_heads), size(v, kv_heads));
    Ok(vec![
        Fact::tensor(dtype, vec![n.clone(), t.clone(), d_v.times(&Dim::Known(q_heads))]),
        Fact::tensor(state_dtype, vec![n.clone(), Dim::Known(kv_heads), d_k, d_v]),
    ])
}

/// A state matrix `S` for each head, which each position decays, corrects and adds to, and which its query reads:
/// `S = exp(g) S + beta k (v - exp(g) Sᵀ k)ᵀ`, `o = scale Sᵀ q`; without decay `g = 0`, without correction the new
/// term is `k vᵀ`.
fn eval_linear(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (q_heads, kv_heads) = (required_heads(&cx.view, "q_num_heads")?, required_heads(&cx.view, "kv_num_heads")?);
    let (query, key, value) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let packed = |tensor: &Tensor, heads: usize| match tensor.rank() {
        3 => Heads::of(tensor.shape(), Some(heads)),
        _ => Err(OpError::shape(format!("heads of shape {:?}, expected [N, S, heads * D]", tensor.shape()))),
    };
    let (q, k, v) = (packed(query, q_heads)?, packed(key, kv_heads)?, packed(value, kv_heads)?);
    if q_heads % kv_heads != 0
        || q.size != k.size
        || [q, k, v].iter().any(|h| (h.batch, h.sequence) != (q.batch, q.sequence))
    {
        return Err(OpError::shape(format!(
            "queries {:?}, keys {:?}, values {:?}",
            query.shape(),
            key.shape(),
            value.shape()
        )));
    }
    let rule = cx.attributes().string("update_rule", "gated_delta")?;
    let (gated, corrected) = match rule {
        "linear" => (false, false),
        "gated" => (true, false),
        "delta" => (false, true),
        "gated_delta" => (true, true),
        other => {
            let problem = format!("is {other:?}; \"linear\", \"gated\", \"delta\" and \"gated_delta\" are known");
            return Err(OpError::attribute("update_rule", problem));
        }
    };
    let (decay, beta) = (cx.optional(4), cx.optional(5));
    if gated != decay.is_some() || corrected != beta.is_some() {
        return Err(OpError::value(format!(
            "update_rule {rule:?} with decay: {}, beta: {}",
            decay.is_some(),
            beta.is_some()
        )));
    }
    // One entry for a head, or one for each of its elements; of beta also one for all heads.
    let gates = |tensor: Option<&Tensor>| -> Result<Option<(Vec<f64>, usize)>, OpError> {
        let Some(tensor) = tensor else { return Ok(None) };
        let width = tensor.shape().last().copied().unwrap_or(0);
        expect_shape(tensor, &[q.batch, q.sequence, width], "decay or beta")?;
        Ok(Some((tensor.to_f64()?, width)))
    };
    let (decay, beta) = (gates(decay)?, gates(beta)?);
    if decay.as_ref().is_some_and(|(_, width)| *width != kv_heads && *width != kv_heads * k.size)
        || beta.as_ref().is_some_and(|(_, width)| *width != kv_heads && *width != 1)
    {
        return Err(OpError::shape(
            "decay needs an entry for each head or key element, beta one for each head or for all",
        ));
    }
    let state_shape = [q.batch, kv_heads, k.size, v.size];
    let mut state = match cx.optional(3) {
        Some(past) => {
            expect_shape(past, &state_shape, "the state")?;
            past.to_f64()?
        }
        None => filled(&state_shape, 0.0)?,
    };
    let scale = match cx.attributes().float("scale", 0.0)? {
        0.0 => 1.0 / (q.size as f64).sqrt(),
        scale => f64::from(scale),
    };
    let (queries, keys, values) = (query.to_f64()?, key.to_f64()?, value.to_f64()?);
    let out = Heads { heads: q_heads, size: v.size, ..q };
    let mut y = filled(&out.shape(), 0.0)?;
    for b in 0..q.batch {
        for h in 0..kv_heads {
            let start = (b * kv_heads + h) * k.size * v.size;
            let state = &mut state[start..start + k.size * v.size];
            for t in 0..q.sequence {
                let row = b * q.sequence + t;
                if let Some((decay, width)) = &decay {
                    for d in 0..k.size {
                        let entry = if *width == kv_heads { h } else { h * k.size + d };
                        let factor = decay[row * width + entry].exp();
                        state[d * v.size..(d + 1) * v.size].iter_mut().for_each(|s| *s *= factor);
                    }
                }
                let mut written: Vec<f64> = (0..v.size).map(|m| values[v.at(b, h, t, m)]).collect();
                if let Some((beta, width)) = &beta {
                    let rate = beta[row * width + if *width == 1 { 0 } else { h }];
                    for (m, w) in written.iter_mut().enumerate() {
                        let known: f64 = (0..k.size).map(|d| state[d * v.size + m] * keys[k.at(b, h, t, d)]).sum();
                        *w = rate * (*w - known);
                    }
                }
                for d in 0..k.size {
                    for m in 0..v.size {
                        state[d * v.size + m] += keys[k.at(b, h, t, d)] * written[m];
                    }
                }
                for reader in h * (q_heads / kv_heads)..(h + 1) * (q_heads / kv_heads) {
                    for m in 0..v.size {
                        let read: f64 =
                            (0..k.size).map(|d| queries[q.at(b, reader, t, d)] * state[d * v.size + m]).sum();
                        y[out.at(b, reader, t, m)] = scale * read;
                    }
                }
            }
        }
    }
    let state_dtype = cx.optional(3).map_or(query.dtype(), Tensor::dtype);
    Ok(vec![Tensor::from_f64(query.dtype(), &out.shape(), &y)?, Tensor::from_f64(state_dtype, &state_shape, &state)?])
}

fn infer_causal_conv(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let x = Fact { content: None, ..cx.input(0, "input [N, C, L]")?.fact.clone() };
    cx.expect_rank(0, 3, "the input")?;
    cx.expect_rank(1, 3, "the weight")?;
    let state = match (&x.shape, cx.shape(1)) {
        (Some(x), Some(weight)) => Some(vec![x[0].clone(), x[1].clone(), weight[2].offset(-1)]),
        _ => None,
    };
    Ok(vec![x.clone(), Fact { dtype: x.dtype, shape: state, content: None }])
}

/// A convolution of each channel with its own kernel over the positions before and at each, the state standing for
/// those before the first; the last `K - 1` positions are the next state.
fn eval_causal_conv(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (x, weight) = (cx.input(0)?, cx.input(1)?);
    let [batch, channels, length] = *x.shape() else {
        return Err(OpError::shape(format!("an input of shape {:?}, expected [N, C, L]", x.shape())));
    };
    let taps = weight.shape().last().copied().unwrap_or(0);
    expect_shape(weight, &[channels, 1, taps], "the weight")?;
    let before = taps.checked_sub(1).ok_or_else(|| OpError::shape("a kernel without taps"))?;
    let bias = match cx.optional(2) {
        Some(bias) => {
            expect_shape(bias, &[channels], "the bias")?;
            bias.to_f64()?
        }
        None => vec![0.0; channels],
    };
    let past = match cx.optional(3) {
        Some(past) => {
            expect_shape(past, &[batch, channels, before], "the state")?;
            past.to_f64()?
        }
        None => filled(&[batch, channels, before], 0.0)?,
    };
    let silu = match cx.attributes().string("activation", "none")? {
        "none" => false,
        "silu" | "swish" => true,
        other => {
            let problem = format!("is {other:?}; \"none\", \"silu\" and \"swish\" are known");
            return Err(OpError::attribute("activation", problem));
        }
    };
    let (values, weights) = (x.to_f64()?, weight.to_f64()?);
    let (mut y, mut state) = (vec![], vec![]);
    for row in 0..batch * channels {
        let channel = row % channels;
        let line = [&past[row * before..(row + 1) * before], &values[row * length..(row + 1) * length]].concat();
        for t in 0..length {
            let sum: f64 = (0..taps).map(|k| line[t + k] * weights[channel * taps + k]).sum();
            let sum = sum + bias[channel];
            y.push(if silu { sum / (1.0 + (-sum).exp()) } else { sum });
        }
        state.extend_from_slice(&line[length..]);
    }
    Ok(vec![
        Tensor::from_f64(x.dtype(), x.shape(), &y)?,
        Tensor::from_f64(x.dtype(), &[batch, channels, before], &state)?,
    ])
}

fn infer_tensor_scatter(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    Ok(vec![Fact { content: None, ..cx.input(0, "cache")?.fact.clone() }])
}

/// Writes a run of positions of each example into its cache, from its write index on.
fn eval_tensor_scatter(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (cache, update) = (cx.input(0)?, cx.input(1)?);
    let axis = resolve_axis(cx.attributes().int("axis", -2)?, cache.rank())?;
    if axis == 0 {
        return Err(OpError::attribute("axis", "is the batch"));
    }
    let size = cache.shape()[axis];
    let length = update.shape().get(axis).copied().unwrap_or(0);
    let mut expected = cache.shape().to_vec();
    expected[axis] = length;
    expect_shape(update, &expected, "the update")?;
    if update.dtype() != cache.dtype() || length > size {
        return Err(OpError::shape(format!("an update {update:?} for a cache {cache:?}")));
    }
    let circular = match cx.attributes().string("mode", "linear")? {
        "linear" => false,
        "circular" => true,
        other => {
            return Err(OpError::attribute("mode", format!("is {other:?}; \"linear\" and \"circular\" are known")));
        }
    };
    let batch = cache.shape()[0];
    let starts = match cx.optional(2) {
        Some(starts) => {
            expect_shape(starts, &[batch], "the write indices")?;
            starts.to_i64()?
        }
        None => vec![0; batch],
    };
    let inner = cache.shape()[axis + 1..].iter().product::<usize>() * cache.dtype().size_in_memory();
    let outer: usize = cache.shape()[..axis].iter().product();
    let mut out = cache.clone();
    let (from, to) = (update.bytes(), out.bytes_mut());
    for row in 0..outer {
        let start = starts[row / (outer / batch)];
        for position in 0..length {
            let target = usize::try_from(start).ok().and_then(|s| s.checked_add(position));
            let target = target.map(|t| if circular { t % size } else { t }).filter(|t| *t < size);
            let target = target.ok_or_else(|| {
                OpError::value(format!("write index {start} for {length} positions in a cache of {size}"))
            })?;
            let (a, b) = ((row * length + position) * inner, (row * size + target) * inner);
            to[b..b + inner].copy_from_slice(&from[a..a + inner]);
        }
    }
    Ok(vec![out])
}

fn linear_flops(shapes: &Shapes) -> u64 {
    let state: u64 = shapes.output_len(1);
    let positions = shapes.inputs.first().and_then(Option::as_ref).and_then(|(_, s)| s.get(1)).map_or(0, |t| *t as u64);
    // Decay, correction, update and reading touch each element of the state once a position.
    8 * state * positions
}

fn causal_conv_flops(shapes: &Shapes) -> u64 {
    let taps = shapes.inputs.get(1).and_then(Option::as_ref).and_then(|(_, s)| s.last()).map_or(0, |k| *k as u64);
    2 * shapes.output_len(0) * taps
}

fn causal_conv_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let channel = Axis::Output(0, 1);
    let mut links = vec![
        Link::Same(Axis::Input(0, 0), Axis::Output(0, 0)),
        Link::Same(Axis::Input(0, 1), channel),
        Link::Same(Axis::Input(1, 0), channel),
        Link::Fixed(Axis::Input(0, 2), "a window slides along it"),
    ];
    if cx.optional(2).is_some() {
        links.push(Link::Same(Axis::Input(2, 0), channel));
    }
    if cx.optional(3).is_some() {
        links.push(Link::Same(Axis::Input(3, 1), channel));
    }
    Ok(links)
}

fn tensor_scatter_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let cache = cx.shape(0).ok_or_else(|| OpError::shape("the rank of the cache must be known"))?;
    let axis = resolve_axis(cx.attributes().int("axis", -2)?, cache.len())?;
    let mut links: Vec<Link> = (0..cache.len()).map(|i| Link::Same(Axis::Input(0, i), Axis::Output(0, i))).collect();
    links.extend((0..cache.len()).filter(|i| *i != axis).map(|i| Link::Same(Axis::Input(1, i), Axis::Output(0, i))));
    links.push(Link::Fixed(Axis::Input(0, axis), "positions are written by number"));
    Ok(links)
}
