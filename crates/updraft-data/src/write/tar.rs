//! Tar archives as WebDataset reads them: one file for each cell, named by its row and its column.
//!
//! Headers are plain ustar with a pax header only where a name is too long; owner, group and time are zero, so that equal
//! rows give equal bytes. A column `__key__` of text names the rows; without it, rows are numbered.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use updraft_graph::{DType, Tensor};

use crate::error::DataError;
use crate::manifest::ShardFacts;
use crate::npy;
use crate::rows::{Cells, Rows};
use crate::schema::{Kind, Schema};
use crate::source::shard::{BLOCK_BYTES, Block, ShardFormat};
use crate::source::tar::{KEY, RECORD_BYTES, kind_of_extension};
use crate::write::{Cell, ShardWriter, cell, check_rows, refused};

pub(super) struct TarWriter {
    schema: Arc<Schema>,
    /// The place of the column of keys.
    key: Option<usize>,
    keys: HashSet<String>,
    out: Vec<u8>,
    blocks: Vec<Block>,
    rows: u64,
}

impl TarWriter {
    pub(super) fn new(schema: Arc<Schema>) -> Result<TarWriter, DataError> {
        for column in &schema.columns {
            let name = &column.name;
            if name == KEY {
                if column.kind != Kind::Text {
                    return Err(refused(name, "names the rows and must be text"));
                }
                continue;
            }
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
            if name.is_empty() || !name.chars().all(plain) || name.starts_with('.') {
                return Err(refused(name, "becomes an extension: lower-case letters, digits, `.`, `_` and `-`"));
            }
            // What a reader will take the extension to be must be what is written.
            let agrees = match (kind_of_extension(name), &column.kind) {
                (Some(read), written) => read == *written,
                (None, Kind::Number { .. } | Kind::List { .. }) => true,
                (None, _) => false,
            };
            if !agrees {
                let advice = match &column.kind {
                    Kind::Bytes => "`bin`, `jpg`, `png` or another of bytes",
                    Kind::Text => "`txt` or `json`",
                    Kind::Number { dtype: DType::I64, shape } if shape.is_empty() => "`cls` or `npy`",
                    _ => "`npy`",
                };
                return Err(refused(name, format!("is {}; end its name with the extension {advice}", column.kind)));
            }
        }
        if schema.columns.iter().all(|c| c.name == KEY) {
            return Err(refused(KEY, "is the only column, and a row without files is none"));
        }
        let key = schema.index_of(KEY);
        Ok(TarWriter { schema, key, keys: HashSet::new(), out: Vec::new(), blocks: Vec::new(), rows: 0 })
    }

    fn file(&mut self, name: &str, data: &[u8]) {
        // A header holds 100 bytes of a name.
        if name.len() > 100 {
            let record = pax_record("path", name);
            self.entry("PaxHeader", b'x', record.as_bytes());
            self.entry(&name[..name.floor_char_boundary(100)], b'0', data);
        } else {
            self.entry(name, b'0', data);
        }
    }

    fn entry(&mut self, name: &str, kind: u8, data: &[u8]) {
        let mut header = [0u8; RECORD_BYTES];
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(0, name.as_bytes());
        put(100, b"0000644\0");
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        // Eleven octal digits hold 8 GiB; more is written in binary, as GNU and pax readers know it.
        let size = data.len() as u64;
        if size < 1 << 33 {
            put(124, format!("{size:011o}\0").as_bytes());
        } else {
            let mut binary = [0; 12];
            binary[0] = 0x80;
            binary[4..].copy_from_slice(&size.to_be_bytes());
            put(124, &binary);
        }
        put(136, b"00000000000\0");
        put(148, b"        ");
        put(156, &[kind]);
        put(257, b"ustar\x0000");
        let sum: u64 = header.iter().map(|b| u64::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.out.extend_from_slice(&header);
        self.out.extend_from_slice(data);
        self.out.resize(self.out.len().next_multiple_of(RECORD_BYTES), 0);
    }
}

/// `length key=value`, where the length counts itself.
fn pax_record(key: &str, value: &str) -> String {
    let rest = format!(" {key}={value}\n");
    let mut length = rest.len();
    while format!("{length}{rest}").len() != length {
        length = format!("{length}{rest}").len();
    }
    format!("{length}{rest}")
}

/// The bytes of a file.
fn content(name: &str, cells: &Cells, row: usize) -> Result<Vec<u8>, String> {
    match cell(cells, row) {
        Cell::Bytes(bytes) => Ok(bytes.to_vec()),
        Cell::Numbers(DType::I64, [], elements) if kind_of_extension(name).is_some() => {
            let value = elements.first_chunk::<8>().map_or(0, |word| i64::from_ne_bytes(*word));
            Ok(value.to_string().into_bytes())
        }
        Cell::Numbers(dtype, shape, elements) => {
            let tensor = Tensor::from_bytes(dtype, shape, elements).map_err(|e| e.to_string())?;
            Ok([npy::header_of(&tensor)?.as_slice(), tensor.bytes()].concat())
        }
    }
}

impl ShardWriter for TarWriter {
    fn push(&mut self, rows: &Rows) -> Result<(), DataError> {
        check_rows(&self.schema, rows)?;
        let schema = self.schema.clone();
        for row in 0..rows.len() {
            let key = match self.key.map(|place| cell(&rows.columns[place], row)) {
                Some(Cell::Bytes(key)) => String::from_utf8_lossy(key).into_owned(),
                _ => format!("{:09}", self.rows),
            };
            let last = key.rsplit('/').next().unwrap_or_default();
            if last.is_empty() || last.contains('.') || key.contains('\0') || last.starts_with("__") {
                return Err(refused(KEY, format!("`{key:.100}` is no name of a row: no dots, and not empty")));
            }
            if !self.keys.insert(key.clone()) {
                return Err(refused(KEY, format!("two rows are named `{key:.100}`")));
            }
            let offset = self.out.len() as u64;
            for (column, cells) in schema.columns.iter().zip(&rows.columns).filter(|(c, _)| c.name != KEY) {
                let data = content(&column.name, cells, row).map_err(|reason| refused(&column.name, reason))?;
                self.file(&format!("{key}.{}", column.name), &data);
            }
            match self.blocks.last_mut() {
                Some(block) if self.out.len() as u64 - block.offset <= BLOCK_BYTES => block.rows += 1,
                _ => self.blocks.push(Block { rows: 1, offset }),
            }
            self.rows += 1;
        }
        Ok(())
    }

    fn bytes(&self) -> u64 {
        (self.out.len() + 2 * RECORD_BYTES) as u64
    }

    fn rows(&self) -> u64 {
        self.rows
    }

    fn finish(mut self: Box<Self>) -> Result<(Bytes, ShardFacts), DataError> {
        self.out.resize(self.out.len() + 2 * RECORD_BYTES, 0);
        let bytes = Bytes::from(self.out);
        let mut facts = ShardFacts::new("", ShardFormat::Tar, bytes.len() as u64, self.rows).hashed(&bytes);
        facts.blocks = self.blocks;
        Ok((bytes, facts))
    }
}
