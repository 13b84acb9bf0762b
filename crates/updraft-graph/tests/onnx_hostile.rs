//! Files that mean nothing are refused by name, and tensors are read in every way that files store them.
//!
//! The files are put together field by field from the numbers in `onnx.proto`.

use std::cell::Cell;

use updraft_graph::onnx::{External, OnnxError, ReadOptions, WriteOptions, read, write};
use updraft_graph::{DType, Graph, Model, Tensor};

/// A field that holds bytes, text or a message.
fn len(tag: u64, bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    [varint(tag << 3 | 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}

/// A field that holds an integer.
fn int(tag: u64, value: i64) -> Vec<u8> {
    [varint(tag << 3), varint(value as u64)].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn tensor(name: &str, dtype: i64, dims: &[i64], data: Vec<u8>) -> Vec<u8> {
    let dims: Vec<u8> = dims.iter().flat_map(|d| int(1, *d)).collect();
    [dims, int(2, dtype), len(8, name), data].concat()
}

fn raw(bytes: &[u8]) -> Vec<u8> {
    len(9, bytes)
}

fn packed(tag: u64, values: &[i64]) -> Vec<u8> {
    len(tag, values.iter().flat_map(|v| varint(*v as u64)).collect::<Vec<u8>>())
}

fn external(entries: &[(&str, &str)]) -> Vec<u8> {
    let entries = entries.iter().flat_map(|(key, value)| len(13, [len(1, key), len(2, value)].concat()));
    [entries.collect(), int(14, 1)].concat()
}

fn initializer(tensor: Vec<u8>) -> Vec<u8> {
    len(5, tensor)
}

fn sparse_initializer(values: Vec<u8>, indices: Vec<u8>, dims: &[i64]) -> Vec<u8> {
    len(15, [len(1, values), len(2, indices), dims.iter().flat_map(|d| int(3, *d)).collect()].concat())
}

fn value_info(name: &str, dims: &[i64]) -> Vec<u8> {
    let dims: Vec<u8> = dims.iter().flat_map(|d| len(1, int(1, *d))).collect();
    [len(1, name), len(2, len(1, [int(1, 1), len(2, dims)].concat()))].concat()
}

fn input(name: &str) -> Vec<u8> {
    len(11, value_info(name, &[2]))
}

fn output(name: &str) -> Vec<u8> {
    len(12, len(1, name))
}

fn node(op: &str, inputs: &[&str], outputs: &[&str], rest: Vec<u8>) -> Vec<u8> {
    let inputs: Vec<u8> = inputs.iter().flat_map(|name| len(1, name)).collect();
    let outputs: Vec<u8> = outputs.iter().flat_map(|name| len(2, name)).collect();
    len(1, [inputs, outputs, len(4, op), rest].concat())
}

fn attribute(name: &str, rest: Vec<u8>) -> Vec<u8> {
    len(5, [len(1, name), rest].concat())
}

fn opset(version: i64) -> Vec<u8> {
    len(8, int(2, version))
}

fn model(graph: &[Vec<u8>]) -> Vec<u8> {
    [int(1, 10), opset(21), len(7, [graph.concat(), len(2, "g")].concat())].concat()
}

fn error(bytes: &[u8]) -> OnnxError {
    match read(bytes, &ReadOptions::default()) {
        Ok(model) => panic!("this was read:\n{}", updraft_graph::text::print(&model.graph)),
        Err(error) => error,
    }
}

fn check(rows: Vec<(Vec<u8>, &str)>) {
    for (bytes, expected) in rows {
        let found = error(&bytes).to_string();
        assert!(found.contains(expected), "found    {found}\nexpected {expected}");
    }
}

#[test]
fn a_file_without_its_parts_is_refused() {
    let graph = len(7, len(2, "g"));
    check(vec![
        (Vec::new(), "the model has no ir_version"),
        (b"{\"graph\": 1}".to_vec(), "not an ONNX file: "),
        (vec![0xff; 100], "not an ONNX file: "),
        ([int(1, 10), opset(21)].concat(), "the model has no graph"),
        ([int(1, 10), graph.clone()].concat(), "the model has no opset_import"),
        ([int(1, 99), opset(21), graph.clone()].concat(), "IR version 99, expected 1 to 14"),
        ([int(1, -1), opset(21), graph.clone()].concat(), "IR version -1, expected 1 to 14"),
        ([int(1, 10), opset(6), graph.clone()].concat(), "operator set \"\" has version 6, expected 7 to 28"),
        ([int(1, 10), opset(29), graph.clone()].concat(), "has version 29, expected 7 to 28"),
        ([int(1, 10), opset(i64::MIN), graph.clone()].concat(), "expected 7 to 28"),
        ([int(1, 10), opset(21), opset(20), graph].concat(), "expected one version, but 21 is stated too"),
    ]);
}

#[test]
fn names_that_contradict_one_another_are_refused() {
    let w = |name: &str| initializer(tensor(name, 1, &[1], raw(&[0; 4])));
    check(vec![
        (model(&[w("")]), "graph \"g\" has no name of an initializer"),
        (model(&[w("w"), w("w")]), "graph \"g\": value name \"w\" is used twice"),
        (model(&[input("x"), input("x")]), "value name \"x\" is used twice"),
        (model(&[input("")]), "graph \"g\" has no name of an input"),
        (model(&[input("x"), node("Relu", &["x"], &["x"], vec![])]), "value name \"x\" is used twice"),
        (model(&[input("x"), node("Split", &["x"], &["y", "y"], vec![])]), "value name \"y\" is used twice"),
        (
            model(&[node("Relu", &["z"], &["y"], vec![])]),
            "graph \"g\": node Relu -> y reads \"z\", which nothing makes",
        ),
        (model(&[output("y")]), "graph \"g\": the list of outputs reads \"y\", which nothing makes"),
        (model(&[input("x"), node("", &["x"], &["y"], vec![])]), "node  -> y has no op_type"),
        (model(&[node("Relu", &["b"], &["a"], vec![]), node("Neg", &["a"], &["b"], vec![])]), "nodes form a cycle: "),
        (model(&[node("Relu", &["a"], &["a"], vec![])]), "nodes form a cycle: Relu -> a"),
    ]);
}

#[test]
fn tensors_that_are_not_what_they_say_are_refused() {
    let w = |dtype, dims: &[i64], data| model(&[initializer(tensor("w", dtype, dims, data))]);
    let huge = 1i64 << 62;
    check(vec![
        (w(1, &[-3], raw(&[])), "tensor \"w\": dimension 0 is -3, expected 0 or more"),
        (w(1, &[huge, 8], raw(&[0; 4])), "does not fit in memory"),
        (
            w(1, &[huge], raw(&[0; 4])),
            "raw_data: shape [4611686018427387904] holds 4611686018427387904 elements of f32, found 1",
        ),
        (w(1, &[huge], vec![]), "asks for 4611686018427387904 numbers in float_data, found 0"),
        (w(1, &[0, huge, huge], vec![]), "does not fit in memory"),
        (w(22, &[huge, 2], raw(&[0; 4])), "does not fit in memory"),
        (w(1, &[2], raw(&[0; 7])), "raw_data: shape [2] holds 2 elements of f32, found 1"),
        (w(22, &[3], raw(&[0; 3])), "raw_data: shape [3] holds 3 elements of i4, found 6"),
        (w(0, &[1], raw(&[0; 4])), "tensor \"w\": has no element type"),
        (w(99, &[1], raw(&[0; 4])), "element type has number 99, expected 1 to 28"),
        (w(9, &[1], raw(&[2])), "a bool is stored as 2, expected 0 or 1"),
        (w(8, &[1], raw(&[2])), "has elements in raw_data, expected those of string in string_data"),
        (w(1, &[1], packed(7, &[1])), "has elements in int64_data, expected those of f32 in float_data"),
        (w(7, &[1], [packed(7, &[1]), raw(&[0; 8])].concat()), "has elements in int64_data and in raw_data"),
        (w(7, &[3], packed(7, &[1, 2])), "shape [3] of i64 asks for 3 numbers in int64_data, found 2"),
        (w(3, &[1], packed(5, &[128])), "a number is 128, which does not fit i8"),
        (w(22, &[1], packed(5, &[256])), "a number is 256, which does not fit u8"),
        (w(27, &[1], packed(5, &[64])), "int32_data holds 64, expected codes of 6 bits"),
        (w(1, &[1], [raw(&[0; 4]), len(3, int(1, 0))].concat()), "is stored in segments"),
    ]);
}

#[test]
fn sparse_tensors_stay_inside_their_shape_and_the_memory() {
    let sparse = |n: i64, index_dims: &[i64], indices: &[i64], dims: &[i64]| {
        let values = tensor("s", 1, &[n], raw(&vec![0; 4 * n as usize]));
        model(&[sparse_initializer(values, tensor("", 7, index_dims, packed(7, indices)), dims)])
    };
    check(vec![
        (sparse(1, &[1], &[0], &[1 << 40]), "holds too little beside zeros"),
        (sparse(1, &[1], &[6], &[2, 3]), "index 6 is outside [0, 6)"),
        (sparse(1, &[1, 2], &[1, -1], &[2, 3]), "index -1 is outside [0, 3)"),
        (sparse(2, &[2], &[3, 3], &[2, 3]), "indices of element 1 are not after those of the one before it"),
        (sparse(2, &[1], &[3], &[2, 3]), "values have shape [2] and indices [1], expected [n] and [n] or [n, 2]"),
        (sparse(1, &[1, 3], &[0, 0, 0], &[2, 3]), "expected [n] and [n] or [n, 2]"),
    ]);
}

#[test]
fn attributes_without_one_meaning_are_refused() {
    let with = |attributes: Vec<u8>| model(&[node("Op", &[], &["y"], attributes)]);
    let one = || attribute("a", [int(20, 2), int(3, 1)].concat());
    let inner = |graph: Vec<u8>| with(attribute("a", [int(20, 5), len(6, graph)].concat()));
    check(vec![
        (with([one(), one()].concat()), "graph \"g\": node Op -> y: attribute \"a\" is given twice"),
        (with(attribute("", int(20, 2))), "graph \"g\": node Op -> y has no name of an attribute"),
        (with(attribute("a", int(20, 77))), "attribute \"a\" is of kind 77, expected 1 to 14"),
        (with(attribute("a", vec![])), "attribute \"a\" states neither kind nor value"),
        (with(attribute("a", [int(3, 1), len(4, "s")].concat())), "has values of several kinds"),
        (with(attribute("a", int(20, 4))), "attribute \"a\" has no value of its kind"),
        (
            with(attribute("a", [int(20, 4), len(5, tensor("t", 1, &[2], raw(&[0; 4])))].concat())),
            "graph \"g\": node Op -> y: attribute \"a\": tensor \"t\": raw_data: shape [2]",
        ),
        (inner(node("Relu", &["gone"], &["z"], vec![])), "node Relu -> z reads \"gone\", which nothing makes"),
        (with(attribute("a", [int(20, 13), len(14, len(1, int(1, 50)))].concat())), "element type has number 50"),
    ]);
}

#[test]
fn declared_shapes_that_cannot_be_are_refused() {
    let huge = 1i64 << 62;
    check(vec![
        (
            model(&[len(11, value_info("x", &[-1]))]),
            "graph \"g\": type of \"x\": dimension 0 is -1, expected 0 or more",
        ),
        (model(&[len(13, value_info("x", &[huge, 4]))]), "does not fit in memory"),
    ]);
}

/// A protobuf message inside another, 1,000 deep, which is ten times what the protobuf decoder follows.
#[test]
fn deep_nesting_is_refused_and_does_not_exhaust_the_stack() {
    let mut graph = len(2, "deepest");
    let mut ty = len(1, int(1, 1));
    for _ in 0..1_000 {
        graph = node("If", &[], &["y"], attribute("then_branch", [int(20, 5), len(6, graph)].concat()));
        ty = len(4, len(1, ty));
    }
    check(vec![
        (model(&[graph]), "recursion limit reached"),
        (model(&[len(11, [len(1, "x"), len(2, ty)].concat())]), "recursion limit reached"),
    ]);
}

#[test]
fn external_data_stay_in_the_models_folder() {
    let outside = |entries: &[(&str, &str)]| model(&[initializer(tensor("w", 1, &[2], external(entries)))]);
    let calls = Cell::new(0);
    let fetch = |location: &str, offset: u64, length: u64| {
        calls.set(calls.get() + 1);
        match location {
            "sub/data.bin" => Ok(vec![offset as u8; length as usize]),
            "short.bin" => Ok(vec![0; 3]),
            _ => Err("no such file".to_owned()),
        }
    };
    let options = ReadOptions { external: Some(&fetch) };
    let model = read(&outside(&[("location", "sub/data.bin"), ("offset", "1"), ("length", "8")]), &options).unwrap();
    assert_eq!(model.graph.constants().next().unwrap().1.bytes(), [1; 8]);
    assert_eq!(calls.get(), 1);
    for location in ["", "..", "../w", "a/../../w", "a\\..\\..\\w", "/etc/passwd", "\\\\host\\w", "C:\\w", "a\0b"] {
        let found = read(&outside(&[("location", location)]), &options).unwrap_err().to_string();
        assert!(found.contains("expected a path below the model's folder"), "{location:?}: {found}");
    }
    assert_eq!(calls.get(), 1, "a refused name must not be fetched");
    for (entries, expected) in [
        (vec![("location", "sub/data.bin"), ("length", "9")], "length is 9 bytes, but shape [2] of f32 takes 8"),
        (vec![("location", "sub/data.bin"), ("offset", "-1")], "offset is \"-1\", expected a number of bytes"),
        (vec![("location", "short.bin")], "holds 2 elements of f32, found 0"),
        (vec![("location", "gone.bin")], "external data at \"gone.bin\": no such file"),
    ] {
        let found = read(&outside(&entries), &options).unwrap_err().to_string();
        assert!(found.contains(expected), "{found}\nexpected {expected}");
    }
    let found = error(&outside(&[("location", "w")])).to_string();
    assert_eq!(
        found,
        "graph \"g\": tensor \"w\": external data at \"w\": the reader was given no access to other files"
    );
}

#[test]
fn large_initializers_written_outside_read_back() {
    let mut graph = Graph::new("g");
    for (i, len) in [3usize, 5000, 1000, 2].into_iter().enumerate() {
        let values: Vec<f32> = (0..len).map(|v| v as f32).collect();
        let w = graph.add_constant(&format!("w{i}"), Tensor::vector(&values));
        graph.push_output(w);
    }
    let model = Model::new(graph);
    let mut file = Vec::new();
    let mut sink = |bytes: &[u8]| {
        file.extend_from_slice(bytes);
        Ok(())
    };
    let outside = External { location: "weights.bin", bytes_min: 1024, sink: &mut sink };
    let bytes = write(&model, WriteOptions { external: Some(outside) }).unwrap();
    assert!(bytes.len() < 1000, "{} bytes", bytes.len());
    // 20,000 bytes, then 4,000 bytes from the next page on.
    assert_eq!(file.len(), 20_480 + 4_000);
    let fetch = |location: &str, offset: u64, length: u64| {
        assert_eq!((location, offset % 4096), ("weights.bin", 0));
        Ok(file[offset as usize..(offset + length) as usize].to_vec())
    };
    assert_eq!(read(&bytes, &ReadOptions { external: Some(&fetch) }), Ok(model.clone()));
    let mut full = |_: &[u8]| Err("disk full".to_owned());
    let outside = External { location: "weights.bin", bytes_min: 0, sink: &mut full };
    let error = write(&model, WriteOptions { external: Some(outside) }).unwrap_err().to_string();
    assert_eq!(error, "graph \"g\": tensor \"w0\": external data at \"weights.bin\": disk full");
}

/// The same numbers in the typed field that `onnx.proto` gives each type, and in raw bytes.
#[test]
fn every_element_type_reads_the_same_from_its_typed_field_and_from_raw_data() {
    let f32s = |values: &[f32]| len(4, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    let f64s = |values: &[f64]| len(10, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    let le = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let le64 = |values: &[f64]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let rows: Vec<(DType, Vec<u8>, Vec<u8>)> = vec![
        (DType::F32, f32s(&[1.5, -0.0, 3.0]), le(&[1.5, -0.0, 3.0])),
        (DType::F64, f64s(&[1.5, -2.0, 1e300]), le64(&[1.5, -2.0, 1e300])),
        (DType::Complex64, f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), le(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
        (DType::Complex128, f64s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), le64(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
        (DType::U8, packed(5, &[0, 1, 255]), vec![0, 1, 255]),
        (DType::I8, packed(5, &[-128, -1, 127]), vec![128, 255, 127]),
        (DType::U16, packed(5, &[1, 256, 65535]), vec![1, 0, 0, 1, 255, 255]),
        (DType::I16, packed(5, &[-1, 256, -32768]), vec![255, 255, 0, 1, 0, 128]),
        (DType::I32, packed(5, &[-1, 1, 256]), [[255; 4], [1, 0, 0, 0], [0, 1, 0, 0]].concat()),
        (
            DType::I64,
            packed(7, &[-1, 1, 256]),
            [(-1i64).to_le_bytes(), 1i64.to_le_bytes(), 256i64.to_le_bytes()].concat(),
        ),
        (DType::U32, packed(11, &[1, 2, 0xffff_ffff]), [[1, 0, 0, 0], [2, 0, 0, 0], [255; 4]].concat()),
        (DType::U64, packed(11, &[1, 2, -1]), [1u64.to_le_bytes(), 2u64.to_le_bytes(), [255; 8]].concat()),
        (DType::Bool, packed(5, &[1, 0, 1]), vec![1, 0, 1]),
        (DType::F16, packed(5, &[0x3c00, 0x8000, 0x7e01]), vec![0, 0x3c, 0, 0x80, 1, 0x7e]),
        (DType::BF16, packed(5, &[0x3f80, 0x8000, 0xffff]), vec![0x80, 0x3f, 0, 0x80, 255, 255]),
        (DType::F8E4M3FN, packed(5, &[0, 0x7f, 0xff]), vec![0, 0x7f, 0xff]),
        (DType::F8E4M3FNUZ, packed(5, &[0, 0x7f, 0x80]), vec![0, 0x7f, 0x80]),
        (DType::F8E5M2, packed(5, &[0, 0x7c, 0xff]), vec![0, 0x7c, 0xff]),
        (DType::F8E5M2FNUZ, packed(5, &[0, 0x7c, 0x80]), vec![0, 0x7c, 0x80]),
        (DType::F8E8M0, packed(5, &[0, 0x7f, 0xff]), vec![0, 0x7f, 0xff]),
        (DType::U4, packed(5, &[0x21, 0x0f]), vec![0x21, 0x0f]),
        (DType::I4, packed(5, &[0x8f, 0x07]), vec![0x8f, 0x07]),
        (DType::F4E2M1, packed(5, &[0x8f, 0x07]), vec![0x8f, 0x07]),
        (DType::U2, packed(5, &[0x39]), vec![0x39]),
        (DType::I2, packed(5, &[0x36]), vec![0x36]),
        (DType::F6E2M3, packed(5, &[0x3f, 1, 0x2a]), vec![0x7f, 0xa0, 0x02]),
        (DType::F6E3M2, packed(5, &[0x3f, 1, 0x2a]), vec![0x7f, 0xa0, 0x02]),
    ];
    assert_eq!(rows.len() + 1, DType::ALL.len(), "strings have one form only");
    for (dtype, typed, raw_bytes) in rows {
        let read_one = |data: Vec<u8>| {
            let bytes = model(&[initializer(tensor("w", dtype as i64, &[3], data))]);
            let model = read(&bytes, &ReadOptions::default()).unwrap_or_else(|e| panic!("{dtype}: {e}"));
            model.graph.constants().next().unwrap().1.clone()
        };
        let tensor = read_one(typed);
        assert_eq!((tensor.dtype(), tensor.shape()), (dtype, [3].as_slice()));
        assert!(tensor == read_one(raw(&raw_bytes)), "{dtype}: {tensor:?}");
    }
    let strings = len(6, "a").into_iter().chain(len(6, [0xff, 0])).collect();
    let bytes = model(&[initializer(tensor("w", 8, &[2], strings))]);
    let model = read(&bytes, &ReadOptions::default()).unwrap();
    let expected = [b"a".to_vec(), vec![0xff, 0]];
    assert_eq!(model.graph.constants().next().unwrap().1.strings().unwrap(), expected);
}

/// Files of before IR version 4 list their weights as inputs; they are weights all the same.
#[test]
fn weights_of_old_files_are_constants_and_are_listed_again_when_written() {
    let weight = initializer(tensor("w", 1, &[2], raw(&[0; 8])));
    let parts = [input("w"), input("x"), weight, node("Add", &["x", "w"], &["y"], vec![]), output("y")].concat();
    let old = [int(1, 3), opset(8), len(7, parts)].concat();
    let model = read(&old, &ReadOptions::default()).unwrap();
    assert_eq!(model.graph.inputs().len(), 1);
    let written = write(&model, WriteOptions::default()).unwrap();
    assert_eq!(read(&written, &ReadOptions::default()), Ok(model));
    let infos = |name: &str| written.windows(name.len() + 2).filter(|w| *w == len(1, name)).count();
    assert_eq!((infos("w"), infos("x")), (2, 2), "each is an operand and an input");
}
