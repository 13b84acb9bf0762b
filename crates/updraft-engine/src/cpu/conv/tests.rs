//! Random shapes against the definition, for every instruction set and several numbers of threads.

use super::*;
use proptest::prelude::*;

/// The definition, one multiply-add at a time in f64: `visit(output, input, weight)` for every term of every output.
fn for_each_term(geometry: &ConvGeometry, mut visit: impl FnMut(usize, usize, usize)) {
    let ConvGeometry { batch, groups, input, kernel, stride, dilation, pad_begin, output, .. } = geometry;
    let (inputs, outputs) = (geometry.input_channels / groups, geometry.output_channels / groups);
    let flat = |at: [usize; 3], extents: &[usize; 3]| (at[0] * extents[1] + at[1]) * extents[2] + at[2];
    let all = |extents: &[usize; 3]| {
        let [depth, height, width] = *extents;
        (0..depth * height * width).map(move |i| [i / (height * width), i / width % height, i % width])
    };
    let volume = |extents: &[usize; 3]| extents.iter().product::<usize>();
    for image in 0..*batch {
        for channel in 0..geometry.output_channels {
            for to in all(output) {
                for i in 0..inputs {
                    for tap in all(kernel) {
                        let from: [usize; 3] = std::array::from_fn(|axis| {
                            (to[axis] * stride[axis] + tap[axis] * dilation[axis]).wrapping_sub(pad_begin[axis])
                        });
                        if (0..3).all(|axis| from[axis] < input[axis]) {
                            let plane = image * geometry.input_channels + channel / outputs * inputs + i;
                            visit(
                                (image * geometry.output_channels + channel) * volume(output) + flat(to, output),
                                plane * volume(input) + flat(from, input),
                                (channel * inputs + i) * volume(kernel) + flat(tap, kernel),
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Numbers in [-1, 1) that depend on index and salt.
fn numbers(len: usize, salt: u32) -> Vec<f32> {
    (0..len as u32)
        .map(|i| ((i.wrapping_mul(2_654_435_761) ^ salt.wrapping_mul(40_503)).wrapping_mul(2_246_822_519) >> 8) as f32)
        .map(|bits| bits / (1 << 23) as f32 - 1.0)
        .collect()
}

/// A sum of `n` products of numbers below 1 in any order errs by at most about `n` roundings of partial sums of at most
/// `n`; roundings being independent, `n` times one rounding is far outside what occurs.
fn assert_close(actual: &[f32], expected: &[f64], terms: usize, what: &str) {
    assert_eq!(actual.len(), expected.len());
    let tolerance = (terms.max(4) as f64) * f64::from(f32::EPSILON);
    for (index, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(*actual) - expected).abs();
        assert!(error <= tolerance, "{what}: element {index} is {actual}, not {expected} (within {tolerance:e})");
    }
}

fn isas() -> impl Iterator<Item = Isa> {
    [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| *isa <= isa::detected())
}

/// Runs with `threads` threads and scratch that holds rubbish.
fn on_threads<T: Send>(threads: usize, scratch_len: usize, work: impl FnOnce(&Pool, &mut [f32]) -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| work(&Pool { threads }, &mut vec![f32::NAN; threads * scratch_len]))
}

/// All three against the definition.
fn check(geometry: &ConvGeometry) {
    let input = numbers(geometry.input_len(), 1);
    let weights = numbers(geometry.weights_len(), 2);
    let errors = numbers(geometry.output_len(), 3);
    let bias = numbers(geometry.output_channels, 4);
    let volume: usize = geometry.output.iter().product();
    let mut output: Vec<f64> =
        (0..geometry.output_len()).map(|i| f64::from(bias[i / volume % geometry.output_channels])).collect();
    let mut input_gradient = vec![0.0; input.len()];
    let mut weight_gradient = vec![0.0; weights.len()];
    for_each_term(geometry, |o, i, w| {
        output[o] += f64::from(input[i]) * f64::from(weights[w]);
        input_gradient[i] += f64::from(errors[o]) * f64::from(weights[w]);
        weight_gradient[w] += f64::from(errors[o]) * f64::from(input[i]);
    });
    let per_output = geometry.taps() * geometry.input_channels / geometry.groups;
    let per_input = geometry.taps() * geometry.output_channels / geometry.groups;
    for isa in isas() {
        let conv = Conv::with_isa(geometry.clone(), isa);
        let to_input = ConvInputGradient::with_isa(geometry.clone(), isa);
        let to_weights = ConvWeightGradient::with_isa(geometry.clone(), isa);
        let mut first: Option<[Vec<f32>; 3]> = None;
        for threads in [1, 2, 3, 8] {
            let actual = on_threads(threads, conv.scratch_len(), |pool, scratch| {
                let mut packed = vec![f32::NAN; conv.packed_weights_len()];
                conv.pack_weights(pool, &weights, &mut packed);
                let mut actual = vec![f32::NAN; output.len()];
                let epilogue = Epilogue { bias: Some(&bias), ..Epilogue::default() };
                conv.run(pool, &input, &packed, epilogue, scratch, &mut actual);
                actual
            });
            let actual_input = on_threads(threads, to_input.scratch_len(), |pool, scratch| {
                let mut packed = vec![f32::NAN; to_input.packed_weights_len()];
                to_input.pack_weights(pool, &weights, &mut packed);
                let mut actual = vec![f32::NAN; input.len()];
                to_input.run(pool, &errors, &packed, scratch, &mut actual);
                actual
            });
            let actual_weights = on_threads(threads, to_weights.scratch_len(), |pool, scratch| {
                let mut workspace = vec![f32::NAN; to_weights.workspace_len()];
                let mut actual = vec![f32::NAN; weights.len()];
                to_weights.run(pool, &input, &errors, &mut workspace, scratch, &mut actual);
                actual
            });
            let actual = [actual, actual_input, actual_weights];
            match &first {
                None => {
                    assert_close(&actual[0], &output, per_output, "output");
                    assert_close(&actual[1], &input_gradient, per_input, "input gradient");
                    assert_close(&actual[2], &weight_gradient, geometry.batch * volume, "weight gradient");
                    first = Some(actual);
                }
                Some(first) => assert!(first == &actual, "{isa:?}: {threads} threads change bits"),
            }
        }
    }
}

fn geometry(
    channels: [usize; 4],
    input: [usize; 3],
    kernel: [usize; 3],
    stride: [usize; 3],
    dilation: [usize; 3],
    pads: [[usize; 2]; 3],
) -> Option<ConvGeometry> {
    let [batch, groups, inputs, outputs] = channels;
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

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn convolution_and_its_gradients_are_what_the_definition_says(
        channels in (1..4usize, 1..4usize, 1..6usize, 1..12usize),
        input in (1..4usize, 1..9usize, 1..20usize),
        kernel in (1..3usize, 1..4usize, 1..5usize),
        stride in (1..3usize, 1..4usize, 1..4usize),
        dilation in (1..3usize, 1..3usize, 1..3usize),
        begin in (0..2usize, 0..3usize, 0..5usize),
        end in (0..2usize, 0..3usize, 0..5usize),
    ) {
        let triple = |(a, b, c): (usize, usize, usize)| [a, b, c];
        let (batch, groups, inputs, outputs) = channels;
        let pads = [[begin.0, end.0], [begin.1, end.1], [begin.2, end.2]];
        let channels = [batch, groups, inputs, outputs];
        let shape = geometry(channels, triple(input), triple(kernel), triple(stride), triple(dilation), pads);
        if let Some(shape) = shape {
            check(&shape);
        }
    }
}

/// Shapes large enough that tiles are cut in every way: by rows, images, groups and channels.
#[test]
fn tiles_of_large_shapes_fit_together() {
    let rows = [
        // Many rows: several tiles for each image.
        ([1, 1, 3, 8], [1, 70, 70], [1, 3, 3], [1, 1, 1], [[0, 0], [1, 1], [1, 1]]),
        ([1, 1, 4, 16], [1, 90, 50], [1, 1, 1], [1, 1, 1], [[0, 0], [0, 0], [0, 0]]),
        // Small images: several in a tile.
        ([9, 1, 5, 9], [1, 7, 7], [1, 3, 3], [1, 1, 1], [[0, 0], [1, 1], [1, 1]]),
        ([10, 1, 40, 3], [1, 5, 5], [1, 1, 1], [1, 2, 2], [[0, 0], [0, 0], [0, 0]]),
        // One small image and much work: tiles by channels.
        ([1, 1, 128, 70], [1, 7, 9], [1, 3, 3], [1, 1, 1], [[0, 0], [1, 1], [1, 1]]),
        // Depthwise: tiles by groups.
        ([1, 100, 1, 1], [1, 23, 23], [1, 5, 5], [1, 2, 2], [[0, 0], [2, 2], [2, 2]]),
        // Three dimensions cut in depth.
        ([1, 1, 2, 4], [9, 20, 30], [3, 3, 3], [1, 1, 1], [[1, 1], [1, 1], [1, 1]]),
        // A row shorter than a register at the end of an input that is read in place.
        ([2, 1, 3, 8], [1, 257, 9], [1, 1, 1], [1, 1, 1], [[0, 0], [0, 0], [0, 0]]),
        // Fewer positions than a register has lanes.
        ([3, 1, 20, 24], [1, 2, 3], [1, 1, 1], [1, 1, 1], [[0, 0], [0, 0], [0, 0]]),
    ];
    for (channels, input, kernel, stride, pads) in rows {
        check(&geometry(channels, input, kernel, stride, [1; 3], pads).unwrap());
    }
}

#[test]
fn bias_residual_and_activation_come_in_that_order() {
    let shape = geometry([2, 1, 3, 5], [1, 6, 7], [1, 3, 3], [1; 3], [1; 3], [[0, 0], [1, 1], [1, 1]]).unwrap();
    let (input, weights) = (numbers(shape.input_len(), 1), numbers(shape.weights_len(), 2));
    let (bias, residual) = (numbers(5, 3), numbers(shape.output_len(), 4));
    let conv = Conv::new(shape.clone());
    let run = |epilogue: Epilogue<'_>| {
        on_threads(1, conv.scratch_len(), |pool, scratch| {
            let mut packed = vec![0.0; conv.packed_weights_len()];
            conv.pack_weights(pool, &weights, &mut packed);
            let mut output = vec![0.0; shape.output_len()];
            conv.run(pool, &input, &packed, epilogue, scratch, &mut output);
            output
        })
    };
    let plain = run(Epilogue::default());
    for activation in [Activation::None, Activation::Relu, Activation::Clip { min: -0.5, max: 0.25 }] {
        let expected: Vec<f32> = (0..plain.len())
            .map(|i| plain[i] + bias[i / 42 % 5] + residual[i])
            .map(|sum| match activation {
                Activation::None => sum,
                Activation::Relu => sum.max(0.0),
                Activation::Clip { min, max } => sum.clamp(min, max),
            })
            .collect();
        assert_eq!(run(Epilogue { bias: Some(&bias), residual: Some(&residual), activation }), expected);
    }
}
