//! Tar archives as WebDataset reads them: files that share a name up to the first dot of its last part are one row, and
//! what is behind the dot names the column.
//!
//! The archive is POSIX ustar with pax headers for long names and sizes, and GNU's long names (`tar(5)` of libarchive
//! describes all of them). Columns become what their extension says: `cls`, `index` and their like are integers, `txt` and
//! `json` text, `npy` numbers, and all else bytes.

use std::ops::Range;

use bytes::Bytes;
use updraft_graph::{DType, Tensor};

use crate::error::DataError;
use crate::npy;
use crate::rows::Cells;
use crate::schema::{Column, Kind, Schema};
use crate::source::cells::CellsBuilder;
use crate::source::input::{Content, Walk};
use crate::source::records::{BlockBytes, BrokenRow, Records};

/// Tar's unit.
pub(crate) const RECORD_BYTES: usize = 512;

/// The column with the name that the files of a row share.
pub(crate) const KEY: &str = "__key__";

/// Bytes of a pax header or a long name, at most: paths are far shorter.
const NAME_BYTES_MAX: u64 = 1 << 20;

/// Files of one row, at most.
const FILES_MAX: usize = 4096;

/// Rows that are looked at to learn the columns.
const INFER_ROWS: usize = 64;

/// What an extension (its last part) says of a column.
pub(crate) fn kind_of_extension(extension: &str) -> Option<Kind> {
    match extension.rsplit('.').next().unwrap_or(extension) {
        "cls" | "cls2" | "class" | "count" | "index" | "inx" | "id" => Some(Kind::scalar(DType::I64)),
        "txt" | "text" | "transcript" | "json" | "jsn" => Some(Kind::Text),
        "npy" => None,
        _ => Some(Kind::Bytes),
    }
}

/// Tar as rows.
pub(crate) struct Tar {
    /// The most memory that a file may take.
    pub memory_bytes: u64,
}

/// A file in an archive.
struct Member {
    name: String,
    size: u64,
}

/// Where bytes of an archive come from: a walk over an object, or a block in memory.
trait Stream {
    fn take(&mut self, count: u64, what: &str) -> Result<Bytes, Broken>;
    fn skip(&mut self, count: u64, what: &str) -> Result<(), Broken>;
    fn rest(&self) -> u64;
    fn position(&self) -> u64;
}

/// An error that already names its place, or one that does not.
enum Broken {
    Data(DataError),
    Reason(String),
}

impl From<String> for Broken {
    fn from(reason: String) -> Broken {
        Broken::Reason(reason)
    }
}

impl Stream for Walk<'_> {
    fn take(&mut self, count: u64, what: &str) -> Result<Bytes, Broken> {
        Walk::take(self, count, what).map_err(Broken::Data)
    }

    fn skip(&mut self, count: u64, what: &str) -> Result<(), Broken> {
        Walk::skip(self, count, what).map_err(Broken::Data)
    }

    fn rest(&self) -> u64 {
        Walk::rest(self)
    }

    fn position(&self) -> u64 {
        Walk::position(self)
    }
}

/// A block in memory, and how far it was read.
struct Cursor<'a> {
    bytes: &'a Bytes,
    at: usize,
}

impl Stream for Cursor<'_> {
    fn take(&mut self, count: u64, what: &str) -> Result<Bytes, Broken> {
        let start = self.at;
        self.skip(count, what)?;
        Ok(self.bytes.slice(start..self.at))
    }

    fn skip(&mut self, count: u64, what: &str) -> Result<(), Broken> {
        if count > self.rest() {
            return Err(format!("{what} takes {count} bytes, and {} are left", self.rest()).into());
        }
        self.at += count as usize;
        Ok(())
    }

    fn rest(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn position(&self) -> u64 {
        self.at as u64
    }
}

/// The number in a field of a header: octal digits, or big-endian binary after a first bit that is set.
fn number(field: &[u8]) -> Option<u64> {
    if field.first()? & 0x80 != 0 {
        let (high, low) = field.split_at(field.len().saturating_sub(8));
        let zeros = high.iter().enumerate().all(|(at, byte)| *byte == if at == 0 { 0x80 } else { 0 });
        return zeros.then(|| low.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)));
    }
    let digits = field.split(|b| *b == 0 || *b == b' ').find(|part| !part.is_empty())?;
    let text = std::str::from_utf8(digits).ok()?;
    u64::from_str_radix(text, 8).ok()
}

fn text(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

fn padding(size: u64) -> u64 {
    size.next_multiple_of(RECORD_BYTES as u64) - size
}

/// Bytes that are looked at together behind the end of an archive, which writers fill up to 10 KiB.
const END_BYTES: u64 = 1 << 20;

/// Passes over all that follows the first record of zeros. Files behind it would be rows that are lost without a word.
fn end_in_zeros(stream: &mut impl Stream) -> Result<(), Broken> {
    let end = stream.position() - RECORD_BYTES as u64;
    while stream.rest() > 0 {
        let start = stream.position();
        let bytes = stream.take(stream.rest().min(END_BYTES), "the end of the archive")?;
        if let Some(at) = bytes.iter().position(|b| *b != 0) {
            let reason = format!(
                "zeros at byte {end} end the archive, and more follows at byte {}: it is damaged there, or archives were \
                 joined; write such as one",
                start + at as u64
            );
            return Err(reason.into());
        }
    }
    Ok(())
}

/// Refuses what stands for a file whose bytes are not all there, and would be taken for the file itself.
fn refuse_sparse(key: &[u8]) -> Result<(), String> {
    if !key.starts_with(b"GNU.sparse.") {
        return Ok(());
    }
    let key = String::from_utf8_lossy(key).into_owned();
    Err(format!("a file is stored without its holes (`{key:.200}`), which is not read; write it without --sparse"))
}

/// Reads up to the data of the next file; `None` at the end of the archive. Folders are passed over.
fn next_member(stream: &mut impl Stream, memory_bytes: u64) -> Result<Option<Member>, Broken> {
    let mut long_name: Option<Vec<u8>> = None;
    let mut long_size: Option<u64> = None;
    loop {
        if stream.rest() == 0 {
            return Err("ends without the zeros that end an archive: it is cut off".to_owned().into());
        }
        let header = stream.take(RECORD_BYTES as u64, "the header of a file")?;
        if header.iter().all(|b| *b == 0) {
            return end_in_zeros(stream).map(|()| None);
        }
        let sum: u64 =
            header.iter().enumerate().map(|(at, b)| u64::from(if (148..156).contains(&at) { b' ' } else { *b })).sum();
        if number(&header[148..156]) != Some(sum) {
            return Err("the header of a file has a wrong checksum: it is damaged, or this is no tar"
                .to_owned()
                .into());
        }
        let claimed = number(&header[124..136]).ok_or_else(|| "a file has a size that is no number".to_owned())?;
        let special = |stream: &mut dyn FnMut(u64) -> Result<Bytes, Broken>| {
            if claimed > NAME_BYTES_MAX {
                return Err(Broken::Reason(format!("a name of {claimed} bytes")));
            }
            stream(claimed)
        };
        match header[156] {
            b'L' | b'x' => {
                let data = special(&mut |count| stream.take(count, "a long name"))?;
                stream.skip(padding(claimed), "padding")?;
                if header[156] == b'L' {
                    long_name = Some(text(&data).to_vec());
                } else {
                    for (key, value) in pax(&data)? {
                        refuse_sparse(key)?;
                        match key {
                            b"path" => long_name = Some(value.to_vec()),
                            b"size" => {
                                let size = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
                                long_size = Some(size.ok_or_else(|| "a pax size that is no number".to_owned())?);
                            }
                            _ => {}
                        }
                    }
                }
            }
            // Facts for all files that follow: none of what is read of them matters to us.
            b'g' => {
                let data = special(&mut |count| stream.take(count, "a global header"))?;
                pax(&data)?.into_iter().try_for_each(|(key, _)| refuse_sparse(key))?;
                stream.skip(padding(claimed), "padding")?;
            }
            b'5' => (long_name, long_size) = (None, None),
            b'0' | 0 | b'7' => {
                let size = long_size.unwrap_or(claimed);
                let name = match long_name {
                    Some(name) => name,
                    None if &header[257..262] == b"ustar" && header[345] != 0 && header[263] != b' ' => {
                        [text(&header[345..500]), b"/", text(&header[..100])].concat()
                    }
                    None => text(&header[..100]).to_vec(),
                };
                let name = String::from_utf8(name).map_err(|_| "a file whose name is not UTF-8".to_owned())?;
                if size > memory_bytes {
                    return Err(
                        format!("file `{name:.200}` of {size} bytes, more than memory_bytes = {memory_bytes}").into()
                    );
                }
                return Ok(Some(Member { name, size }));
            }
            other => {
                let name = String::from_utf8_lossy(text(&header[..100])).into_owned();
                let reason = format!("`{name:.200}` is of type {:?}; files and folders are read", char::from(other));
                return Err(reason.into());
            }
        }
    }
}

/// A key and its value.
type PaxRecord<'a> = (&'a [u8], &'a [u8]);

/// The records `length key=value` of a pax header.
fn pax(mut data: &[u8]) -> Result<Vec<PaxRecord<'_>>, String> {
    let broken = || "a pax header is not understood".to_owned();
    let mut records = Vec::new();
    while !data.is_empty() {
        let space = data.iter().position(|b| *b == b' ').ok_or_else(broken)?;
        let length: usize = std::str::from_utf8(&data[..space]).ok().and_then(|t| t.parse().ok()).ok_or_else(broken)?;
        let record = data.get(space + 1..length).and_then(|r| r.strip_suffix(b"\n")).ok_or_else(broken)?;
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(broken)?;
        records.push((&record[..equals], &record[equals + 1..]));
        data = &data[length..];
    }
    Ok(records)
}

/// The name that files of a row share, and the column of this one. `None` for what is not part of any row: hidden files, as
/// systems leave them in archives, too.
fn split_name(name: &str) -> Result<Option<(&str, String)>, String> {
    let start = name.rfind('/').map_or(0, |slash| slash + 1);
    let base = &name[start..];
    // WebDataset's files about the archive itself.
    if base.starts_with('.') || (base.starts_with("__") && base.ends_with("__")) {
        return Ok(None);
    }
    let dot = base.find('.').ok_or_else(|| format!("file `{name:.200}` has no extension to name its column"))?;
    Ok(Some((&name[..start + dot], base[dot + 1..].to_ascii_lowercase())))
}

/// One row: its key, and its files with their columns.
struct Group {
    key: String,
    files: Vec<(String, Bytes)>,
}

/// Groups files into rows, one file ahead.
struct Groups<S> {
    stream: S,
    /// A file that was read and belongs to the next row.
    pending: Option<(String, String, u64)>,
    memory_bytes: u64,
}

impl<S: Stream> Groups<S> {
    fn member(&mut self) -> Result<Option<(String, String, u64)>, Broken> {
        if let Some(pending) = self.pending.take() {
            return Ok(Some(pending));
        }
        // A block ends where its bytes do; only the last has the zeros that end the archive.
        while self.stream.rest() > 0 {
            let Some(member) = next_member(&mut self.stream, self.memory_bytes)? else { break };
            if let Some((key, column)) = split_name(&member.name)? {
                return Ok(Some((key.to_owned(), column, member.size)));
            }
            self.stream.skip(member.size + padding(member.size), "a file")?;
        }
        Ok(None)
    }
}

impl Tar {
    /// The rows of a block; what is not wanted is passed over.
    fn groups<'a>(&self, bytes: &'a Bytes) -> Groups<Cursor<'a>> {
        Groups { stream: Cursor { bytes, at: 0 }, pending: None, memory_bytes: self.memory_bytes }
    }
}

impl Groups<Cursor<'_>> {
    /// The next row of a block, which ends where its bytes do.
    fn next(&mut self) -> Result<Option<Group>, Broken> {
        let mut group: Option<Group> = None;
        loop {
            if self.pending.is_none() && self.stream.rest() == 0 {
                return Ok(group);
            }
            let Some((key, column, size)) = self.member()? else { return Ok(group) };
            match &mut group {
                Some(open) if open.key != key => {
                    self.pending = Some((key, column, size));
                    return Ok(group);
                }
                Some(_) => {}
                None => group = Some(Group { key, files: Vec::new() }),
            }
            let data = self.stream.take(size, "a file")?;
            self.stream.skip(padding(size), "the padding of a file")?;
            if let Some(open) = &mut group {
                if open.files.iter().any(|(c, _)| *c == column) {
                    return Err(format!("row `{:.200}` has two files `{column}`", open.key).into());
                }
                if open.files.len() == FILES_MAX {
                    return Err(format!("row `{:.200}` has more than {FILES_MAX} files", open.key).into());
                }
                open.files.push((column, data));
            }
        }
    }
}

/// What a walk read to see that a row ended.
#[derive(Default)]
enum Ahead {
    #[default]
    Nothing,
    /// The key of the next row.
    Row(String),
    End,
}

/// What a walk over an archive knows of it.
#[derive(Default)]
pub(crate) struct Passed {
    ahead: Ahead,
    /// The columns, each with where the first file of it lies.
    columns: Vec<(String, Range<u64>)>,
}

impl Records for Tar {
    type Passed = Passed;

    fn skip(&self, walk: &mut Walk<'_>, passed: &mut Passed) -> Result<Option<u64>, DataError> {
        let Passed { ahead, columns } = passed;
        let mut next = |walk: &mut Walk<'_>, memory_bytes: u64| -> Result<Option<(String, u64)>, DataError> {
            loop {
                let start = walk.position();
                let broken = |walk: &Walk<'_>, broken: Broken| match broken {
                    Broken::Data(error) => error,
                    Broken::Reason(reason) => walk.error_from(start, reason),
                };
                let Some(member) = next_member(walk, memory_bytes).map_err(|b| broken(walk, b))? else {
                    return Ok(None);
                };
                let data = walk.position()..walk.position().saturating_add(member.size);
                walk.skip(member.size, "a file")?;
                walk.skip(padding(member.size), "the padding of a file")?;
                let named = split_name(&member.name).map_err(|reason| walk.error_from(start, reason))?;
                let Some((key, column)) = named else { continue };
                if columns.iter().all(|(known, _)| *known != column) {
                    if columns.len() == FILES_MAX {
                        return Err(walk.error_from(start, format!("has more than {FILES_MAX} kinds of files")));
                    }
                    columns.push((column, data));
                }
                return Ok(Some((key.to_owned(), start)));
            }
        };
        let first = match std::mem::take(ahead) {
            Ahead::Row(first) => first,
            Ahead::Nothing => match next(walk, self.memory_bytes)? {
                Some((first, _)) => first,
                None => return Ok(None),
            },
            Ahead::End => return Ok(None),
        };
        loop {
            let end = walk.position();
            match next(walk, self.memory_bytes)? {
                Some((key, _)) if key == first => {}
                Some((key, start)) => {
                    // What is not part of any row may lie between; it goes to the row before.
                    *ahead = Ahead::Row(key);
                    return Ok(Some(start));
                }
                None => {
                    *ahead = Ahead::End;
                    return Ok(Some(end));
                }
            }
        }
    }

    fn infer(&self, content: &Content, bytes: &Bytes, passed: &Passed) -> Result<Schema, DataError> {
        let broken = |broken: Broken| match broken {
            Broken::Data(error) => error,
            Broken::Reason(reason) => content.input.error_at(0, reason),
        };
        let mut columns: Vec<Column> = Vec::new();
        let mut groups = self.groups(bytes);
        for row in 0..INFER_ROWS {
            let Some(group) = groups.next().map_err(broken)? else { break };
            if row == 0 {
                columns.push(Column { name: KEY.into(), kind: Kind::Text });
            }
            for (name, data) in group.files {
                let known = columns.iter_mut().find(|column| column.name == name);
                let kind = match kind_of_extension(&name) {
                    Some(kind) => kind,
                    None => {
                        let array = npy::parse(data.as_ref(), self.memory_bytes);
                        let array =
                            array.map_err(|r| content.input.error(format!("row `{}`, `{name}`: {r}", group.key)))?;
                        Kind::Number { dtype: array.dtype(), shape: array.shape().to_vec() }
                    }
                };
                match known {
                    // Arrays of one dimension may be of any length; whatever else differs is for reading to refuse.
                    Some(column) => match (&column.kind, &kind) {
                        (Kind::Number { dtype: a, shape }, Kind::Number { dtype: b, shape: other })
                            if a == b && shape != other && shape.len() == 1 && other.len() == 1 =>
                        {
                            column.kind = Kind::List { dtype: *a };
                        }
                        _ => {}
                    },
                    None => columns.push(Column { name, kind }),
                }
            }
        }
        // A row may have a file that those before it lack.
        for (name, data) in &passed.columns {
            if columns.iter().any(|column| column.name == *name) {
                continue;
            }
            let kind = match kind_of_extension(name) {
                Some(kind) => kind,
                None => {
                    let array = npy::parse(content.read(data.start, Some(data.end))?.as_ref(), self.memory_bytes);
                    let array = array.map_err(|r| content.input.error_at(data.start, format!("`{name}`: {r}")))?;
                    Kind::Number { dtype: array.dtype(), shape: array.shape().to_vec() }
                }
            };
            columns.push(Column { name: name.clone(), kind });
        }
        Schema::new(columns).map_err(|reason| content.input.error(reason))
    }

    fn decode(
        &self,
        block: BlockBytes<'_>,
        wanted: &[(&str, &Kind)],
        rows: &mut dyn Iterator<Item = usize>,
        broken: &mut dyn FnMut(BrokenRow) -> Result<(), DataError>,
    ) -> Result<Vec<Cells>, DataError> {
        let mut builders: Vec<CellsBuilder> =
            wanted.iter().map(|(_, kind)| CellsBuilder::new(kind, block.rows)).collect();
        let mut groups = self.groups(block.bytes);
        let (mut row, mut count) = (0, 0);
        let mut pick = rows.next();
        while let Some(wanted_row) = pick {
            let at = groups.stream.at;
            let place = |reason: String| DataError::file(block.place(row, at).as_ref(), reason);
            let group = groups.next().map_err(|broken| match broken {
                Broken::Data(error) => error,
                Broken::Reason(reason) => place(reason),
            })?;
            let group = group.ok_or_else(|| place(format!("the block has only {row} rows")))?;
            while pick == Some(row) && row == wanted_row {
                for (column, ((name, _), builder)) in wanted.iter().zip(&mut builders).enumerate() {
                    let Err(reason) = self.push(&group, name, builder) else { continue };
                    let error = DataError::Sample {
                        sample: format!("{} `{}`", block.place(row, at), group.key),
                        column: (*name).to_owned(),
                        reason,
                    };
                    let is_missing = *name != KEY && group.files.iter().all(|(file, _)| file != name);
                    broken(BrokenRow { at: count, column: Some(column), is_missing, error })?;
                    builder.push_nothing(count);
                }
                count += 1;
                pick = rows.next();
            }
            row += 1;
        }
        let finish = |builder: CellsBuilder| builder.finish(count).map_err(|r| block.content.input.error(r));
        builders.into_iter().map(finish).collect()
    }
}

impl Tar {
    /// Appends a row's file to its column.
    fn push(&self, group: &Group, name: &str, builder: &mut CellsBuilder) -> Result<(), String> {
        if name == KEY {
            return builder.push_bytes(Bytes::copy_from_slice(group.key.as_bytes()));
        }
        let data = group.files.iter().find(|(column, _)| column == name).map(|(_, data)| data);
        let data = data.ok_or_else(|| {
            let have: Vec<&str> = group.files.iter().map(|(c, _)| c.as_str()).collect();
            format!("the row has no such file, only {}", have.join(", "))
        })?;
        let (number, is_npy) = match builder.kind() {
            Kind::Bytes | Kind::Text => return builder.push_bytes(data.clone()),
            Kind::Number { dtype, shape } => (Some((*dtype, shape.is_empty())), kind_of_extension(name).is_none()),
            Kind::List { .. } => (None, true),
        };
        if is_npy {
            let array: Tensor = npy::parse(data.as_ref(), self.memory_bytes)?;
            return builder.push_native(&array);
        }
        let digits = std::str::from_utf8(data).ok().and_then(|t| t.trim().parse::<i64>().ok());
        let value = digits.ok_or_else(|| format!("`{:.40}` is not a whole number", String::from_utf8_lossy(data)))?;
        match number {
            Some((DType::I64, true)) => builder.push_le(DType::I64, &[], &value.to_le_bytes()),
            _ => Err("is a whole number where an array was expected".into()),
        }
    }
}
