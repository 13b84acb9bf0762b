//! Layers whose weights can be rounded with a look at their inputs, as matrices `[out, in]`.

use updraft_base::random::{Key, Permutation};
use updraft_graph::op::OpError;
use updraft_graph::op::window::{Window, WindowSpec};
use updraft_graph::{DType, Graph, Node, NodeId, Tensor, TensorError};

use crate::quantize::rounding::RoundingError;
use crate::quantize::{Quantizer, RoundedWeights};
use crate::rewrite::constant;
use crate::{PassError, Refusal};

/// A layer of constant weights: a matrix product, or a convolution, which is a product with the rows of its windows.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// The node's label.
    pub node: String,
    /// The initializer that holds the weights.
    pub weights: String,
    /// The value that the layer reads.
    pub input: String,
    /// The node, in the graph that the layer was found in.
    pub id: NodeId,
    form: Form,
    outputs: usize,
    columns: usize,
    groups: usize,
}

#[derive(Debug, Clone, PartialEq)]
enum Form {
    /// A product with weights `[out, in]`, or `[in, out]`.
    Product { inputs_first: bool },
    /// A convolution with weights `[out, in / groups, ...]`.
    Conv(WindowSpec),
}

/// The layers of a graph in execution order, and the nodes with constant weights that are none, with the reason.
pub fn layers(graph: &Graph) -> Result<(Vec<Layer>, Vec<Refusal>), PassError> {
    let (mut layers, mut refusals): (Vec<Layer>, Vec<Refusal>) = (Vec::new(), Vec::new());
    for id in graph.order()? {
        let node = graph.node(id);
        let is_kind = matches!(node.op.as_str(), "Conv" | "ConvTranspose" | "Gemm" | "MatMul");
        if !is_kind || !node.domain.is_empty() || node.inputs.iter().flatten().all(|v| constant(graph, *v).is_none()) {
            continue;
        }
        let shared = |layer: &Layer| layers.iter().find(|other| other.weights == layer.weights).map(|o| o.node.clone());
        let found = Layer::of(graph, id).and_then(|layer| match shared(&layer) {
            Some(other) => Err(format!("its weights are those of {other} too")),
            None => Ok(layer),
        });
        match found {
            Ok(layer) => layers.push(layer),
            Err(reason) => refusals.push(Refusal { node: node.label(graph), reason }),
        }
    }
    Ok((layers, refusals))
}

impl Layer {
    /// The layer that a node is, or why it is none.
    pub fn of(graph: &Graph, id: NodeId) -> Result<Layer, String> {
        let node = graph.node(id);
        let [Some(x), Some(w), ..] = node.inputs[..] else { return Err("it has no weights".to_owned()) };
        let Some(weights) = constant(graph, w) else { return Err("its weights are not constant".to_owned()) };
        if weights.dtype() != DType::F32 {
            return Err(format!("its weights are {}, expected f32", weights.dtype()));
        }
        if constant(graph, x).is_some() {
            return Err("it reads a constant".to_owned());
        }
        let shape = weights.shape();
        if weights.is_empty() {
            return Err("it has no weights".to_owned());
        }
        let (form, outputs, columns, groups) = match (node.op.as_str(), shape) {
            ("MatMul", [columns, outputs]) => (Form::Product { inputs_first: true }, *outputs, *columns, 1),
            ("MatMul", _) => return Err("its weights are not a matrix".to_owned()),
            ("Gemm", [first, second]) => {
                let flag = |name| node.attributes.flag(name, false).map_err(|e| e.to_string());
                if flag("transA")? {
                    return Err("it reads its input transposed".to_owned());
                }
                let inputs_first = !flag("transB")?;
                let (outputs, columns) = if inputs_first { (*second, *first) } else { (*first, *second) };
                (Form::Product { inputs_first }, outputs, columns, 1)
            }
            ("Conv", [outputs, _, kernel @ ..]) if !kernel.is_empty() => conv(node, *outputs, &shape[1..], kernel)?,
            (op, _) => return Err(format!("{op} is not a product with rows of its input")),
        };
        let name = |v| graph.value(v).name.clone();
        Ok(Layer { node: node.label(graph), weights: name(w), input: name(x), id, form, outputs, columns, groups })
    }

    /// How many numbers the layer multiplies its weights with: inputs of a product, elements of a window.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Parts of the outputs that read different rows.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// The axis of the weights along which outputs lie.
    pub fn output_axis(&self) -> usize {
        usize::from(self.form == Form::Product { inputs_first: true })
    }

    /// The axis of the weights along which inputs lie; `None` where they lie along several.
    pub fn input_axis(&self) -> Option<usize> {
        matches!(self.form, Form::Product { .. }).then(|| 1 - self.output_axis())
    }

    /// Whether both read the same rows.
    pub fn reads_rows_of(&self, other: &Layer) -> bool {
        let same_rows = match (&self.form, &other.form) {
            (Form::Product { .. }, Form::Product { .. }) => true,
            (a, b) => a == b && self.groups == other.groups,
        };
        self.input == other.input && self.columns == other.columns && same_rows
    }

    /// Rounds the weights by a method for matrices: `round` gets the number of each group, its matrix `[out, in]` and the
    /// matrix's quantizer.
    pub fn round(
        &self,
        weights: &Tensor,
        quantizer: &Quantizer,
        mut round: impl FnMut(usize, &Tensor, &Quantizer) -> Result<RoundedWeights, RoundingError>,
    ) -> Result<RoundedWeights, RoundingError> {
        let misfit = || RoundingError::Shape { found: weights.shape().to_vec(), expected: Some(self.columns) };
        let inputs_first = self.output_axis() == 1;
        let is_matrix = weights.rank() == 2;
        if weights.len() != self.outputs * self.columns {
            return Err(misfit());
        }
        let (matrix, of_matrix) = if inputs_first {
            let of_matrix = turned(quantizer, [self.columns, self.outputs]).ok_or_else(misfit)?;
            (transposed(weights, self.columns, self.outputs)?, of_matrix)
        } else {
            if quantizer.axis.is_some_and(|axis| axis > 0 && !is_matrix) {
                return Err(misfit());
            }
            (weights.reshaped(&[self.outputs, self.columns])?, quantizer.clone())
        };
        let per_group = self.outputs / self.groups;
        let mut codes: Vec<i32> = Vec::with_capacity(weights.len());
        let mut made = Quantizer { scales: Vec::new(), zero_points: Vec::new(), ..of_matrix.clone() };
        for g in 0..self.groups {
            let bytes = &matrix.bytes()[g * per_group * self.columns * 4..][..per_group * self.columns * 4];
            let part = Tensor::from_bytes(DType::F32, &[per_group, self.columns], bytes)?;
            let rounded = round(g, &part, &rows_of(&of_matrix, g, self.groups))?;
            codes.extend(rounded.codes.cast(DType::I32)?.as_slice::<i32>()?);
            // One scale of all groups stays one.
            if of_matrix.axis.is_some() || g == 0 {
                made.scales.extend(rounded.quantizer.scales);
                made.zero_points.extend(rounded.quantizer.zero_points);
            }
        }
        let codes = Tensor::new(&[self.outputs, self.columns], &codes)?;
        let (codes, quantizer) = if inputs_first {
            let quantizer = turned(&made, [self.outputs, self.columns]).ok_or_else(misfit)?;
            (transposed_codes(&codes, self.outputs, self.columns)?, quantizer)
        } else {
            (codes.reshaped(weights.shape())?, made)
        };
        let codes = codes.cast(quantizer.dtype)?;
        Ok(RoundedWeights { quantizer, codes })
    }

    /// The rows that each group of the layer multiplies its weights with, for `samples` samples of a batch of the
    /// layer's input: all of them, or `rows_max` drawn by `key`.
    pub fn rows(&self, x: &Tensor, samples: Samples, rows_max: usize, key: &Key) -> Result<Vec<Vec<f32>>, OpError> {
        let values = x.as_slice::<f32>()?;
        match &self.form {
            Form::Product { .. } => {
                if x.shape().last() != Some(&self.columns) {
                    return Err(OpError::shape(format!("{:?}, expected rows of {}", x.shape(), self.columns)));
                }
                let count = samples.share(x).saturating_mul(values.len() / self.columns.max(1) / x.shape()[0].max(1));
                let rows = drawn(count.min(values.len() / self.columns), rows_max, key);
                Ok(vec![rows.flat_map(|r| values[r * self.columns..][..self.columns].iter().copied()).collect()])
            }
            Form::Conv(spec) => self.window_rows(x, values, spec, samples.share(x), rows_max, key),
        }
    }

    fn window_rows(
        &self,
        x: &Tensor,
        values: &[f32],
        spec: &WindowSpec,
        samples: usize,
        rows_max: usize,
        key: &Key,
    ) -> Result<Vec<Vec<f32>>, OpError> {
        let [_, channels, sizes @ ..] = x.shape() else {
            return Err(OpError::shape(format!("{:?}, expected [N, C, ...]", x.shape())));
        };
        let window = spec.resolve(sizes)?;
        let (taps, windows, plane) = (window.taps(), window.output_len(), window.input_len());
        if channels * taps != self.columns * self.groups {
            return Err(OpError::shape(format!("{channels} channels, expected {}", self.columns * self.groups / taps)));
        }
        let per_group = channels / self.groups;
        let mut rows: Vec<Vec<f32>> = vec![Vec::new(); self.groups];
        let mut offsets = vec![None; taps];
        for place in drawn(samples * windows, rows_max, key) {
            let (sample, at) = (place / windows, place % windows);
            for (tap, offset) in offsets.iter_mut().enumerate() {
                *offset = input_offset(&window, at, tap);
            }
            for channel in 0..*channels {
                let image = &values[(sample * channels + channel) * plane..][..plane];
                let row = &mut rows[channel / per_group];
                row.extend(offsets.iter().map(|offset| offset.map_or(0.0, |offset| image[offset])));
            }
        }
        Ok(rows)
    }
}

/// The samples of a batch that are no padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Samples {
    /// How many there are.
    pub real: usize,
    /// How many there are with padding.
    pub padded: usize,
}

impl Samples {
    /// The leading indices of a tensor that belong to real samples: a value may lay its samples out in several
    /// indices each, and one that is no multiple of the batch belongs to no sample in particular.
    fn share(self, x: &Tensor) -> usize {
        let leading = x.shape().first().copied().unwrap_or(1);
        if self.padded == 0 || !leading.is_multiple_of(self.padded) {
            return leading;
        }
        leading / self.padded * self.real.min(self.padded)
    }
}

/// `count` indices in order, or as many as are wanted at most, drawn without repeating.
fn drawn(count: usize, most: usize, key: &Key) -> Box<dyn Iterator<Item = usize>> {
    if count <= most {
        return Box::new(0..count);
    }
    let order = Permutation::new(key, count as u64);
    Box::new((0..most as u64).map(move |i| order.get(i) as usize))
}

/// Where a tap of window `at` reads; `None` in the padding.
fn input_offset(window: &Window, mut at: usize, mut tap: usize) -> Option<usize> {
    let (mut offset, mut stride) = (0, 1);
    for axis in (0..window.rank()).rev() {
        let (output, size) = (at % window.output[axis], window.kernel[axis]);
        offset += window.input_at(axis, output, tap % size)? * stride;
        stride *= window.input[axis];
        at /= window.output[axis];
        tap /= size;
    }
    Some(offset)
}

fn conv(node: &Node, outputs: usize, inner: &[usize], kernel: &[usize]) -> Result<(Form, usize, usize, usize), String> {
    let groups = node.attributes.int("group", 1).map_err(|e| e.to_string())?;
    let groups = usize::try_from(groups).ok().filter(|g| *g > 0 && outputs.is_multiple_of(*g));
    let groups = groups.ok_or_else(|| "its outputs do not divide into its groups".to_owned())?;
    let spec = WindowSpec::of_conv(&node.attributes, kernel).map_err(|e| e.to_string())?;
    Ok((Form::Conv(spec), outputs, inner.iter().product(), groups))
}

fn transposed(matrix: &Tensor, rows: usize, columns: usize) -> Result<Tensor, TensorError> {
    Tensor::new(&[columns, rows], &transposed_elements(matrix.as_slice::<f32>()?, rows, columns))
}

fn transposed_codes(codes: &Tensor, rows: usize, columns: usize) -> Result<Tensor, TensorError> {
    Tensor::new(&[columns, rows], &transposed_elements(codes.as_slice::<i32>()?, rows, columns))
}

fn transposed_elements<T: Copy>(elements: &[T], rows: usize, columns: usize) -> Vec<T> {
    (0..rows * columns).map(|i| elements[i % rows * columns + i / rows]).collect()
}

/// The quantizer of a matrix of this shape as one of its transpose.
fn turned(quantizer: &Quantizer, shape: [usize; 2]) -> Option<Quantizer> {
    let Some(axis) = quantizer.axis else { return Some(quantizer.clone()) };
    let mut turned = Quantizer { axis: Some(1usize.checked_sub(axis)?), ..quantizer.clone() };
    if let Some(block) = quantizer.block {
        let mut sizes = shape;
        sizes[axis] = sizes[axis].div_ceil(block.max(1));
        if [quantizer.scales.len(), quantizer.zero_points.len()] != [sizes[0] * sizes[1]; 2] {
            return None;
        }
        turned.scales = transposed_elements(&quantizer.scales, sizes[0], sizes[1]);
        turned.zero_points = transposed_elements(&quantizer.zero_points, sizes[0], sizes[1]);
    }
    Some(turned)
}

/// The quantizer of group `g` of a matrix whose rows are as many groups. Scales that are not of one row each are those of
/// a single group, or of all.
fn rows_of(quantizer: &Quantizer, g: usize, groups: usize) -> Quantizer {
    let mut part = quantizer.clone();
    if quantizer.axis.is_some() {
        let count = quantizer.scales.len() / groups;
        part.scales = quantizer.scales[g * count..][..count].to_vec();
        part.zero_points = quantizer.zero_points[g * count..][..count].to_vec();
    }
    part
}

#[cfg(test)]
mod tests {
    use updraft_base::random::fill_normal;
    use updraft_graph::ValueType;
    use updraft_graph::eval::evaluate;

    use super::*;
    use crate::quantize::WeightScale;
    use crate::quantize::rounding::nearest;

    fn normal(seed: u64, shape: &[usize]) -> Tensor {
        let mut values = vec![0f32; shape.iter().product()];
        fill_normal(&Key::new(seed), 0, &mut values);
        Tensor::new(shape, &values).unwrap()
    }

    /// A graph of one layer, and that layer.
    fn one(op: &str, x: &[usize], w: &[usize], attributes: updraft_graph::Attributes) -> (Graph, Layer) {
        let mut graph = Graph::new("layer");
        let shape = x.iter().map(|n| (*n).into()).collect();
        let input = graph.add_input("x", ValueType::tensor(DType::F32, shape)).unwrap();
        let weights = graph.add_constant("w", normal(2, w));
        let y = graph.op(op, &[input, weights], attributes).unwrap();
        graph.push_output(y);
        let (mut layers, refusals) = layers(&graph).unwrap();
        assert_eq!(refusals, []);
        (graph, layers.remove(0))
    }

    fn cases() -> Vec<(&'static str, Vec<usize>, Vec<usize>, updraft_graph::Attributes)> {
        let conv = |group: i64, strides: [i64; 2], dilations: [i64; 2], pads: [i64; 4]| {
            let strides = ("strides", strides.into());
            [("group", group.into()), strides, ("dilations", dilations.into()), ("pads", pads.into())].into()
        };
        vec![
            ("MatMul", vec![3, 4, 5], vec![5, 7], [].into()),
            ("Gemm", vec![6, 5], vec![5, 7], [].into()),
            ("Gemm", vec![6, 5], vec![7, 5], [("transB", 1i64.into())].into()),
            ("Conv", vec![2, 3, 6, 7], vec![4, 3, 3, 2], conv(1, [2, 1], [1, 2], [1, 0, 2, 1])),
            ("Conv", vec![2, 6, 5, 5], vec![9, 2, 3, 3], conv(3, [1, 1], [1, 1], [1, 1, 1, 1])),
            ("Conv", vec![2, 4, 5, 5], vec![4, 1, 3, 3], conv(4, [1, 2], [1, 1], [0, 1, 1, 0])),
        ]
    }

    #[test]
    fn a_layer_is_the_product_of_its_rows_with_its_matrix() {
        for (op, x, w, attributes) in cases() {
            let (graph, layer) = one(op, &x, &w, attributes);
            let x = normal(3, &x);
            let y = evaluate(&graph, &[("x".to_owned(), x.clone())].into()).unwrap().remove(0);
            let samples = Samples { real: x.shape()[0], padded: x.shape()[0] };
            let rows = layer.rows(&x, samples, usize::MAX, &Key::new(0)).unwrap();
            let weights = graph.value(graph.find("w").unwrap()).constant().unwrap();
            // Rounding sees the matrix of each group.
            let mut matrices = Vec::new();
            let quantizer = Quantizer::of_weights(weights, DType::I8, None, WeightScale::MaxAbs).unwrap();
            let round = |_, matrix: &Tensor, quantizer: &Quantizer| {
                matrices.push(matrix.clone());
                nearest(matrix, quantizer)
            };
            layer.round(weights, &quantizer, round).unwrap();
            let mut products = Vec::new();
            for (rows, matrix) in rows.iter().zip(&matrices) {
                for row in rows.chunks_exact(layer.columns()) {
                    for w in matrix.as_slice::<f32>().unwrap().chunks_exact(layer.columns()) {
                        products.push(row.iter().zip(w).map(|(x, w)| x * w).sum::<f32>());
                    }
                }
            }
            let sorted = |mut values: Vec<f32>| {
                values.sort_by(f32::total_cmp);
                values
            };
            let (found, expected) = (sorted(products), sorted(y.as_slice::<f32>().unwrap().to_vec()));
            assert_eq!(found.len(), expected.len(), "{op}");
            // Sums of at most 18 products of standard normal numbers, in another order.
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "{op}");
        }
    }

    #[test]
    fn rounding_through_the_matrix_is_rounding_of_the_weights() {
        for (op, x, w, attributes) in cases() {
            let (graph, layer) = one(op, &x, &w, attributes);
            let weights = graph.value(graph.find("w").unwrap()).constant().unwrap();
            let mut quantizers: Vec<Quantizer> = [None, Some(layer.output_axis())]
                .map(|axis| Quantizer::of_weights(weights, DType::I8, axis, WeightScale::MaxAbs).unwrap())
                .into();
            if let Some(axis) = layer.input_axis() {
                quantizers.push(Quantizer::of_blocks(weights, DType::U4, axis, 2, WeightScale::MaxAbs).unwrap());
            }
            for quantizer in quantizers {
                let found = layer.round(weights, &quantizer, |_, m, q| nearest(m, q)).unwrap();
                assert_eq!(found, nearest(weights, &quantizer).unwrap(), "{op}, axis {:?}", quantizer.axis);
            }
        }
    }

    #[test]
    fn padded_samples_are_left_out_and_drawn_rows_do_not_repeat() {
        let (_, layer) = one("MatMul", &[4, 3, 2], &[2, 2], [].into());
        let x = Tensor::new(&[4, 3, 2], &(0..24).map(|i| i as f32).collect::<Vec<_>>()).unwrap();
        let rows = |real, most| layer.rows(&x, Samples { real, padded: 4 }, most, &Key::new(1)).unwrap().remove(0);
        assert_eq!(rows(2, 100), (0..12).map(|i| i as f32).collect::<Vec<_>>());
        let mut firsts: Vec<i32> = rows(3, 5).chunks(2).map(|row| row[0] as i32).collect();
        firsts.sort_unstable();
        firsts.dedup();
        assert!(firsts.len() == 5 && firsts.iter().all(|first| *first < 18));
    }

    #[test]
    fn what_is_no_layer_says_why() {
        let mut graph = Graph::new("two");
        let x = graph.add_input("x", ValueType::tensor(DType::F32, vec![2.into(), 2.into()])).unwrap();
        let w = graph.add_constant("w", normal(1, &[2, 2]));
        let y = graph.op("MatMul", &[x, w], []).unwrap();
        let y = graph.op("MatMul", &[y, w], []).unwrap();
        let y = graph.op("Gemm", &[y, w], [("transA", 1i64.into())]).unwrap();
        let y = graph.op("MatMul", &[w, y], []).unwrap();
        graph.push_output(y);
        let (found, refusals) = layers(&graph).unwrap();
        assert_eq!(found.len(), 1);
        let reasons: Vec<&str> = refusals.iter().map(|r| r.reason.as_str()).collect();
        assert!(reasons[0].starts_with("its weights are those of MatMul -> "), "{reasons:?}");
        assert_eq!(reasons[1..], ["it reads its input transposed", "its weights are not constant"]);
    }
}
