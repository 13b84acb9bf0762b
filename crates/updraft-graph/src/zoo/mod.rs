//! Networks that come with us, built in Rust: no download, weights from a seed.
//!
//! Each entry states its options with defaults, so that a command line and a recipe need not know them. Parameters
//! are initializers, named as PyTorch names them where it has the network; everything else that is constant (masks,
//! scales, axes) is a `Constant` node, so that "the float initializers" are what can be trained, but for the running
//! statistics of batch normalisation.

use updraft_base::random::Key;

use crate::graph::{Graph, ValueId};
use crate::op::OpError;

mod convolutional;
mod net;
mod options;
mod transformer;

pub use options::{OptionFact, Options, OptionsError, Setting};

/// One network and what can be chosen about it.
pub struct Entry {
    /// What users call it.
    pub name: &'static str,
    /// One line: what it is, and where it was published.
    pub summary: &'static str,
    /// What can be chosen.
    pub options: &'static [OptionFact],
    build: fn(&Options, Key) -> Result<Graph, OpError>,
}

impl Entry {
    /// The network, with weights drawn from `seed`. The options must be of this entry
    /// ([`Options::of`]).
    pub fn build(&self, options: &Options, seed: u64) -> Result<Graph, OpError> {
        let mut graph = (self.build)(options, Key::new(seed).child("zoo"))?;
        graph.name = self.name.to_owned();
        Ok(graph)
    }
}

/// Every network.
pub const ENTRIES: &[Entry] = &[
    Entry {
        name: "mlp",
        summary: "multi-layer perceptron: linear layers with ReLU between",
        options: convolutional::MLP_OPTIONS,
        build: convolutional::mlp,
    },
    Entry {
        name: "small-cnn",
        summary: "a few 3x3 convolutions with pooling, then two linear layers",
        options: convolutional::SMALL_CNN_OPTIONS,
        build: convolutional::small_cnn,
    },
    Entry {
        name: "resnet8",
        summary: "the residual network of MLPerf Tiny for 32x32 pictures (Banbury et al., 2021)",
        options: convolutional::RESNET8_OPTIONS,
        build: convolutional::resnet8,
    },
    Entry {
        name: "resnet18",
        summary: "residual network of 18 layers (He et al., 2015)",
        options: convolutional::RESNET_OPTIONS,
        build: convolutional::resnet18,
    },
    Entry {
        name: "resnet50",
        summary: "residual network of 50 layers with bottlenecks, stride in the 3x3 convolution (He et al., 2015)",
        options: convolutional::RESNET_OPTIONS,
        build: convolutional::resnet50,
    },
    Entry {
        name: "mobilenet-v2",
        summary: "inverted residuals with depthwise convolutions (Sandler et al., 2018)",
        options: convolutional::RESNET_OPTIONS,
        build: convolutional::mobilenet_v2,
    },
    Entry {
        name: "vit",
        summary: "vision transformer, by default ViT-B/16 (Dosovitskiy et al., 2020)",
        options: transformer::VIT_OPTIONS,
        build: transformer::vit,
    },
    Entry {
        name: "gpt",
        summary: "decoder-only language model, by default GPT-2 small (Radford et al., 2019)",
        options: transformer::GPT_OPTIONS,
        build: transformer::gpt,
    },
    Entry {
        name: "bert",
        summary: "transformer encoder with pooler, by default BERT-base uncased (Devlin et al., 2018)",
        options: transformer::BERT_OPTIONS,
        build: transformer::bert,
    },
];

/// The network of this name.
pub fn find(name: &str) -> Option<&'static Entry> {
    ENTRIES.iter().find(|e| e.name == name)
}

/// Elements of all parameters: float initializers that are not running statistics, and codes of quantized ones. Scales
/// and zero points are how codes are written, and do not count.
pub fn parameter_count(graph: &Graph) -> u64 {
    let reads = |id: ValueId, index: usize, ops: &[&str]| {
        graph.value(id).consumers().iter().any(|consumer| {
            let node = graph.node(*consumer);
            ops.contains(&node.op.as_str()) && node.inputs.get(index) == Some(&Some(id))
        })
    };
    graph
        .constants()
        .filter(|(id, tensor)| {
            let name = &graph.value(*id).name;
            let is_weight = tensor.dtype().is_float() && !reads(*id, 1, &["QuantizeLinear", "DequantizeLinear"])
                || reads(*id, 0, &["DequantizeLinear"]);
            is_weight && !name.ends_with(".running_mean") && !name.ends_with(".running_var")
        })
        .map(|(_, tensor)| tensor.len() as u64)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    fn built(name: &str, given: &[(&str, Setting)]) -> Graph {
        let entry = find(name).unwrap();
        let given: Vec<_> = given.iter().map(|(n, s)| ((*n).to_owned(), s.clone())).collect();
        entry.build(&Options::of(entry, &given).unwrap(), 0).unwrap()
    }

    #[test]
    fn a_quantized_parameter_counts_by_its_codes() {
        let mut graph = Graph::new("quantized");
        let codes = graph.add_constant("codes", Tensor::new(&[3, 4], &[1i8; 12]).unwrap());
        let scale = graph.add_constant("scale", Tensor::scalar(0.5f32));
        let zero_point = graph.add_constant("zero_point", Tensor::scalar(0i8));
        graph.op("DequantizeLinear", &[codes, scale, zero_point], []).unwrap();
        assert_eq!(parameter_count(&graph), 12);
    }

    #[test]
    fn parameter_counts_are_the_published_ones() {
        let number = Setting::Integer;
        let pytorch_mnist_example =
            [("pad", number(0)), ("batch_norm", Setting::Flag(false)), ("pool_each", Setting::Flag(false))];
        let nano_gpt = [
            ("vocabulary", number(65)),
            ("context", number(64)),
            ("layers", number(4)),
            ("heads", number(4)),
            ("width", number(128)),
            ("bias", Setting::Flag(false)),
        ];
        type Counted<'a> = (&'a str, &'a [(&'a str, Setting)], u64, &'a str);
        let rows: [Counted; 10] = [
            ("mlp", &[], 784 * 256 + 256 + 256 * 10 + 10, "by the formula"),
            ("small-cnn", &pytorch_mnist_example, 1_199_882, "pytorch/examples mnist"),
            // MLPerf Tiny counts the running statistics too: 78,666 with 2 x 240 of them.
            ("resnet8", &[], 78_666 - 480, "mlcommons/tiny image classification"),
            ("resnet18", &[], 11_689_512, "torchvision"),
            ("resnet50", &[], 25_557_032, "torchvision"),
            ("mobilenet-v2", &[], 3_504_872, "torchvision"),
            ("vit", &[], 86_567_656, "torchvision vit_b_16"),
            ("gpt", &[], 124_439_808, "GPT-2 small"),
            ("gpt", &nano_gpt, 804_096, "nanoGPT on one CPU: 0.80M without the 8,192 of positions"),
            ("bert", &[], 109_482_240, "bert-base-uncased"),
        ];
        for (name, given, expected, source) in rows {
            assert_eq!(parameter_count(&built(name, given)), expected, "{name} ({source})");
        }
    }

    #[test]
    fn an_unknown_option_names_the_nearest_one() {
        let entry = find("gpt").unwrap();
        let error = Options::of(entry, &[("contxt".to_owned(), Setting::Integer(8))]).unwrap_err();
        assert!(error.to_string().contains("did you mean \"context\"?"), "{error}");
    }
}
