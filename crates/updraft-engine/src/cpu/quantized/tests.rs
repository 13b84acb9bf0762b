//! Random shapes against the definition, in exact integers, for every instruction set and several numbers of threads.

use super::dot::DotIsa;
use super::*;
use crate::cpu::conv::ConvGeometry;
use crate::cpu::kernel::Pool;
use proptest::prelude::*;

const ISAS: [DotIsa; 4] = [DotIsa::Portable, DotIsa::Avx2, DotIsa::AvxVnni, DotIsa::Avx512Vnni];

/// One convolution with everything it needs.
#[derive(Debug, Clone)]
struct Case {
    geometry: ConvGeometry,
    layouts: [ActivationLayout; 2],
    input: Bytes,
    weights_signed: bool,
    weight_zero_points: Vec<i32>,
    finish: Finish,
    dynamic: Option<Dynamic>,
    /// Bytes of input and weights: all the greatest or least, or anything.
    extreme: bool,
    salt: u32,
}

/// Numbers that depend on index and salt.
fn numbers(len: usize, salt: u32) -> impl Iterator<Item = u32> {
    (0..len as u32).map(move |i| {
        let mixed = (i.wrapping_mul(2_654_435_761) ^ salt.wrapping_mul(40_503)).wrapping_mul(2_246_822_519);
        (mixed ^ (mixed >> 15)).wrapping_mul(3_266_489_917) >> 8
    })
}

fn value(byte: u8, signed: bool) -> i64 {
    if signed { i64::from(byte as i8) } else { i64::from(byte) }
}

fn index_of(layout: ActivationLayout, [image, channel, position]: [usize; 3], channels: usize, volume: usize) -> usize {
    match layout {
        ActivationLayout::ChannelsFirst => (image * channels + channel) * volume + position,
        ActivationLayout::ChannelsLast => (image * volume + position) * channels + channel,
    }
}

fn each<T: Copy>(values: &[T], channel: usize) -> T {
    values[if values.len() == 1 { 0 } else { channel }]
}

impl Case {
    fn bytes(&self, len: usize, salt: u32, signed: bool) -> Vec<u8> {
        let ends = if signed { [0x80, 0x7f] } else { [0x00, 0xff] };
        numbers(len, salt ^ self.salt)
            .map(|n| if self.extreme { ends[usize::from(n % 16 == 0)] } else { n as u8 })
            .collect()
    }

    /// The sum for an output by its definition.
    fn sum(&self, input: &[u8], weights: &[u8], bias: &[i32], [image, channel, position]: [usize; 3]) -> i64 {
        let g = &self.geometry;
        let (inputs, outputs) = (g.input_channels / g.groups, g.output_channels / g.groups);
        let volume: usize = g.input.iter().product();
        let at = [position / (g.output[1] * g.output[2]), position / g.output[2] % g.output[1], position % g.output[2]];
        let taps: usize = g.kernel.iter().product();
        let zero_point = i64::from(self.dynamic.map_or(self.input.zero_point, |d| d.zero_point));
        let weight_zero_point = i64::from(each(&self.weight_zero_points, channel));
        let mut sum = i64::from(bias.get(channel).copied().unwrap_or(0));
        for tap in 0..taps {
            let k = [tap / (g.kernel[1] * g.kernel[2]), tap / g.kernel[2] % g.kernel[1], tap % g.kernel[2]];
            let from: [usize; 3] = std::array::from_fn(|axis| {
                (at[axis] * g.stride[axis] + k[axis] * g.dilation[axis]).wrapping_sub(g.pad_begin[axis])
            });
            if (0..3).any(|axis| from[axis] >= g.input[axis]) {
                continue;
            }
            let from = (from[0] * g.input[1] + from[1]) * g.input[2] + from[2];
            for i in 0..inputs {
                let from = [image, channel / outputs * inputs + i, from];
                let x = input[index_of(self.layouts[0], from, g.input_channels, volume)];
                let w = weights[(channel * inputs + i) * taps + tap];
                sum += (value(x, self.input.signed) - zero_point) * (value(w, self.weights_signed) - weight_zero_point);
            }
        }
        sum
    }

    /// The bytes of an output element.
    fn finished(&self, sum: i64, channel: usize, residual: u8) -> Vec<u8> {
        let sum = i32::try_from(sum).unwrap();
        let scale = self.dynamic.map_or(1.0, |d| d.scale);
        match &self.finish {
            Finish::Sums => sum.to_ne_bytes().to_vec(),
            Finish::Dequantize { multipliers, bias } => {
                let value = sum as f32 * (each(multipliers, channel) * scale);
                let value = if bias.is_empty() { value } else { value + bias[channel] };
                value.to_ne_bytes().to_vec()
            }
            Finish::Requantize(to) => {
                let mut out = sum as f32 * (each(&to.multipliers, channel) * scale);
                if let Some(added) = &to.residual {
                    if let Some(rounded) = added.rounded {
                        let level = out.round_ties_even().clamp(rounded.min as f32, rounded.max as f32);
                        out = level * rounded.multiplier;
                    }
                    let level = value(residual, added.bytes.signed) - i64::from(added.bytes.zero_point);
                    out += level as f32 * added.multiplier;
                }
                // Saturating, as ONNX has it.
                let byte = f64::from(out.round_ties_even()) + f64::from(to.output.zero_point);
                vec![byte.clamp(f64::from(to.min), f64::from(to.max)) as i32 as u8]
            }
        }
    }

    fn check(&self) {
        let g = &self.geometry;
        let input = self.bytes(g.input_len(), 1, self.input.signed);
        let weights = self.bytes(g.weights_len(), 2, self.weights_signed);
        let bias: Vec<i32> = numbers(g.output_channels, 3).map(|n| n as i32 % 5000 - 2500).collect();
        let residual = self.bytes(g.output_len(), 4, false);
        let volume: usize = g.output.iter().product();
        let size = if matches!(self.finish, Finish::Requantize(_)) { 1 } else { 4 };
        let mut expected = vec![0; g.output_len() * size];
        for image in 0..g.batch {
            for channel in 0..g.output_channels {
                for position in 0..volume {
                    let at = [image, channel, position];
                    let index = index_of(self.layouts[1], at, g.output_channels, volume);
                    let bytes = self.finished(self.sum(&input, &weights, &bias, at), channel, residual[index]);
                    expected[index * size..][..size].copy_from_slice(&bytes);
                }
            }
        }
        for isa in ISAS.into_iter().filter(|isa| isa.is_there()) {
            let conv = QuantizedConv::with_isa(
                isa,
                g.clone(),
                (self.layouts[0], self.input),
                Weights { values: &weights, signed: self.weights_signed, zero_points: &self.weight_zero_points },
                &bias,
                self.finish.clone(),
                self.layouts[1],
            )
            .unwrap();
            for threads in [1, 3] {
                let actual = on_threads(threads, conv.scratch_bytes(), expected.len(), |pool, scratch, output| {
                    let run = Run { input: &input, dynamic: self.dynamic, residual: &residual, scratch, output };
                    conv.run(pool, run);
                });
                if let Some(at) = (0..expected.len()).find(|i| expected[*i] != actual[*i]) {
                    let (got, wanted) = (actual[at], expected[at]);
                    panic!("{isa:?}, {threads} threads: byte {at} is {got}, not {wanted}, of {self:?}");
                }
            }
        }
    }
}

/// Runs with so many threads and scratch that holds rubbish, and returns the output's bytes.
fn on_threads(
    threads: usize,
    scratch_bytes: usize,
    output_bytes: usize,
    work: impl FnOnce(&Pool, &mut [u8], &mut [u8]) + Send,
) -> Vec<u8> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        // Aligned as the engine aligns it, or nearly.
        let mut scratch = vec![0xaau128 << 60; (threads * scratch_bytes).div_ceil(16)];
        let mut output = vec![0x5555_5555u32; output_bytes.div_ceil(4)];
        let scratch: &mut [u8] = bytemuck::cast_slice_mut(&mut scratch);
        let output: &mut [u8] = bytemuck::cast_slice_mut(&mut output);
        work(&Pool { threads }, &mut scratch[..threads * scratch_bytes], &mut output[..output_bytes]);
        output[..output_bytes].to_vec()
    })
}

fn geometry(
    [batch, groups, inputs, outputs]: [usize; 4],
    input: [usize; 3],
    kernel: [usize; 3],
    stride: [usize; 3],
    dilation: [usize; 3],
    pads: [[usize; 2]; 3],
) -> Option<ConvGeometry> {
    let mut output = [0; 3];
    for axis in 0..3 {
        let reach = (kernel[axis] - 1) * dilation[axis] + 1;
        output[axis] = (input[axis] + pads[axis][0] + pads[axis][1]).checked_sub(reach)? / stride[axis] + 1;
    }
    Some(ConvGeometry {
        batch,
        groups,
        input_channels: groups * inputs,
        output_channels: groups * outputs,
        input,
        kernel,
        stride,
        dilation,
        pad_begin: pads.map(|pads| pads[0]),
        output,
    })
}

fn triple(
    depth: std::ops::Range<usize>,
    height: std::ops::Range<usize>,
    width: std::ops::Range<usize>,
) -> impl Strategy<Value = [usize; 3]> {
    (depth, height, width).prop_map(|(depth, height, width)| [depth, height, width])
}

fn geometries() -> impl Strategy<Value = ConvGeometry> {
    let channels = prop_oneof![
        (1..3usize, 1..4usize, 1..20usize, 1..40usize),
        (1..3usize, 1..70usize, Just(1usize), Just(1usize)),
        (1..3usize, Just(1usize), 1..70usize, 1..150usize),
    ];
    let pads = (triple(0..2, 0..3, 0..5), triple(0..2, 0..3, 0..5));
    let window = (triple(1..3, 1..6, 1..6), triple(1..3, 1..4, 1..4), triple(1..3, 1..3, 1..3));
    let pointwise = (Just([1; 3]), prop_oneof![Just([1; 3]), Just([1, 2, 2])], Just([1; 3]));
    let window = prop_oneof![3 => window.boxed(), 1 => pointwise.boxed()];
    (channels, triple(1..3, 1..9, 1..30), window, pads).prop_filter_map(
        "a window larger than its input",
        |((batch, groups, inputs, outputs), input, (kernel, stride, dilation), (begin, end))| {
            let pads = std::array::from_fn(|axis| [begin[axis], end[axis]]);
            geometry([batch, groups, inputs, outputs], input, kernel, stride, dilation, pads)
        },
    )
}

fn bytes() -> impl Strategy<Value = Bytes> {
    (any::<bool>(), any::<u8>()).prop_map(|(signed, byte)| Bytes { signed, zero_point: value(byte, signed) as i32 })
}

/// Multipliers that bring most sums of so many terms into the range of a byte, some of them to ties.
fn multipliers(channels: usize, terms: usize, salt: u32) -> Vec<f32> {
    let scale = 1.0 / (64 * terms.max(1)).next_power_of_two() as f32;
    numbers(channels, salt).map(|n| if n % 3 == 0 { scale } else { scale * (1 + n % 97) as f32 / 50.0 }).collect()
}

fn finish(geometry: &ConvGeometry, salt: u32, kind: usize, output: Bytes, residual: Bytes) -> Finish {
    let terms = geometry.weights_len() / geometry.output_channels;
    let count = if salt.is_multiple_of(3) { 1 } else { geometry.output_channels };
    let multipliers = multipliers(count, terms, salt);
    let least = if output.signed { -128 } else { 0 };
    match kind {
        0 => Finish::Sums,
        1 | 2 => {
            let bias = numbers(geometry.output_channels, salt).map(|n| n as f32 / 1e6 - 8.0).collect();
            Finish::Dequantize { multipliers, bias: if kind == 1 { bias } else { Vec::new() } }
        }
        _ => {
            let added = |rounded| Residual { bytes: residual, multiplier: 0.37, rounded };
            let rounded = Rounded { min: -100, max: 90, multiplier: 0.71 };
            Finish::Requantize(Requantize {
                multipliers,
                output,
                // Relu, or the whole range.
                min: if kind == 3 { output.zero_point } else { least },
                max: least + 255,
                residual: match kind {
                    3 | 4 => None,
                    5 => Some(added(None)),
                    _ => Some(added(Some(rounded))),
                },
            })
        }
    }
}

fn layouts() -> impl Strategy<Value = [ActivationLayout; 2]> {
    let of = |first: bool| if first { ActivationLayout::ChannelsFirst } else { ActivationLayout::ChannelsLast };
    (any::<bool>(), any::<bool>()).prop_map(move |(input, output)| [of(input), of(output)])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn convolutions_are_exact(
        geometry in geometries(),
        layouts in layouts(),
        input in bytes(),
        weights in bytes(),
        symmetric in prop_oneof![3 => Just(true), 1 => Just(false)],
        kind in 0..7usize,
        output in bytes(),
        residual in bytes(),
        extreme in prop_oneof![3 => Just(false), 1 => Just(true)],
        dynamic in prop_oneof![3 => Just(None), 1 => Just(Some(0.625f32))],
        salt in any::<u32>(),
    ) {
        let middle = if weights.signed { 0 } else { 128 };
        let weight_zero_points = match (symmetric, salt % 2) {
            (true, _) => vec![middle],
            (false, 0) => vec![weights.zero_point],
            _ => numbers(geometry.output_channels, salt).map(|n| middle - 128 + (n % 256) as i32).collect(),
        };
        let finish = finish(&geometry, salt, kind, output, residual);
        let lowest = if input.signed { -128 } else { 0 };
        let dynamic = dynamic.map(|scale| Dynamic { zero_point: lowest + (salt % 256) as i32, scale });
        Case {
            geometry,
            layouts,
            input,
            weights_signed: weights.signed,
            weight_zero_points,
            finish,
            dynamic,
            extreme,
            salt,
        }
        .check();
    }
}

/// Shapes large enough that tiles are cut in every way: by rows, images, groups and panels.
#[test]
fn tiles_of_large_shapes_fit_together() {
    let rows = [
        ([1, 1, 3, 24], [1, 70, 70], [1, 7, 7], [1, 2, 2], [[0, 0], [3, 3], [3, 3]]),
        ([1, 1, 64, 64], [1, 30, 30], [1, 3, 3], [1, 1, 1], [[0, 0], [1, 1], [1, 1]]),
        ([3, 1, 40, 33], [1, 25, 25], [1, 1, 1], [1, 1, 1], [[0, 0], [0, 0], [0, 0]]),
        // One small image and much work: tiles by panels.
        ([1, 1, 128, 300], [1, 7, 9], [1, 3, 3], [1, 1, 1], [[0, 0], [1, 1], [1, 1]]),
        // Tiles by groups.
        ([1, 32, 16, 16], [1, 14, 14], [1, 3, 3], [1, 1, 1], [[0, 0], [1, 1], [1, 1]]),
        ([2, 144, 1, 1], [1, 28, 28], [1, 3, 3], [1, 1, 1], [[0, 0], [1, 1], [1, 1]]),
        ([1, 100, 1, 1], [1, 57, 57], [1, 5, 5], [1, 2, 2], [[0, 0], [2, 2], [2, 2]]),
        ([1, 1, 2, 40], [9, 20, 30], [3, 3, 3], [1, 1, 1], [[1, 1], [1, 1], [1, 1]]),
    ];
    for (index, (channels, input, kernel, stride, pads)) in rows.into_iter().enumerate() {
        let geometry = geometry(channels, input, kernel, stride, [1; 3], pads).unwrap();
        let output = Bytes { signed: false, zero_point: 7 };
        Case {
            finish: finish(&geometry, 5, 6, output, output),
            geometry,
            layouts: [ActivationLayout::ChannelsLast; 2],
            input: Bytes { signed: index % 3 == 2, zero_point: 3 },
            weights_signed: true,
            weight_zero_points: vec![0],
            dynamic: None,
            extreme: false,
            salt: 9,
        }
        .check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn products_with_constant_weights_are_exact(
        shape in (1..40usize, 1..80usize, 1..90usize),
        input in bytes(),
        weights in bytes(),
        depth_first in any::<bool>(),
        salt in any::<u32>(),
    ) {
        let (rows, depth, columns) = shape;
        let x: Vec<u8> = numbers(rows * depth, salt).map(|n| n as u8).collect();
        let w: Vec<u8> = numbers(depth * columns, salt ^ 1).map(|n| n as u8).collect();
        let order = if depth_first { WeightOrder::DepthFirst } else { WeightOrder::ColumnsFirst };
        let mut expected = Vec::new();
        for (row, column) in (0..rows * columns).map(|i| (i / columns, i % columns)) {
            let sum: i64 = (0..depth).map(|k| {
                let w = w[if depth_first { k * columns + column } else { column * depth + k }];
                (value(x[row * depth + k], input.signed) - i64::from(input.zero_point))
                    * (value(w, weights.signed) - i64::from(weights.zero_point))
            }).sum();
            expected.extend((sum as i32).to_ne_bytes());
        }
        let zero_points = [weights.zero_point];
        let weights = Weights { values: &w, signed: weights.signed, zero_points: &zero_points };
        let product =
            QuantizedProduct::new([rows, depth, columns], input, weights, order, &[], Finish::Sums).unwrap();
        for threads in [1, 3] {
            let actual = on_threads(threads, product.scratch_bytes(), expected.len(), |pool, scratch, output| {
                product.run(pool, Run { input: &x, dynamic: None, residual: &[], scratch, output });
            });
            prop_assert_eq!(&actual, &expected);
        }
    }

    #[test]
    fn products_of_activations_are_exact(
        batch in (1..3usize, 1..4usize),
        shape in (1..40usize, 1..80usize, 1..90usize),
        left in bytes(),
        right in bytes(),
        left_transposed in any::<bool>(),
        right_transposed in any::<bool>(),
        broadcast in any::<bool>(),
        kind in 0..5usize,
        output in bytes(),
        salt in any::<u32>(),
    ) {
        let (rows, depth, columns) = shape;
        let batch = [batch.0, batch.1];
        // Heads lie inside rows, as attention has them, or rows inside matrices.
        let matrix = |bytes: Bytes, rows: usize, columns: usize, transposed: bool, broadcast: bool| {
            let outer = if broadcast { 0 } else { batch[1] * rows * columns };
            if transposed {
                ActivationMatrix { bytes, batch: vec![outer, rows * columns], row: 1, column: rows }
            } else {
                ActivationMatrix { bytes, batch: vec![outer, columns], row: batch[1] * columns, column: 1 }
            }
        };
        let left = matrix(left, rows, depth, left_transposed, false);
        let right = matrix(right, depth, columns, right_transposed, broadcast);
        let count = batch[0] * batch[1];
        let x: Vec<u8> = numbers(count * rows * depth, salt).map(|n| n as u8).collect();
        let y: Vec<u8> = numbers(count * depth * columns, salt ^ 1).map(|n| n as u8).collect();
        let geometry = geometry([1, 1, depth, columns], [1; 3], [1; 3], [1; 3], [1; 3], [[0, 0]; 3]).unwrap();
        let finish = finish(&geometry, salt, kind, output, output);
        let case = Case {
            geometry,
            layouts: [ActivationLayout::ChannelsLast; 2],
            input: left.bytes,
            weights_signed: true,
            weight_zero_points: vec![0],
            finish: finish.clone(),
            dynamic: None,
            extreme: false,
            salt,
        };
        let mut expected = Vec::new();
        for index in 0..count * rows * columns {
            let (matrix, row, column) = (index / columns / rows, index / columns % rows, index % columns);
            let at = |operand: &ActivationMatrix, row: usize, column: usize| {
                matrix / batch[1] * operand.batch[0] + matrix % batch[1] * operand.batch[1] + row * operand.row
                    + column * operand.column
            };
            let number = |operand: &ActivationMatrix, byte: u8| {
                value(byte, operand.bytes.signed) - i64::from(operand.bytes.zero_point)
            };
            let sum: i64 = (0..depth)
                .map(|k| number(&left, x[at(&left, row, k)]) * number(&right, y[at(&right, k, column)]))
                .sum();
            expected.extend(case.finished(sum, column, 0));
        }
        for isa in ISAS.into_iter().filter(|isa| isa.is_there()) {
            let product =
                ActivationProduct::with_isa(isa, &batch, [rows, depth, columns], left.clone(), right.clone(), finish.clone())
                    .unwrap();
            for threads in [1, 3] {
                let actual = on_threads(threads, product.scratch_bytes(), expected.len(), |pool, scratch, output| {
                    product.run(pool, &x, &y, scratch, output);
                });
                prop_assert_eq!(&actual, &expected, "{:?}", isa);
            }
        }
    }
}
