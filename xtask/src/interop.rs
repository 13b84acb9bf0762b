//! Data formats against their originals: MosaicML Streaming, WebDataset, TensorFlow and pyarrow write datasets that we
//! read, and read those that we write. Every cell must be the same, in both directions.
//!
//! Both sides list their cells as text, one line each; what is compared is those lists. Large packages are installed
//! without what they would pull in and reading and writing does not use.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use clap::Args;
use updraft_base::Key;
use updraft_data::write::{WriteOptions, mds_index, writer};
use updraft_data::{
    Access, Cells, Column, DatasetConfig, Kind, Manifest, Rows, Schema, ShardFacts, ShardFormat, Shards,
};
use updraft_graph::{DType, Tensor};

use crate::{Failure, python};

/// Options of `interop`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// The Python interpreter to use, instead of an environment made under target/.
    #[arg(long)]
    python: Option<PathBuf>,
}

/// What is installed with all that it asks for.
const PACKAGES: &[&str] = &[
    "numpy==2.4.6",
    "pyarrow==26.0.1",
    "pillow==13.0.0",
    "webdataset==1.0.2",
    "brotli==1.2.1",
    "python-snappy==0.7.3",
    "zstd==1.5.7.2",
    "xxhash==4.1.0",
    "tqdm==4.70.1",
    "typing_extensions==4.16.0",
    "filelock==4.2.11",
    "absl-py==2.5.1",
    "astunparse==1.6.3",
    "flatbuffers==25.12.19",
    "gast==0.7.0",
    "google-pasta==0.2.0",
    "ml_dtypes==0.6.0",
    "opt_einsum==3.4.0",
    "packaging==26.3",
    "protobuf==7.36.2",
    "requests==2.34.2",
    "six==1.17.0",
    "termcolor==3.3.0",
    "wrapt==2.5.2",
];

/// What would pull in PyTorch, cloud clients or Keras.
const PACKAGES_ALONE: &[&str] = &["mosaicml-streaming==0.13.0", "tensorflow-cpu==2.21.0"];

/// Datasets that the originals write.
const THEIRS: &[(&str, &str)] = &[
    ("mds", "mosaicml-streaming"),
    ("mds_zstd", "mosaicml-streaming"),
    ("mds_gz", "mosaicml-streaming"),
    ("tar", "webdataset"),
    ("tar_gz", "webdataset"),
    ("tfrecord", "tensorflow"),
    ("tfrecord_gz", "tensorflow"),
    ("tfrecord_numbered", "tensorflow"),
    ("parquet_snappy", "pyarrow"),
    ("parquet_zstd", "pyarrow"),
    ("arrow_file", "pyarrow"),
    ("arrow_stream", "pyarrow"),
    ("feather_lz4", "pyarrow"),
    ("jsonl", "json"),
    ("csv", "pyarrow"),
    ("parquet_lz4", "pyarrow"),
    ("parquet_delta", "pyarrow"),
    ("arrow_nested", "pyarrow"),
    ("csv_gz", "pyarrow"),
    ("tsv", "pyarrow"),
    ("jsonl_zst", "json"),
];

/// Datasets that we write.
const OURS: &[(&str, ShardFormat, bool, &str)] = &[
    ("mds", ShardFormat::Mds, false, "mosaicml-streaming"),
    ("mds_zstd", ShardFormat::Mds, true, "mosaicml-streaming"),
    ("tar", ShardFormat::Tar, false, "webdataset"),
    ("tfrecord", ShardFormat::TfRecord, false, "tensorflow"),
    ("parquet", ShardFormat::Parquet, false, "pyarrow"),
    ("parquet_zstd", ShardFormat::Parquet, true, "pyarrow"),
];

/// Lets both sides write and read, and prints what came of it.
pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<(), Failure> {
    let interpreter = match &arguments.python {
        Some(python) => python.clone(),
        None => python::environment_with(root, "interop", PACKAGES, PACKAGES_ALONE)?,
    };
    let folder = root.join("target/interop");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    let (theirs, ours) = (folder.join("theirs"), folder.join("ours"));
    fs::create_dir_all(&theirs)?;
    fs::create_dir_all(&ours)?;
    let script = root.join("xtask/src/interop.py");
    python::run(Command::new(&interpreter).arg(&script).arg("write").arg(&theirs))?;
    for (name, format, compress, _) in OURS {
        write_ours(&ours, name, *format, *compress)?;
    }
    python::run(Command::new(&interpreter).arg(&script).arg("read").arg(&ours))?;

    println!("{:<10} {:<16} {:<20} {:>8} {:>8}  result", "direction", "dataset", "original", "cells", "differ");
    let mut failures = 0;
    for (name, original) in THEIRS {
        let expected = fs::read_to_string(theirs.join(format!("{name}.cells")))?;
        let found = list_theirs(&theirs.join(name));
        failures += usize::from(!report("read", name, original, &expected, found));
    }
    for (name, _, _, original) in OURS {
        let expected = fs::read_to_string(ours.join(format!("{name}.cells")))?;
        let found = fs::read_to_string(ours.join(format!("{name}.theirs.cells"))).map_err(Failure::from);
        failures += usize::from(!report("written", name, original, &expected, found));
    }
    if failures > 0 { Err(format!("interop: {failures} datasets differ").into()) } else { Ok(()) }
}

fn report(direction: &str, name: &str, original: &str, expected: &str, found: Result<String, Failure>) -> bool {
    let cells = expected.lines().count();
    let (differ, result) = match found {
        Err(failure) => (cells, failure.to_string()),
        Ok(found) => {
            let pairs = expected.lines().zip(found.lines()).filter(|(a, b)| a != b);
            let differ = pairs.clone().count() + cells.abs_diff(found.lines().count());
            let first = pairs.clone().next();
            let first = first.map(|(a, b)| format!("{a:.80} became {b:.80}"));
            (differ, first.unwrap_or_else(|| if differ == 0 { "equal".into() } else { "rows are missing".into() }))
        }
    };
    println!("{direction:<10} {name:<16} {original:<20} {cells:>8} {differ:>8}  {result}");
    differ == 0 && cells > 0
}

/// The cells of a dataset that another wrote.
fn list_theirs(path: &Path) -> Result<String, Failure> {
    let config: DatasetConfig = toml::from_str(&format!("path = {path:?}"))?;
    let shards = Shards::find(&config, Path::new("/"), &Access::default())?;
    let mut out = String::new();
    let mut first = 0;
    for shard in 0..shards.facts.len() {
        shards.verify(shard)?;
        let reader = shards.open(shard)?;
        for block in 0..reader.blocks().len() {
            let rows = reader.read_block(block)?;
            list(&rows, first, &mut out)?;
            first += rows.len();
        }
    }
    Ok(out)
}

/// Appends the cells of rows, columns by name.
fn list(rows: &Rows, first: usize, out: &mut String) -> Result<(), Failure> {
    let columns: BTreeMap<&str, usize> =
        rows.schema.columns.iter().enumerate().map(|(at, c)| (c.name.as_str(), at)).collect();
    for row in 0..rows.len() {
        for (name, at) in &columns {
            let one = rows.columns[*at].gather(std::iter::once(row));
            let (kind, content) = match (&one, &rows.schema.columns[*at].kind) {
                (Cells::Bytes(cells), kind) => (kind.to_string(), cells[0].to_vec()),
                (Cells::Numbers(t), _) => (format!("{}{:?}", t.dtype(), &t.shape()[1..]), t.bytes().to_vec()),
                (Cells::Lists(lists), _) => {
                    (format!("{}{:?}", lists[0].dtype(), lists[0].shape()), lists[0].bytes().to_vec())
                }
            };
            let hex: String = content.iter().map(|b| format!("{b:02x}")).collect();
            writeln!(out, "{} {name} {kind} {hex}", first + row)?;
        }
    }
    Ok(())
}

const ROWS: usize = 61;

/// Random rows of all that a format holds.
fn random_rows(format: ShardFormat, key: &Key) -> Result<Rows, Failure> {
    let mut counter = 0;
    let mut draw = || {
        counter += 2;
        u64::from(key.bits(counter)) << 32 | u64::from(key.bits(counter + 1))
    };
    let number = |dtype, shape: &[usize]| Kind::Number { dtype, shape: shape.to_vec() };
    let columns: Vec<(&str, Kind)> = match format {
        ShardFormat::Tar => vec![
            ("a.bin", Kind::Bytes),
            ("b.txt", Kind::Text),
            ("c.cls", number(DType::I64, &[])),
            ("d.npy", number(DType::F32, &[2, 3])),
            ("e.npy", Kind::List { dtype: DType::U16 }),
        ],
        ShardFormat::TfRecord => vec![
            ("bytes", Kind::Bytes),
            ("number", number(DType::I64, &[])),
            ("real", number(DType::F32, &[])),
            ("vector", number(DType::F32, &[7])),
            ("list", Kind::List { dtype: DType::I64 }),
        ],
        _ => vec![
            ("zeta", Kind::Bytes),
            ("text", Kind::Text),
            ("i8", number(DType::I8, &[])),
            ("u16", number(DType::U16, &[])),
            ("i64", number(DType::I64, &[])),
            ("u64", number(DType::U64, &[])),
            ("f16", number(DType::F16, &[])),
            ("f32", number(DType::F32, &[])),
            ("f64", number(DType::F64, &[])),
            ("vector", number(DType::F32, &[7])),
            ("list", Kind::List { dtype: DType::I32 }),
        ],
    };
    let mut cells = Vec::new();
    for (_, kind) in &columns {
        let mut elements = |dtype: DType, count: usize| -> Result<Tensor, Failure> {
            let values: Vec<f64> = (0..count).map(|_| (draw() >> 40) as f64 / 64.0 - 1e5).collect();
            let words: Vec<u8> =
                (0..count).flat_map(|_| draw().to_ne_bytes()[..dtype.size_in_memory()].to_vec()).collect();
            let is_float = matches!(dtype, DType::F16 | DType::F32 | DType::F64);
            let made = if is_float {
                Tensor::from_f64(dtype, &[count], &values)
            } else {
                Tensor::from_bytes(dtype, &[count], &words)
            };
            Ok(made?)
        };
        let mut length = 0;
        let mut lengths = || {
            length = (length * 31 + 17) % 113;
            length + 1
        };
        cells.push(match kind {
            Kind::Bytes => {
                let cells: Result<Vec<_>, Failure> =
                    (0..ROWS).map(|_| Ok(elements(DType::U8, lengths() - 1)?.bytes().to_vec().into())).collect();
                Cells::Bytes(cells?)
            }
            Kind::Text => Cells::Bytes((0..ROWS).map(|_| "aé漢🙂 \n".repeat(lengths() % 5).into()).collect()),
            Kind::List { dtype } => {
                let lists: Result<Vec<_>, Failure> = (0..ROWS).map(|_| elements(*dtype, lengths())).collect();
                Cells::Lists(lists?)
            }
            Kind::Number { dtype, shape } => {
                let shape = [&[ROWS], shape.as_slice()].concat();
                Cells::Numbers(elements(*dtype, shape.iter().product())?.reshaped(&shape)?)
            }
        });
    }
    let columns = columns.into_iter().map(|(name, kind)| Column { name: name.into(), kind }).collect();
    Ok(Rows::new(Arc::new(Schema::new(columns)?), cells)?)
}

/// Writes a dataset of three shards, what an original needs beside them, our manifest, and the list of its cells.
fn write_ours(folder: &Path, name: &str, format: ShardFormat, compress: bool) -> Result<(), Failure> {
    let path = folder.join(name);
    fs::create_dir_all(&path)?;
    let options = WriteOptions { compress, row_group_bytes: 4000, ..WriteOptions::default() };
    let rows = random_rows(format, &Key::new(7).child(name))?;
    let mut facts: Vec<ShardFacts> = Vec::new();
    for (shard, start) in (0..ROWS).step_by(25).enumerate() {
        let mut out = writer(format, rows.schema.clone(), &options)?;
        out.push(&rows.slice(start..(start + 25).min(ROWS)))?;
        let (bytes, known) = out.finish()?;
        let end = if compress && format == ShardFormat::Mds { ".zstd" } else { "" };
        let key = format!("shard.{shard:05}.{}{end}", format.name());
        fs::write(path.join(&key), &bytes)?;
        facts.push(ShardFacts { key, ..known });
    }
    if format == ShardFormat::Mds {
        fs::write(path.join("index.json"), mds_index(&rows.schema, &facts, &options)?)?;
    }
    let objects = updraft_store::Objects::open(&path.to_string_lossy(), &BTreeMap::new(), &Default::default())?;
    Manifest::new((*rows.schema).clone(), facts).commit(&objects)?;
    let mut out = String::new();
    if format == ShardFormat::Tar {
        // Rows without keys are numbered in each shard.
        let keys = (0..ROWS).map(|row| format!("{:09}", row % 25).into()).collect();
        let mut schema = (*rows.schema).clone();
        schema.columns.push(Column { name: "__key__".into(), kind: Kind::Text });
        let keyed = Rows::new(schema.into(), [rows.columns.clone(), vec![Cells::Bytes(keys)]].concat())?;
        list(&keyed, 0, &mut out)?;
    } else if format == ShardFormat::TfRecord {
        // Features that are one number are lists of one.
        let one = |cells: &Cells| match cells {
            Cells::Numbers(t) if t.rank() == 1 => Ok(Cells::Numbers(t.reshaped(&[t.len(), 1])?)),
            other => Ok::<Cells, Failure>(other.clone()),
        };
        let columns = rows.columns.iter().map(one).collect::<Result<Vec<_>, _>>()?;
        list(&Rows { schema: rows.schema.clone(), columns }, 0, &mut out)?;
    } else {
        list(&rows, 0, &mut out)?;
    }
    fs::write(folder.join(format!("{name}.cells")), out)?;
    Ok(())
}
