//! Each format against files that its usual writer made (`fixtures/make.py`), and what is refused.

use std::path::{Path, PathBuf};

use updraft_data::shards::Shards;
use updraft_data::{Access, DataError, Dataset, DatasetConfig, Loader, LoaderOptions, read_npy, read_npz, write_npz};
use updraft_graph::{DType, Tensor};

const MEMORY_BYTES: u64 = 1 << 20;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// All samples of a dataset as one batch; `recipe` is what follows its path.
fn read(path: &Path, recipe: &str) -> Result<Vec<(String, Tensor)>, DataError> {
    let config: DatasetConfig = toml::from_str(&format!("path = {path:?}\n{recipe}")).unwrap();
    let dataset = Dataset::open(&config, Path::new("/"))?;
    let options = LoaderOptions { batch_size: dataset.len() as usize, threads: 0, ..LoaderOptions::default() };
    Ok(Loader::new(dataset.into(), options)?.batch(0)?.tensors)
}

/// A recipe of one tensor.
fn one(name: &str, transform: &str) -> String {
    format!("[[tensors]]\nname = {name:?}\ntransform = [{transform}]")
}

#[track_caller]
fn refused(path: &Path, recipe: &str, words: &[&str]) {
    let error = read(path, recipe).unwrap_err();
    let text = format!("{error}");
    assert!(words.iter().all(|w| text.contains(w)), "`{text}` lacks some of {words:?}");
}

fn f64s(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f64().unwrap()
}

#[test]
fn parquet_columns_keep_their_types_across_row_groups() {
    let path = fixture("types.parquet");
    for (name, dtype, scale) in [
        ("int8", DType::I8, 1.0),
        ("int16", DType::I16, 1.0),
        ("int32", DType::I32, 1.0),
        ("int64", DType::I64, 1.0),
        ("uint8", DType::U8, 1.0),
        ("uint16", DType::U16, 1.0),
        ("uint32", DType::U32, 1.0),
        ("uint64", DType::U64, 1.0),
        ("float16", DType::F16, 1.0),
        ("float32", DType::F32, 0.25),
        ("float64", DType::F64, 0.125),
    ] {
        let tensors = read(&path, &one(name, "")).unwrap();
        assert_eq!((tensors[0].0.as_str(), tensors[0].1.dtype()), (name, dtype));
        assert_eq!(f64s(&tensors[0].1), (0..7).map(|i| f64::from(i) * scale).collect::<Vec<_>>(), "{name}");
    }
    let bools = read(&path, &one("bool", "")).unwrap();
    assert_eq!(bools[0].1.to_bools().unwrap(), [false, true, false, true, false, true, false]);
    let wide = read(&path, &one("wide", "")).unwrap();
    assert_eq!(wide[0].1.as_slice::<u64>().unwrap()[..2], [u64::MAX, u64::MAX - 1]);
    let list = read(&path, &one("list", "")).unwrap();
    assert_eq!(list[0].1.shape(), [7, 2]);
    assert_eq!(f64s(&list[0].1)[..4], [0.0, 0.5, 1.0, 1.5]);
    let text =
        read(&path, &one("text", "{ index_of = [\"t6\", \"t5\", \"t4\", \"t3\", \"t2\", \"t1\", \"t0\"] }")).unwrap();
    assert_eq!(text[0].1.as_slice::<i64>().unwrap(), [6, 5, 4, 3, 2, 1, 0]);
    let picture = read(&path, &one("picture.bytes", "{ decode = \"grey\" }")).unwrap();
    assert_eq!((picture[0].1.shape(), picture[0].1.dtype()), ([7, 1, 4, 5].as_slice(), DType::U8));
}

#[test]
fn parts_that_share_a_border_share_no_row_and_leave_none_out() {
    let path = fixture("types.parquet");
    let part = |rows: &str| {
        let tensors = read(&path, &format!("rows = {rows}\n{}", one("int32", ""))).unwrap();
        f64s(&tensors[0].1)
    };
    for border in ["0.2", "0.5", "0.99"] {
        let both = [part(&format!("[0.0, {border}]")), part(&format!("[{border}, 1.0]"))].concat();
        assert_eq!(both, (0..7).map(f64::from).collect::<Vec<_>>(), "{border}");
    }
    for rows in ["[0.5, 0.5]", "[-0.1, 0.5]", "[0.5, 1.1]", "[nan, 1.0]", "[0.0, 0.1]"] {
        refused(&path, &format!("rows = {rows}\n{}", one("int32", "")), &["types.parquet", "rows = ["]);
    }
}

#[test]
fn parquet_versions_and_codecs_hold_the_same_values() {
    let recipe = one("float64", "");
    let zstd = read(&fixture("types.parquet"), &recipe).unwrap();
    assert_eq!(read(&fixture("plain.parquet"), &recipe).unwrap(), zstd);
    assert_eq!(read(&fixture("snappy.parquet"), &recipe).unwrap(), zstd);
}

#[test]
fn parquet_that_cannot_become_tensors_is_refused_by_row_and_column() {
    let path = fixture("types.parquet");
    refused(&path, &one("holes", ""), &["types.parquet", "`holes`", "row 4 has no value"]);
    refused(&path, &one("ragged", ""), &["`ragged`", "different lengths"]);
    refused(&path, &one("day", ""), &["`day`", "holds dates; numbers, text"]);
    refused(&path, &one("text", ""), &["`text`", "index_of"]);
    refused(&path, &one("int31", ""), &["no column `int31`", "did you mean `int32`"]);
    refused(&path, &one("int32", "{ classes = 5 }"), &["types.parquet row 5", "`int32`", "class 5 is not in 0..5"]);
    refused(&path, &one("float32", "{ classes = 5 }"), &["float32", "integers"]);
    refused(&path, &one("text", "{ decode = \"grey\" }"), &["types.parquet", "neither JPEG nor PNG nor WebP"]);
    refused(&path, &one("int32", "{ decode = \"grey\" }"), &["int32", "cannot be decoded"]);
    refused(&path, &one("int32", "{ cast = \"float32\" }"), &["`float32` is not an element type"]);
    let tight = format!("memory_bytes = 100\n{}", one("picture.bytes", "{ decode = \"grey\" }"));
    refused(&path, &tight, &["row group 0 takes", "memory_bytes = 100 B"]);
}

#[test]
fn a_global_shuffle_that_memory_cannot_hold_is_refused_and_a_windowed_one_reads_every_row() {
    let config: DatasetConfig =
        toml::from_str(&format!("path = {:?}\nmemory_bytes = 1000\n{}", fixture("types.parquet"), one("int64", "")))
            .unwrap();
    let dataset = std::sync::Arc::new(Dataset::open(&config, Path::new("/")).unwrap());
    let options = |blocks| LoaderOptions { batch_size: 7, threads: 0, shuffle: blocks, ..LoaderOptions::default() };
    use updraft_data::Shuffle::*;
    // Three row groups of some 100 bytes fit; a bound of less than one would refuse to open.
    let mut samples = Loader::new(dataset.clone(), options(Blocks(1))).unwrap().batch(0).unwrap().samples;
    samples.sort_unstable();
    assert_eq!(samples, [0, 1, 2, 3, 4, 5, 6]);
    assert!(Loader::new(dataset, options(Global)).is_ok());

    let config = DatasetConfig { memory_bytes: 130, ..config };
    let dataset = std::sync::Arc::new(Dataset::open(&config, Path::new("/")).unwrap());
    let error = Loader::new(dataset, options(Global)).err().unwrap().to_string();
    assert!(error.contains("a global shuffle takes") && error.contains("memory_bytes = 130 B"), "{error}");
}

#[test]
fn numpy_arrays_of_every_type_order_and_endianness_are_read() {
    let arrays = read_npz(&fixture("arrays.npz"), MEMORY_BYTES).unwrap();
    let array = |name: &str| &arrays.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("{name}")).1;
    let counted: Vec<f64> = (0..24).map(f64::from).collect();
    assert_eq!(array("bool").to_bools().unwrap(), [true, false, false, true]);
    assert_eq!((array("f16").dtype(), f64s(array("f16"))), (DType::F16, vec![0.5, -2.0]));
    assert_eq!((array("f32_big").dtype(), f64s(array("f32_big"))), (DType::F32, vec![1.0, 2.0, 3.0, 4.0]));
    assert_eq!((array("f64_fortran").shape(), f64s(array("f64_fortran"))), ([2, 3, 4].as_slice(), counted.clone()));
    assert_eq!(f64s(array("u16_big_fortran")), counted[..6]);
    assert_eq!((array("i64_scalar").shape(), f64s(array("i64_scalar"))), ([].as_slice(), vec![-7.0]));
    assert_eq!(array("u8_empty").shape(), [0, 3]);
    let complex: Vec<u8> = [1.0f32, 2.0, 3.0, -4.0].iter().flat_map(|v| v.to_ne_bytes()).collect();
    assert_eq!((array("c64").dtype(), array("c64").bytes()), (DType::Complex64, &complex[..]));
    for (code, dtype) in
        [("i1", DType::I8), ("i8", DType::I64), ("u1", DType::U8), ("u8", DType::U64), ("f8", DType::F64)]
    {
        assert_eq!((array(code).dtype(), f64s(array(code))), (dtype, vec![1.0, 2.0, 100.0]), "{code}");
    }
    assert_eq!(f64s(&read_npy(&fixture("fortran.npy"), MEMORY_BYTES).unwrap()), counted);
}

#[test]
fn written_arrays_read_back_and_equal_arrays_give_equal_files() {
    let dir = tempfile::tempdir().unwrap();
    let arrays: Vec<(String, Tensor)> = read_npz(&fixture("arrays.npz"), MEMORY_BYTES).unwrap();
    let [a, b] = ["a.npz", "b.npz"].map(|name| dir.path().join(name));
    write_npz(&a, &arrays).unwrap();
    write_npz(&b, &arrays).unwrap();
    assert!(read_npz(&a, MEMORY_BYTES).unwrap() == arrays);
    assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());

    let error = write_npz(&a, &[("y".into(), Tensor::zeros(DType::BF16, &[1]).unwrap())]).unwrap_err();
    assert!(error.to_string().contains("`y`") && error.to_string().contains("bf16"), "{error}");
    assert!(read_npz(&a, MEMORY_BYTES).unwrap() == arrays, "a refused write changed the file");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "a refused write left a file");
}

#[test]
fn numpy_files_as_datasets_and_their_refusals() {
    let tensors = read(&fixture("compressed.npz"), "").unwrap();
    assert_eq!(
        tensors.iter().map(|(n, t)| (n.as_str(), t.shape())).collect::<Vec<_>>(),
        [("x", &[4, 3][..]), ("y", &[4])]
    );
    let normalized = read(
        &fixture("compressed.npz"),
        &one("x", "{ normalize = { mean = [0.0, 1.0, 2.0], std = [3.0] } }, { reshape = [3, 1] }"),
    )
    .unwrap();
    assert_eq!(normalized[0].1.shape(), [4, 3, 1]);
    assert_eq!(f64s(&normalized[0].1)[3..6], [1.0; 3]);
    let one_hot = read(&fixture("compressed.npz"), &one("y", "{ one_hot = 2 }")).unwrap();
    assert_eq!(f64s(&one_hot[0].1), [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]);
    assert_eq!(read(&fixture("fortran.npy"), "").unwrap()[0].1.shape(), [2, 3, 4]);

    let unequal = format!("{}\n{}", one("f16", ""), one("i1", ""));
    refused(&fixture("arrays.npz"), &unequal, &["`i1` holds 3 samples and `f16` 2"]);
    refused(&fixture("arrays.npz"), &one("i64_scalar", ""), &["`i64_scalar` has no dimension"]);
    refused(&fixture("arrays.npz"), &one("u8_empty", ""), &["arrays.npz", "no samples"]);
    refused(&fixture("objects.npz"), "", &["array `x`", "`<U1`", "known are bool"]);
    let error = read_npz(&fixture("arrays.npz"), 20).unwrap_err().to_string();
    assert!(error.contains("20 bytes allowed") || error.contains("allowed"), "{error}");
}

#[test]
fn csv_columns_are_typed_and_laid_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("iris.csv");
    std::fs::write(&path, "length, width ,count,kind\n1.5,2,3,\"a, b\"\n-4e-1,5.25,6,c\n").unwrap();
    let recipe = "[[tensors]]\nname = \"x\"\ncolumns = [\"length\", \"width\", \"count\"]\ntransform = [{ cast = \"f32\" }]\n\
                  [[tensors]]\nname = \"kind\"\ntransform = [{ index_of = [\"c\", \"a, b\"] }]\n\
                  [[tensors]]\nname = \"count\"";
    let tensors = read(&path, recipe).unwrap();
    assert_eq!(tensors[0].1, Tensor::new(&[2, 3], &[1.5f32, 2.0, 3.0, -0.4, 5.25, 6.0]).unwrap());
    assert_eq!(tensors[1].1, Tensor::vector(&[1i64, 0]));
    assert_eq!(tensors[2].1, Tensor::vector(&[3i64, 6]));
}

#[test]
fn blanks_round_text_of_a_csv_are_kept_and_round_its_numbers_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("blanks.csv");
    std::fs::write(&path, "text,number\n\" a\", 1\n\"\t\",2 \n").unwrap();
    let recipe = "[[tensors]]\nname = \"text\"\ntransform = [{ index_of = [\"a\", \"\\t\", \" a\"] }]\n\
                  [[tensors]]\nname = \"number\"";
    let tensors = read(&path, recipe).unwrap();
    assert_eq!(tensors[0].1, Tensor::vector(&[2i64, 1]));
    assert_eq!(tensors[1].1, Tensor::vector(&[1i64, 2]));
}

#[test]
fn bad_csv_is_refused_by_line_and_column() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.csv");
    for (text, recipe, words) in [
        ("a,b\n1,2\n3,nan\n", "", ["bad.csv line 3", "`b`", "`nan` is not a finite number"].as_slice()),
        ("a,b\n1,2\n3,\n", "", &["bad.csv line 3", "`b`", "empty"]),
        ("a,b\n1,2\n3, \n", "", &["bad.csv line 3", "`b`", "empty"]),
        ("a,b\n1,x\n2,\n", "", &["bad.csv line 3", "`b`", "empty"]),
        ("a,b\n1,2\n3\n", "", &["bad.csv", "line: 3"]),
        ("a,b\n", "", &["bad.csv", "no samples"]),
        ("", "", &["bad.csv", "no samples"]),
        ("a,a\n1,2\n", "", &["two columns `a`"]),
        ("a,b\n1,x\n", "", &["`b`", "holds text"]),
        ("a,b\n1,2\n", "[[tensors]]\nname = \"ab\"\ncolumns = [\"A\"]", &["no column `A`", "did you mean `a`"]),
        ("a,b\n1,2\n", "memory_bytes = 3", &["bad.csv", "8 B", "memory_bytes = 3 B"]),
        (
            "kind\nx\ny\n",
            "[[tensors]]\nname = \"kind\"\ntransform = [{ index_of = [\"x\"] }]",
            &["line 3", "`y` is not in the list"],
        ),
    ] {
        std::fs::write(&path, text).unwrap();
        refused(&path, recipe, words);
    }
}

/// A folder of classes with these (class, file name, bytes).
fn folder(files: &[(&str, &str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (class, name, bytes) in files {
        std::fs::create_dir_all(dir.path().join(class)).unwrap();
        std::fs::write(dir.path().join(class).join(name), bytes).unwrap();
    }
    dir
}

/// The only picture of a dataset, with one transform list, as (shape, values).
fn picture(name: &str, transform: &str) -> Tensor {
    let dir = folder(&[("a", name, &std::fs::read(fixture(name)).unwrap())]);
    read(dir.path(), &one("image", transform)).unwrap().remove(0).1
}

#[test]
fn pictures_are_decoded_converted_and_resized_as_by_pillow() {
    let pillow = read_npz(&fixture("pillow.npz"), MEMORY_BYTES).unwrap();
    for (array, file, transform, most, mean) in [
        ("grey", "colour.png", "{ decode = \"grey\" }", 0, 0.0),
        ("rgb", "colour.png", "{ decode = \"rgb\" }", 0, 0.0),
        ("palette", "palette.png", "{ decode = \"rgb\" }", 0, 0.0),
        ("alpha", "alpha.png", "{ decode = \"rgb\" }", 0, 0.0),
        // Both round to 8 bits after each of two passes with the same weights, but not in the same order; the first
        // rounding moves the second sum by at most half a level, which the second rounding can make one.
        ("down", "colour.png", "{ decode = \"rgb\" }, { resize = [11, 16] }", 1, 1.0),
        ("up", "colour.png", "{ decode = \"grey\" }, { resize = [60, 90] }", 1, 1.0),
        // Pillow does not round 16-bit grey to 8 bits; 65535 / 255 = 257.
        ("deep", "deep.png", "{ decode = \"grey\" }", 0, 0.0),
        // The JPEG standard lets two inverse transforms differ by a level in each of luma and the two colour planes,
        // and blue takes 1.772 of one of those.
        ("jpeg", "colour.jpg", "{ decode = \"rgb\" }", 3, 1.0),
    ] {
        let expected = &pillow.iter().find(|(n, _)| n == array).unwrap().1;
        let found = picture(file, transform);
        let (height, width) = (expected.shape()[0], expected.shape()[1]);
        let channels = expected.shape().get(2).copied().unwrap_or(1);
        assert_eq!(found.shape(), [1, channels, height, width], "{array}");
        let mut differences = Vec::new();
        for c in 0..channels {
            for at in 0..height * width {
                let pair = (found.bytes()[c * height * width + at], expected.bytes()[at * channels + c]);
                differences.push(pair.0.abs_diff(pair.1));
            }
        }
        let largest = differences.iter().max().copied().unwrap();
        let average = differences.iter().map(|d| f64::from(*d)).sum::<f64>() / differences.len() as f64;
        assert!(largest <= most && average <= mean, "{array}: largest difference {largest}, mean {average}");
    }
}

#[test]
fn crops_flips_and_normalisation_are_what_they_say() {
    let whole = picture("colour.png", "{ decode = \"rgb\" }");
    let middle = picture("colour.png", "{ decode = \"rgb\" }, { crop = [2, 3] }");
    let at = |c: usize, y: usize, x: usize| whole.bytes()[(c * 37 + y) * 53 + x];
    assert_eq!(middle.shape(), [1, 3, 2, 3]);
    assert_eq!(middle.bytes()[0], at(0, 17, 25));
    assert_eq!(middle.bytes()[17], at(2, 18, 27));
    let normalized = picture(
        "colour.png",
        "{ decode = \"rgb\" }, { normalize = { mean = [0.5, 0.25, 0.0], std = [0.5, 1.0, 2.0] } }",
    );
    let values = f64s(&normalized);
    for (c, mean, std) in [(0, 0.5, 0.5), (1, 0.25, 1.0), (2, 0.0, 2.0)] {
        let expected = (f64::from(at(c, 3, 4)) / 255.0 - mean) / std;
        assert!((values[(c * 37 + 3) * 53 + 4] - expected).abs() < 1e-6);
    }
}

#[test]
fn folders_give_classes_in_alphabetical_order_and_name_their_files() {
    let grey = std::fs::read(fixture("deep.png")).unwrap();
    let other = std::fs::read(fixture("colour.jpg")).unwrap();
    let decode = "{ decode = \"grey\" }, { resize = [4, 4] }";
    let dir = folder(&[("dog", "2.png", &grey), ("cat", "9.png", &grey), ("dog", "1.jpg", &other), (".git", "x", b"")]);
    let recipe = format!("{}\n[[tensors]]\nname = \"label\"", one("image", decode));
    let tensors = read(dir.path(), &recipe).unwrap();
    assert_eq!(tensors[1].1, Tensor::vector(&[0i64, 1, 1]));
    assert_eq!(tensors[0].1.shape(), [3, 1, 4, 4]);
    let config: DatasetConfig = toml::from_str(&format!("path = {:?}\n{recipe}", dir.path())).unwrap();
    assert_eq!(Dataset::open(&config, Path::new("/")).unwrap().facts().classes, Some(vec!["cat".into(), "dog".into()]));

    refused(dir.path(), &one("image", "{ decode = \"grey\" }"), &["1.jpg", "[1, 37, 53]", "[1, 6, 7]", "resize"]);
    refused(dir.path(), &one("image", "{ decode = \"grey\" }, { crop = [9, 9] }"), &["9.png", "9 x 9", "6 x 7"]);
    let broken = folder(&[("a", "1.png", &grey[..40])]);
    refused(broken.path(), &one("image", decode), &["1.png", "cannot be decoded"]);
    let stray = folder(&[("a", "notes.txt", b"x")]);
    refused(stray.path(), "", &["notes.txt", "png, jpg, jpeg"]);
    refused(folder(&[]).path(), "", &["no samples"]);
}

#[test]
fn labels_and_order_of_a_folder_are_those_of_its_url() {
    let grey = std::fs::read(fixture("deep.png")).unwrap();
    let other = std::fs::read(fixture("colour.jpg")).unwrap();
    // All of these come before `/`, so sorted as keys the folders would come the other way round.
    let dir = folder(&[
        ("cat", "1.png", &grey),
        ("cat", "1-b.png", &other),
        ("cat-big", "2.png", &grey),
        ("cat+dog", "3.png", &grey),
        ("cat.old", "4.png", &grey),
    ]);
    let open = |recipe: String| Dataset::open(&toml::from_str(&recipe).unwrap(), Path::new("/")).unwrap();
    let label = "[[tensors]]\nname = \"label\"";
    let expected = ["cat", "cat+dog", "cat-big", "cat.old"].map(str::to_owned).to_vec();
    let local = open(format!("path = {:?}\n{label}", dir.path()));
    let pattern = open(format!("path = \"{}/*/*\"\nformat = \"folder\"\n{label}", dir.path().display()));
    for dataset in [&local, &pattern] {
        assert_eq!(dataset.facts().classes.as_ref(), Some(&expected));
    }
    let names = |dataset: &Dataset| (0..5).map(|row| dataset.sample_name(row)).collect::<Vec<_>>();
    assert_eq!(names(&local), names(&pattern));
}

#[test]
fn a_picture_larger_than_memory_is_refused_unread() {
    let grey = std::fs::read(fixture("deep.png")).unwrap();
    let dir = folder(&[("a", "1.png", &grey), ("a", "huge.jpg", b"")]);
    // A file of nothing but a hole, larger than what a test could read.
    std::fs::File::options().write(true).open(dir.path().join("a/huge.jpg")).unwrap().set_len(1 << 40).unwrap();
    let words = ["huge.jpg", "1.00 TiB", "more than memory_bytes"];
    refused(dir.path(), "memory_bytes = 67108864", &words);
    let error = Shards::open(dir.path().to_str().unwrap(), None, 64 << 20, &Access::default()).err().unwrap();
    assert!(words.iter().all(|word| error.to_string().contains(word)), "{error}");
}

#[test]
fn impossible_recipes_are_refused_before_any_batch() {
    let path = fixture("types.parquet");
    let picture = |steps: &str| one("picture.bytes", &format!("{{ decode = \"grey\" }}, {steps}"));
    refused(&path, &picture("{ classes = 3 }"), &["`picture.bytes`", "is for numbers"]);
    refused(&path, &picture("\"to_float\", { resize = [2, 2] }"), &["after the pixels became floats"]);
    refused(&path, &picture("{ resize = [0, 2] }"), &["0 x 2 pixels"]);
    refused(&path, &picture("{ random_crop = { size = [2, 2], padding = 18446744073 } }"), &["pixels"]);
    refused(&path, &picture("{ normalize = { mean = [0.0], std = [0.0] } }"), &["divides by zero"]);
    refused(&path, &picture("{ normalize = { mean = [0.0, 1.0], std = [1.0] } }"), &["2 values of mean for 1"]);
    refused(&path, &one("int32", "{ resize = [2, 2] }"), &["is for pictures"]);
    refused(&path, &one("int32", "{ reshape = [2] }"), &["int32"]);
    refused(&path, &format!("{}\n{}", one("int32", ""), one("int32", "")), &["two tensors have this name"]);
    refused(&fixture("make.py"), "", &["make.py", "set `format`"]);
    refused(&fixture("nothing.csv"), "", &["nothing.csv"]);
    refused(&path, "format = \"folder\"", &["is a file; a folder was expected"]);

    let text = "format = { text = { context = 8, span = [0.5, 0.4] } }";
    refused(&fixture("make.py"), text, &["span"]);
    refused(&fixture("make.py"), "format = { text = { context = 100000 } }", &["too few for a context of 100000"]);
    refused(&fixture("deep.png"), "format = { text = { context = 1 } }", &["deep.png", "not UTF-8"]);
    assert!(toml::from_str::<DatasetConfig>("path = \"x\"\nbatch = 3").is_err());
}
