//! Attention and its companions of ONNX's newer operator sets: Attention, FlexAttention, RotaryEmbedding. Recurrent
//! forms and caches are in `stateful`.
//!
//! Scaled dot-product attention: Vaswani et al., <https://arxiv.org/abs/1706.03762>. Key and value heads may be fewer
//! than query heads, each serving a run of them (<https://arxiv.org/abs/2305.13245>). What a query may look at is an
//! additive bias of 0 or minus infinity; a query that may look at nothing gives zeros.

use crate::attribute::Attribute;
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::ValueId;
use crate::op::cast::dtype_of;
use crate::op::conv::expect_shape;
use crate::op::quant::rounded;
use crate::op::softmax::softmax;
use crate::op::{Arity, Axis, Eval, Fact, Gradient, Infer, Link, Op, OpError, OpView, Shapes, broadcast, filled};
use crate::tensor::Tensor;

pub mod stateful;

/// Why the operators here are not differentiated.
const NEWER: &str = "it is newer than the operator set that training graphs are written in";

/// The family.
pub(super) const OPS: &[Op] = &[
    Op::onnx("Attention", &[23, 24, 25], Arity::range(3, 7).outputs(1, 4), infer_attention, eval_attention)
        .no_gradient(NEWER)
        .flops(attention_flops)
        .channels(attention_links),
    Op {
        domain: "ai.onnx.preview",
        ..Op::onnx("FlexAttention", &[1], Arity::exact(3), infer_attention, eval_flex_attention)
            .no_gradient(NEWER)
            .flops(attention_flops)
            .channels(attention_links)
    },
    Op::onnx("RotaryEmbedding", &[23], Arity::range(3, 4), infer_rotary, eval_rotary)
        .gradient(rotary_gradient)
        .flops(rotary_flops)
        .channels(rotary_links),
];

/// How heads lie in a tensor: `[N, heads, S, D]`, or packed `[N, S, heads * D]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Examples.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Positions.
    pub sequence: usize,
    /// Elements of one head at one position.
    pub size: usize,
    /// Whether heads are the inner axis.
    pub packed: bool,
}

impl Heads {
    /// The heads of a tensor of this shape; `heads` tells how many a packed tensor has.
    pub fn of(shape: &[usize], heads: Option<usize>) -> Result<Heads, OpError> {
        match (shape, heads) {
            ([batch, heads, sequence, size], _) => {
                Ok(Heads { batch: *batch, heads: *heads, sequence: *sequence, size: *size, packed: false })
            }
            ([batch, sequence, width], Some(heads)) if heads > 0 && width % heads == 0 => {
                Ok(Heads { batch: *batch, heads, sequence: *sequence, size: width / heads, packed: true })
            }
            _ => Err(OpError::shape(format!(
                "heads of shape {shape:?}, expected [N, heads, S, D], or [N, S, heads * D] with the number of heads"
            ))),
        }
    }

    /// Position of an element.
    pub fn at(&self, example: usize, head: usize, position: usize, element: usize) -> usize {
        let row = if self.packed {
            (example * self.sequence + position) * self.heads + head
        } else {
            (example * self.heads + head) * self.sequence + position
        };
        row * self.size + element
    }

    /// The tensor's shape.
    pub fn shape(&self) -> Vec<usize> {
        if self.packed {
            vec![self.batch, self.sequence, self.heads * self.size]
        } else {
            vec![self.batch, self.heads, self.sequence, self.size]
        }
    }

    /// The same heads as `[N, heads, S, D]`, and the elements in that order.
    fn unpacked(&self, values: &[f64]) -> (Heads, Vec<f64>) {
        let flat = Heads { packed: false, ..*self };
        let mut out = vec![0.0; values.len()];
        for (b, h, s) in self.rows() {
            for d in 0..self.size {
                out[flat.at(b, h, s, d)] = values[self.at(b, h, s, d)];
            }
        }
        (flat, out)
    }

    fn rows(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let Heads { batch, heads, sequence, .. } = *self;
        (0..batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..sequence).map(move |s| (b, h, s))))
    }
}

fn head_count(view: &OpView, name: &str) -> Result<Option<usize>, OpError> {
    match view.attributes().optional_int(name)? {
        None => Ok(None),
        Some(n) => match usize::try_from(n) {
            Ok(n) if n > 0 => Ok(Some(n)),
            _ => Err(OpError::attribute(name, format!("is {n}, expected a positive number"))),
        },
    }
}

fn infer_attention(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    let dtype = cx.input(0, "query")?.dtype;
    let value_dtype = cx.dtype(2);
    let unknown = |dtype| Fact::tensor(dtype, vec![Dim::Unknown; 4]);
    let (Some(q), Some(k), Some(v)) = (cx.shape(0), cx.shape(1), cx.shape(2)) else {
        return Ok(vec![Fact::of_dtype(dtype), unknown(dtype), unknown(value_dtype), unknown(dtype)]);
    };
    let split = |shape: &[Dim], name: &str| -> Result<[Dim; 4], OpError> {
        match (shape, head_count(&cx.view, name)?) {
            ([n, h, s, d], _) => Ok([n.clone(), h.clone(), s.clone(), d.clone()]),
            ([n, s, width], Some(heads)) => {
                let size = width.divide_exact(&Dim::Known(heads)).unwrap_or(Dim::Unknown);
                Ok([n.clone(), Dim::Known(heads), s.clone(), size])
            }
            _ => Err(OpError::shape(format!("{} and its attribute {name}", crate::op::show_shape(shape)))),
        }
    };
    let [n, q_heads, q_len, q_size] = split(q, "q_num_heads")?;
    let [_, kv_heads, kv_len, k_size] = split(k, "kv_num_heads")?;
    let [_, _, _, v_size] = split(v, "kv_num_heads")?;
    if q_size.differs(&k_size) {
        return Err(OpError::shape(format!("query heads of {q_size} and key heads of {k_size}")));
    }
    let past = match (cx.optional(4), cx.shape(4)) {
        (None, _) => Dim::Known(0),
        (Some(_), Some([_, _, past, _])) => past.clone(),
        _ => Dim::Unknown,
    };
    let total = past.plus(&kv_len);
    let y = match q.len() {
        3 => vec![n.clone(), q_len.clone(), q_heads.times(&v_size)],
        _ => vec![n.clone(), q_heads.clone(), q_len.clone(), v_size.clone()],
    };
    Ok(vec![
        Fact::tensor(dtype, y),
        Fact::tensor(dtype, vec![n.clone(), kv_heads.clone(), total.clone(), k_size]),
        Fact::tensor(value_dtype, vec![n.clone(), kv_heads, total.clone(), v_size]),
        Fact::tensor(dtype, vec![n, q_heads, q_len, total]),
    ])
}

/// Queries, and keys and values with the cache before them.
struct Operands {
    q: (Heads, Vec<f64>),
    k: (Heads, Vec<f64>),
    v: (Heads, Vec<f64>),
    /// Positions that came from the cache.
    past: usize,
}

impl Operands {
    fn of(cx: &Eval) -> Result<Operands, OpError> {
        let (q_heads, kv_heads) = (head_count(&cx.view, "q_num_heads")?, head_count(&cx.view, "kv_num_heads")?);
        let (q, k, v) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
        let q = Heads::of(q.shape(), q_heads)?.unpacked(&q.to_f64()?);
        let k = Heads::of(k.shape(), kv_heads)?.unpacked(&k.to_f64()?);
        let v = Heads::of(v.shape(), kv_heads)?.unpacked(&v.to_f64()?);
        let (k, v, past) = match (cx.optional(4), cx.optional(5)) {
            (None, None) => (k, v, 0),
            (Some(key), Some(value)) => {
                let past = Heads::of(key.shape(), None)?.sequence;
                (joined(key, k)?, joined(value, v)?, past)
            }
            _ => return Err(OpError::value("past_key and past_value come together")),
        };
        let fits = q.0.batch == k.0.batch
            && q.0.batch == v.0.batch
            && k.0.sequence == v.0.sequence
            && k.0.heads == v.0.heads
            && k.0.heads > 0
            && q.0.heads % k.0.heads == 0
            && q.0.size == k.0.size;
        if !fits {
            return Err(OpError::shape(format!(
                "queries {:?}, keys {:?} and values {:?} as [N, heads, S, D]",
                q.0.shape(),
                k.0.shape(),
                v.0.shape()
            )));
        }
        Ok(Operands { q, k, v, past })
    }

    /// Shape of the scores.
    fn scores_shape(&self) -> Vec<usize> {
        vec![self.q.0.batch, self.q.0.heads, self.q.0.sequence, self.k.0.sequence]
    }

    /// Products of each query with each of these keys of its head, times `scale`.
    fn scores(&self, (k, keys): &(Heads, Vec<f64>), scale: f64) -> Result<Vec<f64>, OpError> {
        let mut scores = filled(&self.scores_shape(), 0.0)?;
        scores.clear();
        let (q, queries) = &self.q;
        for (b, h, i) in q.rows() {
            for j in 0..k.sequence {
                let head = h / (q.heads / k.heads);
                let product: f64 = (0..q.size).map(|d| queries[q.at(b, h, i, d)] * keys[k.at(b, head, j, d)]).sum();
                scores.push(product * scale);
            }
        }
        Ok(scores)
    }

    /// Sums of the values weighed by the probabilities, laid out like `like`.
    fn weighed(&self, probabilities: &[f64], like: &Heads) -> (Vec<usize>, Vec<f64>) {
        let (q, (v, values)) = (&self.q.0, &self.v);
        let out = Heads { size: v.size, ..*like };
        let mut y = vec![0.0; out.shape().iter().product()];
        for (row, (b, h, i)) in q.rows().enumerate() {
            let head = h / (q.heads / v.heads);
            for j in 0..v.sequence {
                let weight = probabilities[row * v.sequence + j];
                for d in 0..v.size {
                    y[out.at(b, h, i, d)] += weight * values[v.at(b, head, j, d)];
                }
            }
        }
        (out.shape(), y)
    }
}

/// A cache `[N, heads, past, D]` followed by new heads.
fn joined(past: &Tensor, (new, values): (Heads, Vec<f64>)) -> Result<(Heads, Vec<f64>), OpError> {
    let cached = Heads::of(past.shape(), None)?;
    expect_shape(past, &[new.batch, new.heads, cached.sequence, new.size], "the cache")?;
    let all = Heads { sequence: cached.sequence + new.sequence, ..new };
    let old = past.to_f64()?;
    let mut out = vec![0.0; old.len() + values.len()];
    for (b, h, s) in all.rows() {
        for d in 0..all.size {
            out[all.at(b, h, s, d)] = match s.checked_sub(cached.sequence) {
                None => old[cached.at(b, h, s, d)],
                Some(s) => values[new.at(b, h, s, d)],
            };
        }
    }
    Ok((all, out))
}

/// What is added to the score of each query and key: the mask, and minus infinity where a query may not look.
fn bias(cx: &Eval, operands: &Operands) -> Result<Vec<f64>, OpError> {
    let shape = operands.scores_shape();
    let total = shape[3];
    let mask = cx.optional(3).map(|mask| masked(mask, &shape)).transpose()?;
    let filled_to: Option<Vec<i64>> = cx.optional(6).map(Tensor::to_i64).transpose()?;
    if filled_to.as_ref().is_some_and(|lengths| lengths.len() != shape[0]) {
        return Err(OpError::shape("nonpad_kv_seqlen needs one entry for each example"));
    }
    let causal = cx.attributes().flag("is_causal", false)?;
    let (left, right) = (cx.attributes().int("left_window_size", -1)?, cx.attributes().int("right_window_size", -1)?);
    for (name, size) in [("left_window_size", left), ("right_window_size", right)] {
        if size < -1 {
            return Err(OpError::attribute(name, format!("is {size}, expected -1 or more")));
        }
    }
    let mut out = filled(&shape, 0.0)?;
    for (at, value) in out.iter_mut().enumerate() {
        let (b, i, j) = (at / total / shape[2] / shape[1], (at / total % shape[2]) as i64, (at % total) as i64);
        // Keys before the first query: the cache, or what of the keys is filled before the queries' own.
        let offset = match &filled_to {
            Some(lengths) if operands.past == 0 => lengths[b] - shape[2] as i64,
            _ => operands.past as i64,
        };
        let ahead = j - (i + offset);
        let hidden = (causal && ahead > 0)
            || (left >= 0 && -ahead > left)
            || (right >= 0 && ahead > right)
            || filled_to.as_ref().is_some_and(|lengths| j >= lengths[b]);
        *value = if hidden { f64::NEG_INFINITY } else { mask.as_ref().map_or(0.0, |m| m[at]) };
    }
    Ok(out)
}

/// A mask stretched to the scores. One that is too short along the keys hides the rest; `true` shows a key.
fn masked(mask: &Tensor, scores: &[usize]) -> Result<Vec<f64>, OpError> {
    let values: Vec<f64> = match mask.dtype() {
        DType::Bool => mask.to_bools()?.into_iter().map(|shown| if shown { 0.0 } else { f64::NEG_INFINITY }).collect(),
        _ => mask.to_f64()?,
    };
    let (Some(keys), total) = (mask.shape().last().copied(), scores[3]) else {
        return Ok(vec![values[0]; scores.iter().product()]);
    };
    // A single column is stretched over all keys; a shorter mask is not.
    let wide = if keys == 1 { total } else { keys };
    let mut target = scores.to_vec();
    target[3] = wide;
    if wide > total || broadcast(&[mask.shape(), &target])? != target {
        return Err(OpError::shape(format!("a mask of shape {:?} for scores of shape {scores:?}", mask.shape())));
    }
    let stretched: Vec<f64> =
        crate::op::index::broadcast_positions(mask.shape(), &target).map(|at| values[at]).collect();
    let rows = scores[..3].iter().product::<usize>();
    let entry = |row: usize, j: usize| if j < wide { stretched[row * wide + j] } else { f64::NEG_INFINITY };
    Ok((0..rows).flat_map(|row| (0..total).map(move |j| (row, j))).map(|(row, j)| entry(row, j)).collect())
}

fn eval_attention(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let mut operands = Operands::of(cx)?;
    let mut scaled_keys = operands.k.clone();
    let dtype = cx.input(0)?.dtype();
    let scale = match cx.attributes().optional_float("scale")? {
        Some(scale) => f64::from(scale),
        None => 1.0 / (operands.q.0.size as f64).sqrt(),
    };
    // The specification composes the operator of others on the inputs' type: each step is rounded to that.
    let round = |values: &mut Vec<f64>| -> Result<(), OpError> {
        *values = Tensor::from_f64(dtype, &[values.len()], values)?.to_f64()?;
        Ok(())
    };
    let root = rounded(scale.sqrt(), dtype)?;
    for (_, values) in [&mut operands.q, &mut scaled_keys] {
        values.iter_mut().for_each(|v| *v *= root);
        round(values)?;
    }
    let mut kept = operands.scores(&scaled_keys, 1.0)?;
    round(&mut kept)?;
    let mode = cx.attributes().int("qk_matmul_output_mode", 0)?;
    let cap = f64::from(cx.attributes().float("softcap", 0.0)?);
    let mut scores = kept.clone();
    if cap > 0.0 {
        scores.iter_mut().for_each(|s| *s = (*s / cap).tanh() * cap);
        round(&mut scores)?;
    }
    if mode == 1 {
        kept = scores.clone();
    }
    let bias = bias(cx, &operands)?;
    scores.iter_mut().zip(&bias).for_each(|(s, b)| *s += b);
    round(&mut scores)?;
    if mode == 2 {
        kept = scores.clone();
    }
    let precision = match cx.attributes().optional_int("softmax_precision")? {
        Some(number) => dtype_of("softmax_precision", number)?,
        None => dtype,
    };
    let total = operands.k.0.sequence;
    let mut probabilities = Vec::with_capacity(scores.len());
    for (row, hidden) in scores.chunks(total.max(1)).zip(bias.chunks(total.max(1))) {
        match hidden.iter().all(|b| *b == f64::NEG_INFINITY) {
            true => probabilities.extend(vec![0.0; row.len()]),
            false => probabilities.extend(softmax_stepwise(row, precision)?),
        }
    }
    round(&mut probabilities)?;
    match mode {
        0..=2 => {}
        3 => kept = probabilities.clone(),
        other => {
            return Err(OpError::attribute("qk_matmul_output_mode", format!("is {other}; 0 to 3 are known")));
        }
    }
    let like = Heads::of(cx.input(0)?.shape(), Some(operands.q.0.heads))?;
    let (shape, y) = operands.weighed(&probabilities, &like);
    Ok(vec![
        Tensor::from_f64(dtype, &shape, &y)?,
        Tensor::from_f64(dtype, &operands.k.0.shape(), &operands.k.1)?,
        Tensor::from_f64(cx.input(2)?.dtype(), &operands.v.0.shape(), &operands.v.1)?,
        Tensor::from_f64(dtype, &operands.scores_shape(), &kept)?,
    ])
}

/// A softmax whose differences, exponentials, sum and quotients are each rounded to a type.
fn softmax_stepwise(row: &[f64], precision: DType) -> Result<Vec<f64>, OpError> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps = row.iter().map(|x| rounded(rounded(x - max, precision)?.exp(), precision));
    let exps = exps.collect::<Result<Vec<f64>, OpError>>()?;
    let sum = rounded(exps.iter().sum(), precision)?;
    exps.into_iter().map(|e| rounded(e / sum, precision)).collect()
}

/// Attention whose scores and probabilities pass through subgraphs.
fn eval_flex_attention(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let operands = Operands::of(cx)?;
    let dtype = cx.input(0)?.dtype();
    let scale = match cx.attributes().optional_float("scale")? {
        Some(scale) => f64::from(scale),
        None => 1.0 / (operands.q.0.size as f64).sqrt(),
    };
    let precision = match cx.attributes().optional_int("softmax_precision")? {
        Some(number) => dtype_of("softmax_precision", number)?,
        None if dtype == DType::F64 => DType::F64,
        None => DType::F32,
    };
    let shape = operands.scores_shape();
    let modified = |name: &str, values: Vec<f64>| -> Result<Vec<f64>, OpError> {
        let Some(Attribute::Graph(graph)) = cx.attributes().get(name) else { return Ok(values) };
        let made = cx.scope.run(graph, &[Tensor::from_f64(precision, &shape, &values)?])?;
        let made = made.first().ok_or_else(|| OpError::value(format!("subgraph {name} makes no output")))?;
        expect_shape(made, &shape, name)?;
        Ok(made.to_f64()?)
    };
    let scores = modified("score_mod", operands.scores(&operands.k, scale)?)?;
    let probabilities = scores.chunks(shape[3].max(1)).flat_map(softmax).collect();
    let probabilities = modified("prob_mod", probabilities)?;
    let like = Heads::of(cx.input(0)?.shape(), None)?;
    let (shape, y) = operands.weighed(&probabilities, &like);
    Ok(vec![Tensor::from_f64(dtype, &shape, &y)?])
}

fn attention_flops(shapes: &Shapes) -> u64 {
    let width = |index: usize| shapes.inputs.get(index).and_then(Option::as_ref).and_then(|(_, s)| s.last()).copied();
    let keys = |index: usize| {
        let shape = shapes.inputs.get(index).and_then(Option::as_ref).map(|(_, s)| s.as_slice());
        shape.and_then(|s| s.len().checked_sub(2).map(|i| s[i])).unwrap_or(0) as u64
    };
    let total = keys(1) + if shapes.input_len(4) > 0 { keys(4) } else { 0 };
    // Scores and weighed sums are a product each; a softmax takes five operations a score, which heads share out.
    let heads = shapes.attributes.int("q_num_heads", 1).unwrap_or(1).max(1) as u64;
    let scores = shapes.input_len(0) / (width(0).unwrap_or(1).max(1) as u64) * heads * total;
    2 * total * (shapes.input_len(0) + shapes.output_len(0)) + 5 * scores
}

/// Heads go as a whole; a head of keys and values takes the run of query heads that it serves along.
fn attention_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let (Some(q), Some(k)) = (cx.shape(0), cx.shape(1)) else {
        return Err(OpError::shape("the ranks of query and key must be known"));
    };
    let packed = q.len() == 3;
    let (heads, sequence) = if packed { (2, 1) } else { (1, 2) };
    let mut links = vec![Link::Same(Axis::Input(0, 0), Axis::Output(0, 0))];
    links.extend((1..3).map(|i| Link::Same(Axis::Input(i, 0), Axis::Output(0, 0))));
    links.push(Link::Same(Axis::Input(0, sequence), Axis::Output(0, sequence)));
    let count = |shape: &[Dim], name: &str| match packed {
        true => head_count(&cx.view, name),
        false => Ok(shape.get(1).and_then(Dim::known)),
    };
    let (query_heads, key_heads) = (count(q, "q_num_heads")?, count(k, "kv_num_heads")?);
    let (Some(query_heads), Some(key_heads)) = (query_heads, key_heads) else {
        return Err(OpError::shape("the numbers of heads must be known"));
    };
    let mut go_with_output = |axis, count| links.push(Link::Grouped(axis, Axis::Output(0, heads), count));
    go_with_output(Axis::Input(0, heads), query_heads);
    go_with_output(Axis::Input(1, heads), key_heads);
    go_with_output(Axis::Input(2, heads), key_heads);
    // The mask stretches to [N, heads, S, T]; caches are [N, heads, T, D].
    if let Some([.., dim, _, _]) = cx.shape(3)
        && *dim != Dim::Known(1)
    {
        let axis = cx.shape(3).map_or(0, |mask| mask.len() - 3);
        go_with_output(Axis::Input(3, axis), query_heads);
    }
    (4..6).filter(|i| cx.optional(*i).is_some()).for_each(|i| go_with_output(Axis::Input(i, 1), key_heads));
    (1..3).filter(|i| cx.wants(*i)).for_each(|i| go_with_output(Axis::Output(i, 1), key_heads));
    (3..4).filter(|i| cx.wants(*i)).for_each(|i| go_with_output(Axis::Output(i, 1), query_heads));
    if !packed {
        links.push(Link::Same(Axis::Input(0, 3), Axis::Input(1, 3)));
        links.push(Link::Same(Axis::Input(2, 3), Axis::Output(0, 3)));
        if cx.attributes().get("scale").is_none() {
            links.push(Link::Fixed(Axis::Input(0, 3), "its size sets the scale of the scores"));
        }
    }
    Ok(links)
}

fn infer_rotary(cx: &Infer) -> Result<Vec<Fact>, OpError> {
    Ok(vec![Fact { content: None, ..cx.input(0, "input")?.fact.clone() }])
}

/// Turns pairs of elements of each head by an angle of their position: `(a cos - b sin, a sin + b cos)`
/// (<https://arxiv.org/abs/2104.09864>).
fn eval_rotary(cx: &Eval) -> Result<Vec<Tensor>, OpError> {
    let (x, cos, sin, ids) = (cx.input(0)?, cx.input(1)?, cx.input(2)?, cx.optional(3));
    let heads = Heads::of(x.shape(), head_count(&cx.view, "num_heads")?.filter(|_| x.rank() == 3))?;
    let turned = match usize::try_from(cx.attributes().int("rotary_embedding_dim", 0)?) {
        Ok(0) => heads.size,
        Ok(turned) if turned <= heads.size => turned,
        _ => return Err(OpError::attribute("rotary_embedding_dim", format!("exceeds heads of {}", heads.size))),
    };
    let half = turned / 2;
    if turned % 2 != 0 {
        return Err(OpError::shape(format!("{turned} elements of a head do not make pairs")));
    }
    let rows = match ids {
        Some(ids) => {
            expect_shape(ids, &[heads.batch, heads.sequence], "position_ids")?;
            let count = cos.shape().first().copied().unwrap_or(0);
            expect_shape(cos, &[count, half], "the cosines")?;
            let rows = ids.to_i64()?.into_iter().map(|id| {
                let row = usize::try_from(id).ok().filter(|id| *id < count);
                row.ok_or_else(|| OpError::value(format!("position {id} of {count}")))
            });
            rows.collect::<Result<Vec<_>, _>>()?
        }
        None => {
            expect_shape(cos, &[heads.batch, heads.sequence, half], "the cosines")?;
            (0..heads.batch * heads.sequence).collect()
        }
    };
    expect_shape(sin, cos.shape(), "the sines")?;
    let interleaved = cx.attributes().flag("interleaved", false)?;
    let (cos, sin, values) = (cos.to_f64()?, sin.to_f64()?, x.to_f64()?);
    let mut y = values.clone();
    for (b, h, s) in heads.rows() {
        let row = rows[b * heads.sequence + s] * half;
        for pair in 0..half {
            let (first, second) = if interleaved { (2 * pair, 2 * pair + 1) } else { (pair, half + pair) };
            let (first, second) = (heads.at(b, h, s, first), heads.at(b, h, s, second));
            let (c, w) = (cos[row + pair], sin[row + pair]);
            y[first] = values[first] * c - values[second] * w;
            y[second] = values[first] * w + values[second] * c;
        }
    }
    Ok(vec![Tensor::from_f64(x.dtype(), x.shape(), &y)?])
}

/// The gradient is turned back.
fn rotary_gradient(cx: &mut Gradient) -> Result<Vec<Option<ValueId>>, OpError> {
    if cx.wants(1) || cx.wants(2) {
        return Err(OpError::unsupported("gradient with respect to the cosines and sines of RotaryEmbedding"));
    }
    let (cos, sin, dy) = (cx.input(1)?, cx.input(2)?, cx.grad()?);
    let back = cx.op("Neg", &[sin])?;
    let operands = [Some(dy), Some(cos), Some(back), cx.optional(3)];
    let count = if operands[3].is_some() { 4 } else { 3 };
    let attributes = cx.node.attributes.clone();
    let made = cx.graph.op_n("", "RotaryEmbedding", &operands[..count], attributes, 1)?;
    Ok(vec![Some(made[0])])
}

fn rotary_flops(shapes: &Shapes) -> u64 {
    3 * shapes.output_len(0)
}

fn rotary_links(cx: &Infer) -> Result<Vec<Link>, OpError> {
    let x = cx.shape(0).ok_or_else(|| OpError::shape("the rank of the input must be known"))?;
    let last = x.len().saturating_sub(1);
    let mut links: Vec<Link> = (0..last).map(|i| Link::Same(Axis::Input(0, i), Axis::Output(0, i))).collect();
    let (before, after) = (Axis::Input(0, last), Axis::Output(0, last));
    links.push(match head_count(&cx.view, "num_heads")?.filter(|_| x.len() == 3) {
        Some(heads) => Link::Grouped(before, after, heads),
        None => Link::Fixed(before, "its elements are turned in pairs"),
    });
    Ok(links)
}
