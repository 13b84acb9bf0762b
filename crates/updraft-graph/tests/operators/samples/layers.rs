//! Samples of products, convolutions, pools, normalisations and losses.

use updraft_graph::Tensor;

use super::{Draw, Row, Sample, sample};

/// Matrices `[.., m, k]` and `[.., k, n]` whose batch axes broadcast.
fn matrices(d: &mut Draw) -> Sample {
    let [m, k, n] = [d.size(), d.size(), d.size()];
    let batch = d.any_shape();
    let other = d.stretched(&batch);
    let (a, b) = ([&batch[..], &[m, k]].concat(), [&other[..], &[k, n]].concat());
    sample(vec![d.normal(&a), d.normal(&b)])
}

fn gemm(d: &mut Draw) -> Sample {
    let [m, k, n] = [d.size(), d.size(), d.size()];
    let (ta, tb) = (d.flag(), d.flag());
    let a = if ta { [k, m] } else { [m, k] };
    let b = if tb { [n, k] } else { [k, n] };
    let c = d.stretched(&[m, n]);
    let inputs = vec![d.normal(&a), d.normal(&b), d.normal(&c)];
    let flags = (i64::from(ta), i64::from(tb));
    sample(inputs).with("transA", flags.0).with("transB", flags.1).with("alpha", 0.7).with("beta", 1.3)
}

/// A convolution with random kernel, stride, dilation, pads and groups, large enough for one output at least.
fn convolution(d: &mut Draw) -> Sample {
    let axes = 1 + d.below(2);
    let groups = 1 + d.below(2);
    let (c, m) = (d.size(), d.size());
    let kernel: Vec<usize> = (0..axes).map(|_| 1 + d.below(3)).collect();
    let strides: Vec<i64> = (0..axes).map(|_| 1 + d.below(2) as i64).collect();
    let dilations: Vec<i64> = (0..axes).map(|_| 1 + d.below(2) as i64).collect();
    let pads: Vec<i64> = (0..2 * axes).map(|_| d.below(2) as i64).collect();
    let sizes: Vec<usize> =
        kernel.iter().zip(&dilations).map(|(k, by)| (k - 1) * *by as usize + 1 + d.below(3)).collect();
    let n = d.size();
    let x = d.normal(&[&[n, c * groups][..], &sizes].concat());
    let weight = d.normal(&[&[m * groups, c][..], &kernel].concat());
    let bias = d.normal(&[m * groups]);
    sample(vec![x, weight, bias])
        .with("group", groups as i64)
        .with("strides", strides)
        .with("dilations", dilations)
        .with("pads", pads)
}

fn transposed_convolution(d: &mut Draw) -> Sample {
    let (n, c, m) = (d.size(), d.size(), d.size());
    let sizes = [1 + d.size(), 1 + d.size()];
    let kernel = [1 + d.below(3), 1 + d.below(3)];
    let strides = [1 + d.below(2) as i64, 1 + d.below(2) as i64];
    let x = d.normal(&[&[n, c][..], &sizes].concat());
    let weight = d.normal(&[&[c, m][..], &kernel].concat());
    sample(vec![x, weight, d.normal(&[m])]).with("strides", strides.to_vec())
}

/// A pool's window, no wider than the image.
fn pool(d: &mut Draw, make: fn(&mut Draw, &[usize]) -> Tensor) -> Sample {
    let (n, c) = (d.size(), d.size());
    let kernel = [1 + d.below(3), 1 + d.below(3)];
    let sizes = [kernel[0] + d.below(3), kernel[1] + d.below(3)];
    let strides = [1 + d.below(2) as i64, 1 + d.below(2) as i64];
    // Pads stay smaller than the window.
    let pads: Vec<i64> = (0..4).map(|end| d.below(kernel[end % 2]).min(1) as i64).collect();
    let x = make(d, &[&[n, c][..], &sizes].concat());
    sample(vec![x]).with("kernel_shape", kernel.map(|k| k as i64)).with("strides", strides.to_vec()).with("pads", pads)
}

fn image(d: &mut Draw, make: fn(&mut Draw, &[usize]) -> Tensor) -> Sample {
    let shape = d.shape(4);
    sample(vec![make(d, &shape)])
}

/// An input `[N, C, ...]` with so many elements a channel that their variance is far from zero, and `vectors` vectors
/// `[C]`, the last of them positive.
fn normalized(d: &mut Draw, vectors: usize) -> Sample {
    let c = d.size();
    let shape = [2 + d.below(2), c, 2 + d.below(2), 2];
    let mut inputs = vec![d.normal(&shape)];
    for vector in 0..vectors {
        let made = if vector == 3 { d.between(&[c], 0.5, 1.5) } else { d.normal(&[c]) };
        inputs.push(made);
    }
    sample(inputs).with("epsilon", 0.01)
}

/// Rows of at least three elements, with as many scales (and biases).
fn rows(d: &mut Draw, vectors: usize) -> Sample {
    let (n, s, width) = (d.size(), d.size(), 3 + d.below(3));
    let mut inputs = vec![d.normal(&[n, s, width])];
    for _ in 0..vectors {
        inputs.push(d.normal(&[width]));
    }
    sample(inputs).with("epsilon", 0.01).with("axis", -1).with("stash_type", 11)
}

fn along_axis(d: &mut Draw) -> Sample {
    let shape = d.any_shape();
    let axis = d.below(shape.len()) as i64;
    sample(vec![d.normal(&shape)]).with("axis", axis)
}

/// Scores `[N, C, d]` and labels `[N, d]`, of which one kind is ignored.
fn labelled(d: &mut Draw, weighted: bool) -> Sample {
    let (n, c, length) = (1 + d.size(), 2 + d.below(3), d.size());
    let scores = d.normal(&[n, c, length]);
    let mut labels: Vec<i64> = (0..n * length).map(|_| d.below(c) as i64).collect();
    labels[0] = 0;
    let mut inputs = vec![scores, Tensor::new(&[n, length], &labels).unwrap()];
    if weighted {
        inputs.push(d.between(&[c], 0.5, 1.5));
    }
    let made = sample(inputs).with("ignore_index", 1);
    if weighted { made.fixed(&[2]) } else { made }
}

fn reduced_loss(d: &mut Draw) -> Sample {
    let weighted = d.flag();
    let reduction = ["mean", "sum", "none"][d.below(3)];
    labelled(d, weighted).with("reduction", reduction)
}

pub(super) const ROWS: &[Row] = &[
    Row("MatMul", matrices),
    Row("Gemm", gemm),
    Row("Einsum", |d| {
        let [b, i, j, k] = [d.size(), d.size(), d.size(), d.size()];
        let (equation, shapes): (&str, &[&[usize]]) = match d.below(4) {
            0 => ("ij,jk->ik", &[&[i, j], &[j, k]]),
            1 => ("bij,bkj->bik", &[&[b, i, j], &[b, k, j]]),
            2 => ("ij->j", &[&[i, j]]),
            _ => ("i,i->", &[&[i], &[i]]),
        };
        sample(shapes.iter().map(|shape| d.normal(shape)).collect()).with("equation", equation)
    }),
    Row("Conv", convolution),
    Row("ConvTranspose", transposed_convolution),
    Row("MaxPool", |d| pool(d, Draw::distinct)),
    Row("AveragePool", |d| {
        let include = i64::from(d.flag());
        pool(d, Draw::normal).with("count_include_pad", include)
    }),
    Row("GlobalMaxPool", |d| image(d, Draw::distinct)),
    Row("GlobalAveragePool", |d| image(d, Draw::normal)),
    Row("BatchNormalization", |d| normalized(d, 4)),
    Row("own:BatchNormalizationTraining", |d| normalized(d, 4).fixed(&[3, 4]).outputs(5).counted(&[0])),
    Row("InstanceNormalization", |d| normalized(d, 2)),
    Row("GroupNormalization", |d| {
        let made = normalized(d, 2);
        let channels = made.inputs[1].as_ref().map_or(1, Tensor::len);
        let groups = if channels.is_multiple_of(2) { 2 } else { 1 };
        made.with("num_groups", groups).with("stash_type", 11)
    }),
    Row("LayerNormalization", |d| rows(d, 2).outputs(3).counted(&[0])),
    Row("RMSNormalization", |d| rows(d, 1)),
    Row("LpNormalization", |d| {
        let shape = d.shape(2);
        let p = 1 + d.below(2) as i64;
        let x = d.away_from(&shape, &[0.0, 0.2, -0.2]);
        sample(vec![x]).with("axis", 1).with("p", p)
    }),
    Row("Softmax", along_axis),
    Row("LogSoftmax", along_axis),
    Row("NegativeLogLikelihoodLoss", reduced_loss),
    Row("SoftmaxCrossEntropyLoss", reduced_loss),
    Row("own:CrossEntropyLoss", |d| labelled(d, false).with("label_smoothing", 0.1).outputs(2).counted(&[0])),
    Row("RotaryEmbedding", |d| {
        let (n, heads, s, half) = (d.size(), d.size(), d.size(), d.size());
        let interleaved = i64::from(d.flag());
        let inputs = vec![d.normal(&[n, heads, s, 2 * half]), d.normal(&[n, s, half]), d.normal(&[n, s, half])];
        sample(inputs).fixed(&[1, 2]).with("interleaved", interleaved)
    }),
];
