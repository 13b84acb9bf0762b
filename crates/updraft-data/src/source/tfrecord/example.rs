//! `tf.train.Example`: a map from names to lists of bytes, floats or integers, in Protocol Buffers' wire format.
//!
//! The message is `Example { features: 1 Features { feature: 1 map<string, Feature { bytes_list: 1 | float_list: 2 |
//! int64_list: 3 }> } }`, each list with its values in field 1, packed or not; `tensorflow/core/example` defines it.
//!
//! # Design
//!
//! A general decoder makes a map and a vector for every feature of every row; a table of a hundred columns then spends its
//! time allocating. Here the bytes of a message are walked over once and values go straight to their columns. Writers
//! keep features in one order mostly, so the column of a feature is first looked for where the last row had it.

use bytes::Bytes;
use updraft_graph::DType;

use crate::schema::{Column, Kind, Schema};
use crate::source::cells::CellsBuilder;

/// Examples that are looked at to learn the columns.
pub(crate) const INFER_EXAMPLES: usize = 256;

/// One field of a message.
enum Field<'a> {
    Varint(u64),
    Fixed32([u8; 4]),
    Fixed64,
    Bytes(&'a [u8]),
}

/// The fields of a message, with their numbers.
struct Message<'a> {
    rest: &'a [u8],
}

fn varint(rest: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, behind) = rest.split_first().ok_or("a number is cut off")?;
        *rest = behind;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("a number has more than 64 bits".into())
}

impl<'a> Message<'a> {
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let tag = varint(&mut self.rest)?;
        let mut take = |count: u64| {
            let split = usize::try_from(count).ok().and_then(|n| self.rest.split_at_checked(n));
            let (taken, behind) = split.ok_or_else(|| format!("a field of {count} bytes is cut off"))?;
            self.rest = behind;
            Ok::<&[u8], String>(taken)
        };
        let field = match tag & 7 {
            0 => Field::Varint(varint(&mut self.rest)?),
            1 => take(8).map(|_| Field::Fixed64)?,
            5 => Field::Fixed32(*take(4)?.first_chunk().ok_or("a number is cut off")?),
            2 => {
                let count = varint(&mut self.rest)?;
                let split = usize::try_from(count).ok().and_then(|n| self.rest.split_at_checked(n));
                let (taken, behind) = split.ok_or_else(|| format!("a field of {count} bytes is cut off"))?;
                self.rest = behind;
                Field::Bytes(taken)
            }
            other => return Err(format!("a field of the unknown wire type {other}; is this an Example?")),
        };
        Ok(Some((tag >> 3, field)))
    }

    /// The parts of a message that is all of submessages with one number.
    fn submessages(
        bytes: &'a [u8],
        number: u64,
        mut each: impl FnMut(&'a [u8]) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut message = Message { rest: bytes };
        while let Some((found, field)) = message.next()? {
            match field {
                Field::Bytes(bytes) if found == number => each(bytes)?,
                // Fields of later versions are to be passed over.
                _ if found != number => {}
                _ => return Err("is no tf.train.Example".into()),
            }
        }
        Ok(())
    }
}

/// Calls `each` with the name and the list of every feature.
fn features<'a>(
    example: &'a [u8],
    mut each: impl FnMut(&'a str, List<'a>) -> Result<(), String>,
) -> Result<(), String> {
    let mut message = Message { rest: example };
    while let Some((number, field)) = message.next()? {
        // A SequenceExample has its context where an Example has its features, and its lists behind that.
        if let (2, Field::Bytes(_)) = (number, field) {
            return Err("is a tf.train.SequenceExample; a tf.train.Example is read".into());
        }
    }
    Message::submessages(example, 1, |features| {
        Message::submessages(features, 1, |entry| {
            let mut entry = Message { rest: entry };
            let (mut name, mut feature) = (&b""[..], &b""[..]);
            while let Some((number, field)) = entry.next()? {
                match (number, field) {
                    (1, Field::Bytes(bytes)) => name = bytes,
                    (2, Field::Bytes(bytes)) => feature = bytes,
                    _ => {}
                }
            }
            let name = std::str::from_utf8(name).map_err(|_| "has a feature whose name is not UTF-8")?;
            each(name, List::parse(feature).map_err(|reason| format!("feature `{name:.100}` {reason}"))?)
        })
    })
}

/// The values of a feature, still encoded.
#[derive(Clone, Copy)]
enum List<'a> {
    Bytes(&'a [u8]),
    Floats(&'a [u8]),
    Integers(&'a [u8]),
    Empty,
}

impl<'a> List<'a> {
    fn parse(feature: &'a [u8]) -> Result<List<'a>, String> {
        let mut list = List::Empty;
        let mut message = Message { rest: feature };
        while let Some((number, field)) = message.next()? {
            let Field::Bytes(bytes) = field else { continue };
            match number {
                1 => list = List::Bytes(bytes),
                2 => list = List::Floats(bytes),
                3 => list = List::Integers(bytes),
                _ => {}
            }
        }
        Ok(list)
    }

    fn what(&self) -> &'static str {
        match self {
            List::Bytes(_) => "bytes",
            List::Floats(_) => "floats",
            List::Integers(_) => "integers",
            List::Empty => "nothing",
        }
    }

    /// Appends the elements of a list of numbers to `out`, little-endian.
    fn numbers(self, out: &mut Vec<u8>) -> Result<(), String> {
        let list = match self {
            List::Floats(list) | List::Integers(list) => list,
            List::Empty => return Ok(()),
            List::Bytes(_) => return Err("holds bytes".into()),
        };
        let mut message = Message { rest: list };
        while let Some((number, field)) = message.next()? {
            match (number, field, self) {
                (1, Field::Bytes(packed), List::Floats(_)) if packed.len().is_multiple_of(4) => {
                    out.extend_from_slice(packed);
                }
                (1, Field::Fixed32(bytes), List::Floats(_)) => out.extend_from_slice(&bytes),
                (1, Field::Varint(value), List::Integers(_)) => out.extend_from_slice(&value.to_le_bytes()),
                (1, Field::Bytes(mut packed), List::Integers(_)) => {
                    while !packed.is_empty() {
                        out.extend_from_slice(&varint(&mut packed)?.to_le_bytes());
                    }
                }
                (1, ..) => return Err(format!("holds {} of another encoding", self.what())),
                _ => {}
            }
        }
        Ok(())
    }

    /// The values of a list of bytes.
    fn bytes(self, mut each: impl FnMut(&'a [u8]) -> Result<(), String>) -> Result<(), String> {
        match self {
            List::Bytes(list) => Message::submessages(list, 1, &mut each),
            List::Empty => Ok(()),
            _ => Err(format!("holds {}", self.what())),
        }
    }
}

/// Features of one shard, at most.
const FEATURES_MAX: usize = 1 << 16;

/// The features that examples have, and what is in the first that has values: bytes, or numbers.
#[derive(Default)]
pub(crate) struct Names {
    known: Vec<(String, Option<DType>)>,
}

impl Names {
    /// Adds those of an example. What is not understood is named when it is read.
    pub(crate) fn add(&mut self, example: &[u8]) -> Result<(), String> {
        let known = &mut self.known;
        let mut next = 0;
        let mut too_many = false;
        let read = features(example, |name, list| {
            // Writers keep features in one order mostly.
            let guessed = known.get(next).is_some_and(|(known, _)| known == name);
            let place = if guessed { Some(next) } else { known.iter().position(|(known, _)| known == name) };
            next = place.unwrap_or(next) + 1;
            let dtype = match list {
                List::Empty => return Ok(()),
                List::Bytes(_) => None,
                List::Floats(_) => Some(DType::F32),
                List::Integers(_) => Some(DType::I64),
            };
            if place.is_none() {
                too_many = known.len() == FEATURES_MAX;
                if too_many {
                    return Err(String::new());
                }
                known.push((name.to_owned(), dtype));
            }
            Ok(())
        });
        match read {
            Err(_) if too_many => Err(format!("has more than {FEATURES_MAX} features")),
            _ => Ok(()),
        }
    }
}

/// Features as the first examples have them.
#[derive(Default)]
pub(crate) struct Seen {
    examples: usize,
    columns: Vec<SeenColumn>,
}

struct SeenColumn {
    name: String,
    /// `None` for bytes.
    dtype: Option<DType>,
    length: usize,
    same_length: bool,
    examples: usize,
}

impl Seen {
    pub(crate) fn add(&mut self, example: &[u8]) -> Result<(), String> {
        self.examples += 1;
        let columns = &mut self.columns;
        features(example, |name, list| {
            let (dtype, length) = match list {
                List::Bytes(_) => {
                    let mut count = 0;
                    list.bytes(|_| {
                        count += 1;
                        Ok(())
                    })?;
                    (None, count)
                }
                List::Empty => return Ok(()),
                List::Floats(_) | List::Integers(_) => {
                    let dtype = if matches!(list, List::Floats(_)) { DType::F32 } else { DType::I64 };
                    let mut elements = Vec::new();
                    list.numbers(&mut elements)?;
                    (Some(dtype), elements.len() / dtype.size_in_memory())
                }
            };
            match columns.iter_mut().find(|c| c.name == name) {
                None => {
                    columns.push(SeenColumn { name: name.to_owned(), dtype, length, same_length: true, examples: 1 })
                }
                Some(column) if column.dtype != dtype => {
                    return Err(format!("feature `{name}` holds {} and other values before", list.what()));
                }
                Some(column) => {
                    column.same_length &= column.length == length;
                    column.examples += 1;
                }
            }
            Ok(())
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.examples == 0
    }

    /// The columns, by name: a map has no order of its own. Those that only later examples have are among `names`.
    pub(crate) fn schema(mut self, names: &Names) -> Result<Schema, String> {
        for (name, dtype) in &names.known {
            if self.columns.iter().all(|column| column.name != *name) {
                let (name, dtype) = (name.clone(), *dtype);
                self.columns.push(SeenColumn { name, dtype, length: 1, same_length: true, examples: 0 });
            }
        }
        self.columns.sort_by(|a, b| a.name.cmp(&b.name));
        let mut columns = Vec::with_capacity(self.columns.len());
        for column in self.columns {
            let everywhere = column.same_length && column.examples == self.examples;
            let kind = match (column.dtype, column.length) {
                // Another number than one is an error for those who want it.
                (None, _) => Kind::Bytes,
                (Some(dtype), 1) if everywhere => Kind::scalar(dtype),
                (Some(dtype), length) if everywhere && length > 0 => Kind::Number { dtype, shape: vec![length] },
                (Some(dtype), _) => Kind::List { dtype },
            };
            columns.push(Column { name: column.name, kind });
        }
        Schema::new(columns)
    }
}

/// Puts features into columns.
pub(crate) struct Decoder<'a> {
    wanted: Vec<(&'a str, &'a Kind)>,
    /// The column that followed each column in the last example.
    next: Vec<usize>,
    found: Vec<bool>,
    elements: Vec<u8>,
    absent: Vec<usize>,
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(wanted: &[(&'a str, &'a Kind)]) -> Decoder<'a> {
        let count = wanted.len();
        Decoder {
            wanted: wanted.to_vec(),
            next: (1..=count + 1).collect(),
            found: vec![false; count],
            elements: Vec::new(),
            absent: Vec::new(),
        }
    }

    /// Appends one example; what it has no feature for is told by [`Decoder::absent`]. An error comes with the place of the
    /// column.
    pub(crate) fn decode(&mut self, example: &Bytes, builders: &mut [CellsBuilder]) -> Result<(), (usize, String)> {
        let Decoder { wanted, next, found, elements, absent } = self;
        absent.clear();
        found.fill(false);
        let mut failed_at = 0;
        let mut last = wanted.len();
        let read = features(example, |name, list| {
            let guess = next.get(last).copied().unwrap_or(0) % wanted.len().max(1);
            let column = match wanted.get(guess) {
                Some((guessed, _)) if *guessed == name => guess,
                _ => match wanted.iter().position(|(n, _)| *n == name) {
                    Some(column) => column,
                    None => return Ok(()),
                },
            };
            if let Some(slot) = next.get_mut(last) {
                *slot = column;
            }
            last = column;
            failed_at = column;
            if std::mem::replace(&mut found[column], true) {
                return Err("is there twice".into());
            }
            push(list, wanted[column].1, &mut builders[column], example, elements)
        });
        read.map_err(|reason| (failed_at, reason))?;
        for (column, found) in found.iter().enumerate() {
            if *found {
                continue;
            }
            // In Protocol Buffers a list without values need not be there.
            match wanted[column].1 {
                Kind::List { dtype } => {
                    builders[column].push_le(*dtype, &[0], &[]).map_err(|reason| (column, reason))?;
                }
                _ => absent.push(column),
            }
        }
        Ok(())
    }

    /// The columns that the last example had no feature for; nothing was pushed to them.
    pub(crate) fn absent(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.absent)
    }
}

/// Appends a feature to its column.
fn push(
    list: List<'_>,
    kind: &Kind,
    builder: &mut CellsBuilder,
    example: &Bytes,
    elements: &mut Vec<u8>,
) -> Result<(), String> {
    match kind {
        Kind::Bytes | Kind::Text => {
            let mut values = 0;
            list.bytes(|value| {
                values += 1;
                builder.push_bytes(example.slice_ref(value))
            })?;
            if values == 1 { Ok(()) } else { Err(format!("holds {values} values of bytes; one is read")) }
        }
        Kind::Number { dtype, shape } => {
            elements.clear();
            list.numbers(elements)?;
            let (stored, stored_bytes) = stored_as(*dtype)?;
            check_list(list, stored)?;
            let count = elements.len() / stored_bytes;
            let expected = shape.iter().product::<usize>();
            if count != expected {
                return Err(format!("holds {count} numbers; {expected} are expected"));
            }
            narrow(*dtype, elements)?;
            builder.push_le(*dtype, shape, elements)
        }
        Kind::List { dtype } => {
            elements.clear();
            list.numbers(elements)?;
            let (stored, stored_bytes) = stored_as(*dtype)?;
            check_list(list, stored)?;
            let count = elements.len() / stored_bytes;
            narrow(*dtype, elements)?;
            builder.push_le(*dtype, &[count], elements)
        }
    }
}

fn check_list(list: List<'_>, stored: DType) -> Result<(), String> {
    match (list, stored) {
        (List::Empty, _) | (List::Floats(_), DType::F32) | (List::Integers(_), DType::I64) => Ok(()),
        _ => Err(format!("holds {}", list.what())),
    }
}

/// The type that a list keeps elements of another type in without loss.
pub(crate) fn stored_as(dtype: DType) -> Result<(DType, usize), String> {
    Ok(match dtype {
        DType::F32 | DType::F16 | DType::BF16 => (DType::F32, 4),
        DType::I64 | DType::I32 | DType::I16 | DType::I8 | DType::U32 | DType::U16 | DType::U8 | DType::Bool => {
            (DType::I64, 8)
        }
        DType::U64 => (DType::I64, 8),
        other => return Err(format!("an Example holds f32 and i64 and narrower numbers, not {other}")),
    })
}

/// Brings elements from the type they are stored in to a narrower one; an error where one does not fit.
fn narrow(dtype: DType, elements: &mut Vec<u8>) -> Result<(), String> {
    fn integers<const BYTES: usize>(elements: &mut Vec<u8>, low: i64, high: i64) -> Result<(), String> {
        let count = elements.len() / 8;
        for at in 0..count {
            let mut word = [0; 8];
            word.copy_from_slice(&elements[8 * at..8 * at + 8]);
            let value = i64::from_le_bytes(word);
            if !(low..=high).contains(&value) {
                return Err(format!("holds {value}, outside of {low} to {high}"));
            }
            elements.copy_within(8 * at..8 * at + BYTES, BYTES * at);
        }
        elements.truncate(BYTES * count);
        Ok(())
    }
    fn floats(elements: &mut Vec<u8>, convert: impl Fn(f32) -> ([u8; 2], f32)) -> Result<(), String> {
        let count = elements.len() / 4;
        for at in 0..count {
            let mut word = [0; 4];
            word.copy_from_slice(&elements[4 * at..4 * at + 4]);
            let value = f32::from_le_bytes(word);
            let (bytes, back) = convert(value);
            if back != value && !value.is_nan() {
                return Err(format!("holds {value}, which 16 bits cannot hold"));
            }
            elements[2 * at..2 * at + 2].copy_from_slice(&bytes);
        }
        elements.truncate(2 * count);
        Ok(())
    }
    match dtype {
        DType::F32 | DType::I64 => Ok(()),
        // Negative values are not what was written.
        DType::U64 => integers::<8>(elements, 0, i64::MAX),
        DType::I32 => integers::<4>(elements, i32::MIN.into(), i32::MAX.into()),
        DType::U32 => integers::<4>(elements, 0, u32::MAX.into()),
        DType::I16 => integers::<2>(elements, i16::MIN.into(), i16::MAX.into()),
        DType::U16 => integers::<2>(elements, 0, u16::MAX.into()),
        DType::I8 => integers::<1>(elements, i8::MIN.into(), i8::MAX.into()),
        DType::U8 => integers::<1>(elements, 0, u8::MAX.into()),
        DType::Bool => integers::<1>(elements, 0, 1),
        DType::F16 => floats(elements, |v| {
            let half = half::f16::from_f32(v);
            (half.to_le_bytes(), half.to_f32())
        }),
        DType::BF16 => floats(elements, |v| {
            let half = half::bf16::from_f32(v);
            (half.to_le_bytes(), half.to_f32())
        }),
        other => Err(format!("an Example holds no {other}")),
    }
}
