//! Fake quantization on the engine against the reference evaluation, for scales of tensors and of channels.

use std::collections::HashMap;

use updraft_base::random::Key;
use updraft_engine::{CompileOptions, CpuEngine, Engine};
use updraft_graph::eval::evaluate;
use updraft_graph::{Attributes, DType, Graph, Tensor, UPDRAFT_DOMAIN, ValueType};

/// `(y, dx, dstep)` of one use, as a graph of the operands that change.
fn graph(shape: &[usize], channels: usize, axis: i64, dtype: DType) -> Graph {
    let mut graph = Graph::new("fake");
    let dims: Vec<_> = shape.iter().map(|n| (*n).into()).collect();
    let x = graph.add_input("x", ValueType::tensor(DType::F32, dims.clone())).unwrap();
    let dy = graph.add_input("dy", ValueType::tensor(DType::F32, dims)).unwrap();
    let step = graph.add_input("step", ValueType::tensor(DType::F32, vec![channels.into()])).unwrap();
    let units: Vec<f32> = (0..channels).map(|c| 0.01 + 0.002 * c as f32).collect();
    let zeros: Vec<i128> = (0..channels).map(|c| if dtype == DType::U8 { 100 + c as i128 } else { 0 }).collect();
    let unit = graph.add_constant("unit", Tensor::vector(&units));
    let zero = graph.add_constant("zero", Tensor::from_i128(dtype, &[channels], &zeros).unwrap());
    let attributes: Attributes = [("axis", axis.into()), ("per_sample", 1.into())].into();
    let operands = [x, unit, step, zero].map(Some);
    let y = graph.op_n(UPDRAFT_DOMAIN, "FakeQuantize", &operands, attributes.clone(), 1).unwrap();
    let operands = [dy, x, unit, step, zero].map(Some);
    let back = graph.op_n(UPDRAFT_DOMAIN, "FakeQuantizeGradient", &operands, attributes, 2).unwrap();
    graph.set_outputs(vec![y[0], back[0], back[1]]);
    graph
}

#[test]
fn the_engine_gives_the_reference_values_and_gradients() {
    let rows: [(&[usize], usize, i64, DType); 7] = [
        (&[5], 1, 1, DType::U8),
        (&[3, 4, 5, 7], 1, 1, DType::U8),
        (&[2, 33, 17, 31], 33, 1, DType::I8),
        (&[19, 8, 3, 3], 19, 0, DType::I8),
        (&[40, 300], 300, 1, DType::I8),
        (&[17, 1000], 17, 0, DType::U8),
        (&[2, 3], 1, 1, DType::I16),
    ];
    for (shape, channels, axis, dtype) in rows {
        let graph = graph(shape, channels, axis, dtype);
        let draw = |label: &str, scale: f32| {
            let key = Key::new(1).child(label);
            let count = shape.iter().product::<usize>() as u64;
            Tensor::new(shape, &(0..count).map(|i| scale * key.normal_f32(i)).collect::<Vec<_>>()).unwrap()
        };
        let steps: Vec<f32> = (0..channels).map(|c| 0.5 + c as f32 / channels as f32).collect();
        let given = [("x", draw("x", 1.0)), ("dy", draw("dy", 1.0)), ("step", Tensor::vector(&steps))];
        let inputs: HashMap<String, Tensor> = given.iter().map(|(n, t)| ((*n).to_owned(), t.clone())).collect();
        let expected = evaluate(&graph, &inputs).unwrap();
        let on = |threads: usize| {
            let mut session = CpuEngine::new(threads).unwrap().compile(&graph, &CompileOptions::default()).unwrap();
            let given: Vec<(&str, &Tensor)> = given.iter().map(|(n, t)| (*n, t)).collect();
            session.run(&given).unwrap()
        };
        let found = on(1);
        assert_eq!(found[..2], expected[..2], "{shape:?} {dtype}");
        // A sum of n numbers in f32 lanes of n / 16 errs by at most n / 16 units in the last place of the sum of their
        // magnitudes; these rows have runs of at most 8192 elements, so of 512 roundings, of which most cancel.
        let (sums, exact) = (found[2].to_f64().unwrap(), expected[2].to_f64().unwrap());
        let bound = 1e-4 * exact.iter().fold(1.0f64, |m, v| m.max(v.abs()));
        assert!(sums.iter().zip(&exact).all(|(a, b)| (a - b).abs() < bound), "{shape:?} {dtype}: {sums:?} {exact:?}");
        assert_eq!(on(2), found, "{shape:?} {dtype} on two threads");
    }
}
