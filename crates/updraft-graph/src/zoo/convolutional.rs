//! Perceptrons and convolutional networks for pictures `[N, channels, image, image]` -> `logits [N, classes]`.

use updraft_base::random::Key;

use crate::dtype::DType;
use crate::graph::{Graph, ValueId};
use crate::op::OpError;
use crate::zoo::net::{Conv, Net};
use crate::zoo::options::{OptionFact, Options, flag, float, integer, integers};

pub(super) const MLP_OPTIONS: &[OptionFact] = &[
    integer("inputs", 784, "input features"),
    integers("hidden", &[256], "width of each hidden layer"),
    integer("classes", 10, "outputs"),
    float("dropout", 0.0, "share of hidden features dropped in training"),
];

pub(super) const SMALL_CNN_OPTIONS: &[OptionFact] = &[
    integer("classes", 10, "outputs"),
    integer("channels", 1, "input channels"),
    integer("image", 28, "input height and width"),
    integers("widths", &[32, 64], "channels of each 3x3 convolution"),
    integer("hidden", 128, "width of the hidden linear layer"),
    integer("pad", 1, "padding of each convolution"),
    flag("batch_norm", true, "normalise after each convolution"),
    flag("pool_each", true, "halve the size after each convolution, not only after the last"),
    float("dropout", 0.0, "share of hidden features dropped in training"),
];

pub(super) const RESNET8_OPTIONS: &[OptionFact] = &[
    integer("classes", 10, "outputs"),
    integer("channels", 3, "input channels"),
    integer("image", 32, "input height and width"),
];

pub(super) const RESNET_OPTIONS: &[OptionFact] = &[
    integer("classes", 1000, "outputs"),
    integer("channels", 3, "input channels"),
    integer("image", 224, "input height and width"),
    float("dropout", 0.0, "share of features dropped before the last layer in training"),
];

fn image_input(net: &mut Net, options: &Options) -> Result<ValueId, OpError> {
    let image = options.integer("image").into();
    net.input(
        "image",
        DType::F32,
        vec!["N".into(), options.integer("channels").into(), image, options.integer("image").into()],
    )
}

pub(super) fn mlp(options: &Options, key: Key) -> Result<Graph, OpError> {
    let mut net = Net::new(key);
    let mut x = net.input("features", DType::F32, vec!["N".into(), options.integer("inputs").into()])?;
    for (i, width) in options.integers("hidden").iter().enumerate() {
        x = net.linear(x, &format!("hidden.{i}"), *width, true, None)?;
        x = net.relu(x)?;
        x = net.dropout(x, options.float("dropout"))?;
    }
    let logits = net.linear(x, "head", options.integer("classes"), true, None)?;
    net.output("logits", logits)?;
    Ok(net.graph)
}

pub(super) fn small_cnn(options: &Options, key: Key) -> Result<Graph, OpError> {
    let mut net = Net::new(key);
    let mut x = image_input(&mut net, options)?;
    let widths = options.integers("widths");
    for (i, width) in widths.iter().enumerate() {
        let norm = options.flag("batch_norm");
        let conv = Conv { pad: options.integer("pad"), bias: !norm, ..Conv::same(*width, 3, 1) };
        x = net.conv(x, &format!("conv{}", i + 1), conv)?;
        if norm {
            x = net.batch_norm(x, &format!("bn{}", i + 1), 1.0)?;
        }
        x = net.relu(x)?;
        if options.flag("pool_each") || i + 1 == widths.len() {
            x = net.max_pool(x, 2, 2, 0)?;
        }
    }
    x = net.op("Flatten", &[x], [])?;
    x = net.linear(x, "fc1", options.integer("hidden"), true, None)?;
    x = net.relu(x)?;
    x = net.dropout(x, options.float("dropout"))?;
    let logits = net.linear(x, "fc2", options.integer("classes"), true, None)?;
    net.output("logits", logits)?;
    Ok(net.graph)
}

pub(super) fn resnet8(options: &Options, key: Key) -> Result<Graph, OpError> {
    let mut net = Net::new(key);
    let x = image_input(&mut net, options)?;
    let with_bias = |channels, kernel, stride| Conv { bias: true, ..Conv::same(channels, kernel, stride) };
    let mut x = conv_norm_relu(&mut net, x, ["conv1", "bn1"], with_bias(16, 3, 1))?;
    for (i, (channels, stride)) in [(16, 1), (32, 2), (64, 2)].into_iter().enumerate() {
        let block = format!("stack{}", i + 1);
        let names = |n: usize| [format!("{block}.conv{n}"), format!("{block}.bn{n}")];
        let [conv1, bn1] = names(1);
        let [conv2, bn2] = names(2);
        let branch = conv_norm_relu(&mut net, x, [&conv1, &bn1], with_bias(channels, 3, stride))?;
        let branch = net.conv(branch, &conv2, with_bias(channels, 3, 1))?;
        let branch = net.batch_norm(branch, &bn2, 1.0)?;
        let shortcut =
            if stride == 1 { x } else { net.conv(x, &format!("{block}.shortcut"), with_bias(channels, 1, stride))? };
        let sum = net.op("Add", &[branch, shortcut], [])?;
        x = net.relu(sum)?;
    }
    let x = net.global_pool(x)?;
    let logits = net.linear(x, "fc", options.integer("classes"), true, None)?;
    net.output("logits", logits)?;
    Ok(net.graph)
}

fn conv_norm_relu(net: &mut Net, x: ValueId, [conv, norm]: [&str; 2], window: Conv) -> Result<ValueId, OpError> {
    let x = net.conv(x, conv, window)?;
    let x = net.batch_norm(x, norm, 1.0)?;
    net.relu(x)
}

pub(super) fn resnet18(options: &Options, key: Key) -> Result<Graph, OpError> {
    resnet(options, key, [2, 2, 2, 2], 1)
}

pub(super) fn resnet50(options: &Options, key: Key) -> Result<Graph, OpError> {
    resnet(options, key, [3, 4, 6, 3], 4)
}

/// Stages of 64, 128, 256 and 512 channels; with `expansion` 4, blocks are bottlenecks of three convolutions.
fn resnet(options: &Options, key: Key, blocks: [usize; 4], expansion: usize) -> Result<Graph, OpError> {
    let mut net = Net::new(key);
    let x = image_input(&mut net, options)?;
    let x = conv_norm_relu(&mut net, x, ["conv1", "bn1"], Conv::same(64, 7, 2))?;
    let mut x = net.max_pool(x, 3, 2, 1)?;
    let mut channels_in = 64;
    for (stage, count) in blocks.into_iter().enumerate() {
        let width = 64 << stage;
        let channels = width * expansion;
        for i in 0..count {
            let block = format!("layer{}.{i}", stage + 1);
            let stride = if stage > 0 && i == 0 { 2 } else { 1 };
            let windows = if expansion == 1 {
                vec![Conv::same(width, 3, stride), Conv::same(width, 3, 1)]
            } else {
                vec![Conv::same(width, 1, 1), Conv::same(width, 3, stride), Conv::same(channels, 1, 1)]
            };
            let mut branch = x;
            for (n, window) in windows.iter().enumerate() {
                branch = net.conv(branch, &format!("{block}.conv{}", n + 1), *window)?;
                branch = net.batch_norm(branch, &format!("{block}.bn{}", n + 1), 1.0)?;
                if n + 1 < windows.len() {
                    branch = net.relu(branch)?;
                }
            }
            let mut shortcut = x;
            if stride != 1 || channels_in != channels {
                shortcut = net.conv(x, &format!("{block}.downsample.0"), Conv::same(channels, 1, stride))?;
                shortcut = net.batch_norm(shortcut, &format!("{block}.downsample.1"), 1.0)?;
            }
            let sum = net.op("Add", &[branch, shortcut], [])?;
            x = net.relu(sum)?;
            channels_in = channels;
        }
    }
    let x = net.global_pool(x)?;
    let x = net.dropout(x, options.float("dropout"))?;
    let logits = net.linear(x, "fc", options.integer("classes"), true, None)?;
    net.output("logits", logits)?;
    Ok(net.graph)
}

/// Expansion, channels, repetitions and first stride of each stage (table 2 of the paper).
const MOBILENET_V2_STAGES: [(usize, usize, usize, usize); 7] =
    [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)];

pub(super) fn mobilenet_v2(options: &Options, key: Key) -> Result<Graph, OpError> {
    let mut net = Net::new(key);
    let x = image_input(&mut net, options)?;
    let mut x = conv_norm_relu6(&mut net, x, "features.0", Conv::same(32, 3, 2))?;
    let mut channels_in = 32;
    let mut index = 1;
    for (expansion, channels, repetitions, first_stride) in MOBILENET_V2_STAGES {
        for i in 0..repetitions {
            let layer = format!("features.{index}.conv");
            let stride = if i == 0 { first_stride } else { 1 };
            let hidden = channels_in * expansion;
            let mut part = 0;
            let mut branch = x;
            if expansion != 1 {
                branch = conv_norm_relu6(&mut net, branch, &format!("{layer}.{part}"), Conv::same(hidden, 1, 1))?;
                part += 1;
            }
            let depthwise = Conv { groups: hidden, ..Conv::same(hidden, 3, stride) };
            branch = conv_norm_relu6(&mut net, branch, &format!("{layer}.{part}"), depthwise)?;
            branch = net.conv(branch, &format!("{layer}.{}", part + 1), Conv::same(channels, 1, 1))?;
            branch = net.batch_norm(branch, &format!("{layer}.{}", part + 2), 1.0)?;
            x = if stride == 1 && channels_in == channels { net.op("Add", &[x, branch], [])? } else { branch };
            channels_in = channels;
            index += 1;
        }
    }
    let x = conv_norm_relu6(&mut net, x, &format!("features.{index}"), Conv::same(1280, 1, 1))?;
    let x = net.global_pool(x)?;
    let x = net.dropout(x, options.float("dropout"))?;
    let logits = net.linear(x, "classifier.1", options.integer("classes"), true, None)?;
    net.output("logits", logits)?;
    Ok(net.graph)
}

fn conv_norm_relu6(net: &mut Net, x: ValueId, layer: &str, window: Conv) -> Result<ValueId, OpError> {
    let x = net.conv(x, &format!("{layer}.0"), window)?;
    let x = net.batch_norm(x, &format!("{layer}.1"), 1.0)?;
    let low = net.literal(crate::Tensor::scalar(0f32))?;
    let high = net.literal(crate::Tensor::scalar(6f32))?;
    net.op("Clip", &[x, low, high], [])
}
