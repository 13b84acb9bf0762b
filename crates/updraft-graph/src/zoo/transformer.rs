//! Transformers: GPT, BERT encoder and ViT.
//!
//! One attention and one feed-forward serve all three. Attention is written in elementary operators (product, scale,
//! mask, softmax, product), which every runtime reads; ours recognises the pattern.

use updraft_base::random::Key;

use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Graph, ValueId};
use crate::op::OpError;
use crate::tensor::Tensor;
use crate::zoo::net::{Conv, Init, Net};
use crate::zoo::options::{OptionFact, Options, flag, float, integer};

pub(super) const GPT_OPTIONS: &[OptionFact] = &[
    integer("vocabulary", 50257, "number of tokens"),
    integer("context", 1024, "longest sequence"),
    integer("layers", 12, "transformer blocks"),
    integer("heads", 12, "attention heads"),
    integer("width", 768, "features of a token"),
    flag("bias", true, "biases in linear layers and norms"),
    float("dropout", 0.0, "share of features dropped in training"),
];

pub(super) const BERT_OPTIONS: &[OptionFact] = &[
    integer("vocabulary", 30522, "number of tokens"),
    integer("context", 512, "longest sequence"),
    integer("types", 2, "token types (segments)"),
    integer("layers", 12, "transformer blocks"),
    integer("heads", 12, "attention heads"),
    integer("width", 768, "features of a token"),
    integer("hidden", 3072, "width of the feed-forward layer"),
    float("dropout", 0.0, "share of features dropped in training"),
];

pub(super) const VIT_OPTIONS: &[OptionFact] = &[
    integer("classes", 1000, "outputs"),
    integer("channels", 3, "input channels"),
    integer("image", 224, "input height and width"),
    integer("patch", 16, "height and width of a patch"),
    integer("layers", 12, "transformer blocks"),
    integer("heads", 12, "attention heads"),
    integer("width", 768, "features of a token"),
    integer("hidden", 3072, "width of the feed-forward layer"),
    float("dropout", 0.0, "share of features dropped in training"),
];

/// Standard deviation of all weights at the start, as GPT-2 and BERT choose it.
const WEIGHT_DEVIATION: f32 = 0.02;

/// What a forbidden score gets added: large enough that its softmax is exactly zero.
const FORBIDDEN: f32 = -1e9;

/// What the blocks of one network have in common.
struct Block {
    heads: usize,
    width: usize,
    hidden: usize,
    bias: bool,
    dropout: f64,
    /// Standard deviation of the two projections that end on the residual path.
    residual_deviation: f32,
}

fn normal(deviation: f32) -> Option<Init> {
    Some(Init::Normal(deviation))
}

/// `x [N, T, width] -> [N, T, width]`; `mask` is added to the scores `[N, heads, T, T]`.
fn attention(net: &mut Net, x: ValueId, layer: &str, block: &Block, mask: Option<ValueId>) -> Result<ValueId, OpError> {
    let Block { heads, width, .. } = *block;
    if heads == 0 || width % heads != 0 {
        return Err(OpError::shape(format!("a width of {width} does not divide into {heads} heads")));
    }
    let head = width / heads;
    let qkv = net.linear(x, &format!("{layer}.qkv"), 3 * width, block.bias, normal(WEIGHT_DEVIATION))?;
    let sizes = net.ints(&[width as i64; 3])?;
    let parts = net.graph.op_n("", "Split", &[Some(qkv), Some(sizes)], [("axis", (-1i64).into())], 3)?;
    let by_head = net.ints(&[0, 0, heads as i64, head as i64])?;
    let mut split = |part: ValueId, permutation: [i64; 4]| -> Result<ValueId, OpError> {
        let part = net.op("Reshape", &[part, by_head], [])?;
        net.op("Transpose", &[part], [("perm", permutation.into())])
    };
    let q = split(parts[0], [0, 2, 1, 3])?;
    let k_transposed = split(parts[1], [0, 2, 3, 1])?;
    let v = split(parts[2], [0, 2, 1, 3])?;
    let scores = net.op("MatMul", &[q, k_transposed], [])?;
    let scale = net.literal(Tensor::scalar(1.0 / (head as f32).sqrt()))?;
    let mut scores = net.op("Mul", &[scores, scale], [])?;
    if let Some(mask) = mask {
        scores = net.op("Add", &[scores, mask], [])?;
    }
    let weights = net.op("Softmax", &[scores], [("axis", (-1i64).into())])?;
    let weights = net.dropout(weights, block.dropout)?;
    let mixed = net.op("MatMul", &[weights, v], [])?;
    let mixed = net.op("Transpose", &[mixed], [("perm", [0i64, 2, 1, 3].into())])?;
    let joined = net.ints(&[0, 0, width as i64])?;
    let mixed = net.op("Reshape", &[mixed, joined], [])?;
    let out = net.linear(mixed, &format!("{layer}.proj"), width, block.bias, normal(block.residual_deviation))?;
    net.dropout(out, block.dropout)
}

fn feed_forward(net: &mut Net, x: ValueId, layer: &str, block: &Block) -> Result<ValueId, OpError> {
    let hidden = net.linear(x, &format!("{layer}.fc"), block.hidden, block.bias, normal(WEIGHT_DEVIATION))?;
    let hidden = net.op("Gelu", &[hidden], [])?;
    let out =
        net.linear(hidden, &format!("{layer}.proj"), block.width, block.bias, normal(block.residual_deviation))?;
    net.dropout(out, block.dropout)
}

/// A block that normalises before each part (GPT-2, ViT).
fn block_norm_first(
    net: &mut Net,
    x: ValueId,
    layer: &str,
    block: &Block,
    mask: Option<ValueId>,
    epsilon: f32,
) -> Result<ValueId, OpError> {
    let normed = net.layer_norm(x, &format!("{layer}.ln_1"), epsilon, block.bias)?;
    let part = attention(net, normed, &format!("{layer}.attn"), block, mask)?;
    let x = net.op("Add", &[x, part], [])?;
    let normed = net.layer_norm(x, &format!("{layer}.ln_2"), epsilon, block.bias)?;
    let part = feed_forward(net, normed, &format!("{layer}.mlp"), block)?;
    net.op("Add", &[x, part], [])
}

/// The first `length` rows of a table `[rows, width]`, where `length` is axis 1 of `tokens`.
fn positions(net: &mut Net, table: ValueId, tokens: ValueId) -> Result<ValueId, OpError> {
    let length = net.op("Shape", &[tokens], [("start", 1i64.into()), ("end", 2i64.into())])?;
    let (zero, axis) = (net.ints(&[0])?, net.ints(&[0])?);
    let sliced = net.op("Slice", &[table, zero, length, axis], [])?;
    let width = net.graph.shape(table).and_then(|s| s.get(1)).cloned().unwrap_or(Dim::Unknown);
    let rows = token_count(net, tokens);
    net.declare(sliced, vec![rows, width]);
    Ok(sliced)
}

/// The size of axis 1 of `tokens`. Inference cannot tell that a slice of so many rows is not cut short by the table's
/// end; where it is, the sum that reads it fails.
fn token_count(net: &Net, tokens: ValueId) -> Dim {
    net.graph.shape(tokens).and_then(|s| s.get(1)).cloned().unwrap_or(Dim::Unknown)
}

pub(super) fn gpt(options: &Options, key: Key) -> Result<Graph, OpError> {
    let (context, layers, width) = (options.integer("context"), options.integer("layers"), options.integer("width"));
    let block = Block {
        heads: options.integer("heads"),
        width,
        hidden: 4 * width,
        bias: options.flag("bias"),
        dropout: options.float("dropout"),
        // GPT-2 scales by the number of residual additions, two a layer.
        residual_deviation: WEIGHT_DEVIATION / (2.0 * layers as f32).sqrt(),
    };
    let mut net = Net::new(key);
    let tokens = net.input("tokens", DType::I64, vec!["N".into(), "T".into()])?;
    let wte = net.parameter("wte.weight", &[options.integer("vocabulary"), width], Init::Normal(WEIGHT_DEVIATION))?;
    let wpe = net.parameter("wpe.weight", &[context, width], Init::Normal(WEIGHT_DEVIATION))?;
    let embedded = net.op("Gather", &[wte, tokens], [])?;
    let at = positions(&mut net, wpe, tokens)?;
    let x = net.op("Add", &[embedded, at], [])?;
    let mut x = net.dropout(x, block.dropout)?;
    let mask = causal_mask(&mut net, context, tokens)?;
    for i in 0..layers {
        x = block_norm_first(&mut net, x, &format!("h.{i}"), &block, Some(mask), 1e-5)?;
    }
    let x = net.layer_norm(x, "ln_f", 1e-5, block.bias)?;
    // Input and output embedding are one table (Press and Wolf, 2016).
    let head = net.op("Transpose", &[wte], [("perm", [1i64, 0].into())])?;
    let logits = net.op("MatMul", &[x, head], [])?;
    net.output("logits", logits)?;
    Ok(net.graph)
}

/// `[T, T]`: zero where a token may look, [`FORBIDDEN`] where it would look ahead.
fn causal_mask(net: &mut Net, context: usize, tokens: ValueId) -> Result<ValueId, OpError> {
    let mask: Vec<f32> =
        (0..context * context).map(|i| if i % context > i / context { FORBIDDEN } else { 0.0 }).collect();
    let full = net.literal(Tensor::new(&[context, context], &mask)?)?;
    let length = net.op("Shape", &[tokens], [("start", 1i64.into()), ("end", 2i64.into())])?;
    let ends = net.op("Concat", &[length, length], [("axis", 0i64.into())])?;
    let (starts, axes) = (net.ints(&[0, 0])?, net.ints(&[0, 1])?);
    let sliced = net.op("Slice", &[full, starts, ends, axes], [])?;
    let count = token_count(net, tokens);
    net.declare(sliced, vec![count.clone(), count]);
    Ok(sliced)
}

pub(super) fn bert(options: &Options, key: Key) -> Result<Graph, OpError> {
    let width = options.integer("width");
    let block = Block {
        heads: options.integer("heads"),
        width,
        hidden: options.integer("hidden"),
        bias: true,
        dropout: options.float("dropout"),
        residual_deviation: WEIGHT_DEVIATION,
    };
    const EPSILON: f32 = 1e-12;
    let mut net = Net::new(key);
    let tokens_shape: Vec<Dim> = vec!["N".into(), "T".into()];
    let ids = net.input("input_ids", DType::I64, tokens_shape.clone())?;
    let attended = net.input("attention_mask", DType::I64, tokens_shape.clone())?;
    let types = net.input("token_type_ids", DType::I64, tokens_shape)?;
    let table = |net: &mut Net, name: &str, rows: usize| {
        net.parameter(&format!("embeddings.{name}.weight"), &[rows, width], Init::Normal(WEIGHT_DEVIATION))
    };
    let words = table(&mut net, "word", options.integer("vocabulary"))?;
    let places = table(&mut net, "position", options.integer("context"))?;
    let kinds = table(&mut net, "token_type", options.integer("types"))?;
    let words = net.op("Gather", &[words, ids], [])?;
    let kinds = net.op("Gather", &[kinds, types], [])?;
    let places = positions(&mut net, places, ids)?;
    let x = net.op("Add", &[words, kinds], [])?;
    let x = net.op("Add", &[x, places], [])?;
    let x = net.layer_norm(x, "embeddings.norm", EPSILON, true)?;
    let mut x = net.dropout(x, block.dropout)?;
    let mask = padding_mask(&mut net, attended)?;
    for i in 0..options.integer("layers") {
        let layer = format!("encoder.{i}");
        let part = attention(&mut net, x, &format!("{layer}.attn"), &block, Some(mask))?;
        let sum = net.op("Add", &[x, part], [])?;
        x = net.layer_norm(sum, &format!("{layer}.attn.norm"), EPSILON, true)?;
        let part = feed_forward(&mut net, x, &format!("{layer}.mlp"), &block)?;
        let sum = net.op("Add", &[x, part], [])?;
        x = net.layer_norm(sum, &format!("{layer}.mlp.norm"), EPSILON, true)?;
    }
    let first = first_token(&mut net, x)?;
    let pooled = net.linear(first, "pooler", width, true, normal(WEIGHT_DEVIATION))?;
    let pooled = net.op("Tanh", &[pooled], [])?;
    net.output("last_hidden_state", x)?;
    net.output("pooler_output", pooled)?;
    Ok(net.graph)
}

/// `[N, T]` of ones and zeros to `[N, 1, 1, T]` of zero and [`FORBIDDEN`].
fn padding_mask(net: &mut Net, attended: ValueId) -> Result<ValueId, OpError> {
    let axes = net.ints(&[1, 2])?;
    let mask = net.op("Unsqueeze", &[attended, axes], [])?;
    let mask = net.op("Cast", &[mask], [("to", (DType::F32 as i64).into())])?;
    let one = net.literal(Tensor::scalar(1f32))?;
    let absent = net.op("Sub", &[one, mask], [])?;
    let forbidden = net.literal(Tensor::scalar(FORBIDDEN))?;
    net.op("Mul", &[absent, forbidden], [])
}

/// `[N, T, width] -> [N, width]`.
fn first_token(net: &mut Net, x: ValueId) -> Result<ValueId, OpError> {
    let zero = net.literal(Tensor::scalar(0i64))?;
    net.op("Gather", &[x, zero], [("axis", 1i64.into())])
}

pub(super) fn vit(options: &Options, key: Key) -> Result<Graph, OpError> {
    let (width, patch, image) = (options.integer("width"), options.integer("patch"), options.integer("image"));
    if patch == 0 || image % patch != 0 {
        return Err(OpError::shape(format!("pictures of {image} do not divide into patches of {patch}")));
    }
    let block = Block {
        heads: options.integer("heads"),
        width,
        hidden: options.integer("hidden"),
        bias: true,
        dropout: options.float("dropout"),
        residual_deviation: WEIGHT_DEVIATION,
    };
    let mut net = Net::new(key);
    let side: Dim = image.into();
    let pictures =
        net.input("image", DType::F32, vec!["N".into(), options.integer("channels").into(), side.clone(), side])?;
    let window = Conv { channels: width, kernel: patch, stride: patch, pad: 0, groups: 1, bias: true };
    let patches = net.conv(pictures, "conv_proj", window)?;
    let count = (image / patch) * (image / patch);
    let flat = net.ints(&[0, width as i64, count as i64])?;
    let patches = net.op("Reshape", &[patches, flat], [])?;
    let patches = net.op("Transpose", &[patches], [("perm", [0i64, 2, 1].into())])?;
    let class = net.parameter("class_token", &[1, 1, width], Init::Constant(0.0))?;
    let batch = net.op("Shape", &[pictures], [("start", 0i64.into()), ("end", 1i64.into())])?;
    let ones = net.ints(&[1, 1])?;
    let shape = net.op("Concat", &[batch, ones], [("axis", 0i64.into())])?;
    let class = net.op("Expand", &[class, shape], [])?;
    let x = net.op("Concat", &[class, patches], [("axis", 1i64.into())])?;
    let places = net.parameter("pos_embedding", &[1, count + 1, width], Init::Normal(WEIGHT_DEVIATION))?;
    let x = net.op("Add", &[x, places], [])?;
    let mut x = net.dropout(x, block.dropout)?;
    for i in 0..options.integer("layers") {
        x = block_norm_first(&mut net, x, &format!("encoder.{i}"), &block, None, 1e-6)?;
    }
    let x = net.layer_norm(x, "ln", 1e-6, true)?;
    let x = first_token(&mut net, x)?;
    let logits = net.linear(x, "head", options.integer("classes"), true, normal(WEIGHT_DEVIATION))?;
    net.output("logits", logits)?;
    Ok(net.graph)
}
