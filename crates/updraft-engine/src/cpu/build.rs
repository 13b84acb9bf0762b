//! From a node with concrete shapes to a kernel: what builders see and return, and the table of them.

use updraft_graph::op::OpView;
use updraft_graph::{Attributes, DType, OpError, Tensor, UPDRAFT_DOMAIN};

use crate::cpu::kernel::{Kernel, TileKernel};
use crate::cpu::layout::Layout;
use crate::cpu::{batch_norm, conv, copy, dropout, fake_quantize, gather, loss, pool, quantized, reduce, rows, update};

/// One operand of a node being built.
#[derive(Debug, Clone)]
pub(crate) struct Operand<'a> {
    pub(crate) dtype: DType,
    pub(crate) layout: Layout,
    /// The elements, where they never change.
    pub(crate) constant: Option<&'a Tensor>,
}

/// A node with concrete shapes.
pub(crate) struct Build<'a> {
    /// The node and the version of its operator set.
    pub(crate) view: OpView<'a>,
    /// Its inputs; `None` where left out.
    pub(crate) inputs: Vec<Option<Operand<'a>>>,
    /// Element types and shapes of its outputs; `None` where not wanted.
    pub(crate) outputs: Vec<Option<(DType, Vec<usize>)>>,
    /// Inputs that may arrive strided, as asked for with [`strided`](Build::strided).
    pub(crate) strided: Vec<usize>,
}

impl<'a> Build<'a> {
    /// The node's attributes.
    pub(crate) fn attributes(&self) -> &'a Attributes {
        self.view.attributes()
    }

    /// An input that may be left out.
    pub(crate) fn input(&self, index: usize) -> Option<&Operand<'a>> {
        self.inputs.get(index)?.as_ref()
    }

    /// The shape of an input; empty where it is left out.
    pub(crate) fn shape(&self, index: usize) -> &[usize] {
        self.input(index).map_or(&[], |o| &o.layout.shape)
    }

    /// The element type of an input.
    pub(crate) fn dtype(&self, index: usize) -> Option<DType> {
        self.input(index).map(|o| o.dtype)
    }

    /// The elements of an input that never changes.
    pub(crate) fn constant(&self, index: usize) -> Option<&'a Tensor> {
        self.input(index)?.constant
    }

    /// The shape of an output; empty where it is not wanted.
    pub(crate) fn output_shape(&self, index: usize) -> &[usize] {
        self.outputs.get(index).and_then(Option::as_ref).map_or(&[], |(_, shape)| shape)
    }

    /// Whether all inputs and outputs that are there have this element type.
    pub(crate) fn all_are(&self, dtype: DType) -> bool {
        self.inputs.iter().flatten().all(|o| o.dtype == dtype)
            && self.outputs.iter().flatten().all(|(d, _)| *d == dtype)
    }

    /// The layout of an input that the kernel reads as it lies; other inputs are made contiguous first.
    pub(crate) fn strided(&mut self, index: usize) -> Option<Layout> {
        let layout = self.input(index)?.layout.clone();
        if !self.strided.contains(&index) {
            self.strided.push(index);
        }
        // The slice that the kernel gets begins at the first element.
        Some(Layout { offset: 0, ..layout })
    }
}

/// A kernel, and what the plan must know about it.
pub(crate) struct Built {
    pub(crate) run: Run,
    pub(crate) scratch_bytes: usize,
    pub(crate) in_place: Vec<(usize, usize)>,
}

/// The two kinds of kernels.
pub(crate) enum Run {
    Whole(Box<dyn Kernel>),
    Tiled {
        kernel: Box<dyn TileKernel>,
        /// How many leading axes of the output may be cut into tiles.
        axes: usize,
        /// Additions or like work for one output element, for choosing the size of tiles.
        work: usize,
        /// Inputs that the kernel reads in the same units only: they have the same leading axes.
        aligned: Vec<usize>,
        /// Fewest units that are worth a call.
        units_min: usize,
        /// Whether it may share tiles with what makes its inputs.
        joins: bool,
    },
}

impl Built {
    /// A kernel that computes the node whole.
    pub(crate) fn whole(kernel: impl Kernel + 'static) -> Built {
        Built { run: Run::Whole(Box::new(kernel)), scratch_bytes: 0, in_place: Vec::new() }
    }

    /// A kernel that computes any range of the first `axes` axes of its outputs, all of which have these axes, at
    /// `work` additions or so for each element of the first output. The inputs listed in `aligned` have the same
    /// leading axes and are read in the units of the tile only; others must be ready, whole.
    pub(crate) fn tiled(kernel: impl TileKernel + 'static, axes: usize, work: usize, aligned: &[usize]) -> Built {
        let run =
            Run::Tiled { kernel: Box::new(kernel), axes, work, aligned: aligned.to_vec(), units_min: 1, joins: true };
        Built { run, scratch_bytes: 0, in_place: Vec::new() }
    }

    /// Asks for tiles of at least so many units, and to begin a group instead of joining one: for kernels that
    /// prepare something for each call.
    pub(crate) fn heads_group(mut self, units: usize) -> Built {
        if let Run::Tiled { units_min, joins, .. } = &mut self.run {
            *units_min = units;
            *joins = false;
        }
        self
    }

    /// Asks for memory of its own for each worker, aligned to 64 bytes.
    pub(crate) fn scratch(self, bytes: usize) -> Built {
        Built { scratch_bytes: bytes.next_multiple_of(64), ..self }
    }

    /// Lets the plan put an output where an input lies if nobody reads that afterwards. The kernel must then find the
    /// input in the output (the input itself arrives empty): it asks [`Io::has`](crate::cpu::kernel::Io::has).
    pub(crate) fn in_place(mut self, output: usize, input: usize) -> Built {
        self.in_place.push((output, input));
        self
    }
}

/// Makes a kernel for a node, or `None` for a form that it does not cover.
pub(crate) type Builder = fn(&mut Build) -> Result<Option<Built>, OpError>;

/// Domain, operator, builder.
const TABLE: &[(&str, &str, Builder)] = &[
    ("", "AveragePool", pool::average_pool),
    ("", "BatchNormalization", batch_norm::inference),
    ("", "Concat", copy::concat),
    ("", "Conv", conv::build::conv),
    ("", "DynamicQuantizeLinear", quantized::dynamic_quantize),
    ("", "Gather", gather::gather),
    ("", "GlobalAveragePool", pool::global_average),
    ("", "LayerNormalization", rows::layer_norm),
    ("", "LogSoftmax", rows::softmax),
    ("", "MaxPool", pool::max),
    ("", "Pad", copy::pad),
    ("", "ReduceMax", reduce::reduce),
    ("", "ReduceMean", reduce::reduce),
    ("", "ReduceMin", reduce::reduce),
    ("", "ReduceSum", reduce::reduce),
    ("", "RMSNormalization", rows::layer_norm),
    ("", "Softmax", rows::softmax),
    (UPDRAFT_DOMAIN, "AdamUpdate", update::update),
    (UPDRAFT_DOMAIN, "AveragePoolGradient", pool::average_gradient),
    (UPDRAFT_DOMAIN, "BatchNormalizationGradient", batch_norm::gradient),
    (UPDRAFT_DOMAIN, "BatchNormalizationTraining", batch_norm::training),
    (UPDRAFT_DOMAIN, "ConvInputGradient", conv::build::conv_input_gradient),
    (UPDRAFT_DOMAIN, "ConvWeightGradient", conv::build::conv_weight_gradient),
    (UPDRAFT_DOMAIN, "CrossEntropyLoss", loss::loss),
    (UPDRAFT_DOMAIN, "CrossEntropyLossGradient", loss::loss_gradient),
    (UPDRAFT_DOMAIN, "DropoutMask", dropout::mask),
    (UPDRAFT_DOMAIN, "FakeQuantize", fake_quantize::forward),
    (UPDRAFT_DOMAIN, "FakeQuantizeGradient", fake_quantize::backward),
    (UPDRAFT_DOMAIN, "GatherGradient", gather::gather_gradient),
    (UPDRAFT_DOMAIN, "GlobalNorm", update::global_norm),
    (UPDRAFT_DOMAIN, "LayerNormalizationGradient", rows::layer_norm_grad),
    (UPDRAFT_DOMAIN, "LogSoftmaxGradient", rows::softmax),
    (UPDRAFT_DOMAIN, "MaxPoolGradient", pool::max_gradient),
    (UPDRAFT_DOMAIN, "SgdUpdate", update::update),
    (UPDRAFT_DOMAIN, "SoftmaxGradient", rows::softmax),
];

/// The builder of an operator's kernels.
pub(crate) fn find(domain: &str, op: &str) -> Option<Builder> {
    TABLE.iter().find(|(d, o, _)| *d == domain && *o == op).map(|(_, _, builder)| *builder)
}
