//! Token numbers of text.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use updraft_data::{Dataset, DatasetConfig, Loader, LoaderOptions};
use updraft_graph::Tensor;

fn csv(lines: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lines.csv");
    let quoted: Vec<String> = lines.iter().map(|l| format!("\"{}\"", l.replace('"', "\"\""))).collect();
    std::fs::write(&path, format!("text\n{}\n", quoted.join("\n"))).unwrap();
    (dir, path)
}

fn open(path: &Path, transforms: &[&str]) -> Result<Dataset, String> {
    let tensors: String = transforms
        .iter()
        .enumerate()
        .map(|(i, t)| {
            format!("[[tensors]]\nname = \"t{i}\"\ncolumns = [\"text\"]\ntransform = [{{ tokenize = {t} }}]\n")
        })
        .collect();
    let config: DatasetConfig = toml::from_str(&format!("path = {path:?}\nformat = \"csv\"\n{tensors}")).unwrap();
    Dataset::open(&config, &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokens"))
        .map_err(|e| e.to_string())
}

fn batch(dataset: Dataset, size: usize) -> Vec<Tensor> {
    let options = LoaderOptions { batch_size: size, ..LoaderOptions::default() };
    let batch = Loader::new(Arc::new(dataset), options).unwrap().batch(0).unwrap();
    batch.tensors.into_iter().map(|(_, tensor)| tensor).collect()
}

#[test]
fn without_a_file_a_token_is_a_byte() {
    let (_dir, path) = csv(&["abc", "é"]);
    let tensors = batch(open(&path, &["{ length = 4, pad = -1 }", "{ length = 4, output = \"mask\" }"]).unwrap(), 2);
    assert_eq!(tensors[0], Tensor::new(&[2, 4], &[97i64, 98, 99, -1, 0xC3, 0xA9, -1, -1]).unwrap());
    assert_eq!(tensors[1], Tensor::new(&[2, 4], &[1i64, 1, 1, 0, 1, 1, 0, 0]).unwrap());
    let cut = batch(open(&path, &["{ length = 2 }"]).unwrap(), 1);
    assert_eq!(cut[0], Tensor::new(&[1, 2], &[97i64, 98]).unwrap());
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let (_dir, path) = csv(&["abc"]);
    assert!(open(&path, &["{ length = 0 }"]).err().unwrap().contains("`length`"));
    assert!(open(&path, &["{ output = \"mask\" }"]).err().unwrap().contains("without `length`"));
    assert!(open(&path, &["{ file = \"nothing.json\", length = 4 }"]).err().unwrap().contains("nothing.json"));
}

#[cfg(feature = "tokenizers")]
#[test]
fn files_of_tokenizers_give_the_numbers_of_the_python_package() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokens");
    let text = std::fs::read_to_string(fixtures.join("expected.json")).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(cases.len(), 65);
    let lines: Vec<&str> = cases.iter().map(|c| c["text"].as_str().unwrap()).collect();
    let (_dir, path) = csv(&lines);
    let plain = "{ file = \"tokenizer.json\", length = 200, pad = -1, special_tokens = false }";
    let special = "{ file = \"tokenizer.json\", length = 200, pad = -1 }";
    let cut = "{ file = \"tokenizer.json\", length = 8, pad = -1 }";
    let tensors = batch(open(&path, &[plain, special, cut]).unwrap(), cases.len());
    for (tensor, which) in tensors.iter().zip(["plain", "special", "cut"]) {
        for (row, case) in tensor.as_slice::<i64>().unwrap().chunks_exact(tensor.shape()[1]).zip(&cases) {
            let expected: Vec<i64> = case[which].as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect();
            assert_eq!(row[..expected.len()], expected, "{}", case["text"]);
            assert!(row[expected.len()..].iter().all(|n| *n == -1));
        }
    }
}

#[cfg(feature = "tokenizers")]
#[test]
fn files_that_draw_at_random_and_lengths_without_room_are_refused() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokens");
    let (dir, path) = csv(&["abc"]);
    let refused = |json: &str, length: usize| {
        std::fs::write(dir.path().join("t.json"), json).unwrap();
        let file = format!("{{ file = {:?}, length = {length} }}", dir.path().join("t.json"));
        open(&path, &[&file]).err()
    };
    let json = std::fs::read_to_string(fixtures.join("tokenizer.json")).unwrap();
    let dropout = json.replace("\"dropout\":null", "\"dropout\":0.1");
    assert_ne!(dropout, json);
    let error = refused(&dropout, 8).unwrap();
    assert!(error.contains("t.json") && error.contains("`model.dropout` of 0.1"), "{error}");
    assert!(refused(&json, 1).unwrap().contains("adds 2 special tokens"));
    assert_eq!(refused(&json, 2), None);
}

#[cfg(feature = "tokenizers")]
#[test]
fn the_content_of_the_file_is_part_of_the_pipeline() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokens");
    let (dir, path) = csv(&["abc"]);
    let json = std::fs::read_to_string(fixtures.join("tokenizer.json")).unwrap();
    let digest = |json: &str| {
        std::fs::write(dir.path().join("t.json"), json).unwrap();
        let file = format!("{{ file = {:?}, length = 4 }}", dir.path().join("t.json"));
        open(&path, &[&file]).unwrap().facts().pipeline
    };
    assert_ne!(digest(&json), digest(&format!("{json}\n")));
}
