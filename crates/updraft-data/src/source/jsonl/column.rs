//! A column of JSON Lines in the making: text, or numbers and arrays of them.

use bytes::Bytes;
use updraft_graph::{DType, Tensor};

use crate::rows::{Cells, Gap, PartialCells, tensor_of};
use crate::schema::Kind;
use crate::source::jsonl::{Walk, decoded};
use crate::source::whole::TableColumn;

/// Arrays nest this deep at most.
const RANK_MAX: usize = 8;

/// Bytes that a number takes: 8, as much again for the room of a vector that grows, and no more when it becomes a tensor.
const WORD_BYTES: usize = 16;

/// Memory that may still be taken.
pub(super) struct Memory {
    left: u64,
    all: u64,
}

impl Memory {
    pub(super) fn new(all: u64) -> Memory {
        Memory { left: all, all }
    }

    fn take(&mut self, count: usize, each_bytes: usize) -> Result<(), Stop> {
        let bytes = (count as u64).saturating_mul(each_bytes as u64);
        let left = self.left.checked_sub(bytes);
        self.left = left.ok_or_else(|| Stop::Memory(format!("the rows take more than memory_bytes = {}", self.all)))?;
        Ok(())
    }
}

/// Why a value is not taken.
enum Stop {
    /// It is not what its column holds.
    Fault(String),
    Memory(String),
}

pub(super) struct ColumnBuilder {
    wanted: Option<Kind>,
    made: Made,
    gaps: Vec<Gap>,
    /// The row behind the last that was taken.
    rows: usize,
}

enum Made {
    Nothing,
    Text(Vec<Bytes>),
    Numbers(Numbers),
}

impl ColumnBuilder {
    /// A column of a kind, or of that of its values.
    pub(super) fn new(wanted: Option<&Kind>) -> ColumnBuilder {
        let numbers = |dtype: &DType, shape: Vec<usize>, ends| Numbers {
            dtype: Some(*dtype),
            shape: Some(shape),
            ends,
            is_fixed: true,
            ..Numbers::default()
        };
        let made = match wanted {
            None => Made::Nothing,
            Some(Kind::Text | Kind::Bytes) => Made::Text(Vec::new()),
            Some(Kind::Number { dtype, shape }) => Made::Numbers(numbers(dtype, shape.clone(), None)),
            Some(Kind::List { dtype }) => Made::Numbers(numbers(dtype, vec![0], Some(Vec::new()))),
        };
        ColumnBuilder { wanted: wanted.cloned(), made, gaps: Vec::new(), rows: 0 }
    }

    /// Takes the value at the position as the cell of a row, and passes over it. What does not fit is a gap.
    ///
    /// # Errors
    /// Where it takes more memory than there is.
    pub(super) fn push(&mut self, walk: &mut Walk<'_>, row: usize, memory: &mut Memory) -> Result<(), String> {
        self.lacks(row, memory)?;
        self.rows = row + 1;
        let first = walk.peek();
        let start = walk.at;
        let taken = match first {
            b'"' => self.push_text(walk, row, memory),
            b'n' => {
                walk.skip();
                self.gap(Gap::missing(row), memory)
            }
            b'{' => {
                Err(Stop::Fault("holds an object; text, numbers, booleans and arrays of numbers are read".to_owned()))
            }
            _ => self.push_numbers(walk, row, memory),
        };
        let taken = match taken {
            Err(Stop::Fault(reason)) => {
                walk.at = start;
                walk.skip();
                self.gap(Gap::fault(row, reason), memory)
            }
            taken => taken,
        };
        taken.map_err(|stop| match stop {
            Stop::Fault(reason) | Stop::Memory(reason) => reason,
        })
    }

    fn gap(&mut self, gap: Gap, memory: &mut Memory) -> Result<(), Stop> {
        memory.take(1, 2 * size_of::<Gap>() + gap.fault.as_ref().map_or(0, String::len))?;
        self.gaps.push(gap);
        Ok(())
    }

    fn push_text(&mut self, walk: &mut Walk<'_>, row: usize, memory: &mut Memory) -> Result<(), Stop> {
        if let Made::Nothing = self.made {
            self.made = Made::Text(Vec::new());
        }
        let kind = self.kind();
        let Made::Text(cells) = &mut self.made else { return Err(Stop::Fault(format!("is text, not {kind}"))) };
        let text = decoded(walk.string()).map_err(Stop::Fault)?;
        memory.take(row + 1 - cells.len(), 2 * size_of::<Bytes>())?;
        memory.take(text.len(), 1)?;
        cells.resize(row, Bytes::new());
        cells.push(Bytes::copy_from_slice(text.as_bytes()));
        Ok(())
    }

    fn push_numbers(&mut self, walk: &mut Walk<'_>, row: usize, memory: &mut Memory) -> Result<(), Stop> {
        let is_first = matches!(self.made, Made::Nothing);
        if is_first {
            self.made = Made::Numbers(Numbers::default());
        }
        let Made::Numbers(numbers) = &mut self.made else {
            // What is read nowhere is named as what it is, and else as what is not text.
            let start = walk.at;
            let mut own = Memory::new(memory.left);
            let taken = Numbers::default().push(walk, 0, &mut own);
            walk.at = start;
            return Err(taken.err().unwrap_or_else(|| Stop::Fault(format!("`{:.40}` is not text", walk.word()))));
        };
        let taken = numbers.push(walk, row, memory);
        let rounded = std::mem::take(&mut numbers.rounded);
        if is_first && taken.is_err() {
            self.made = Made::Nothing;
        }
        rounded.into_iter().try_for_each(|(row, reason)| self.gap(Gap::fault(row, reason), memory))?;
        taken
    }

    fn kind(&self) -> Kind {
        match (&self.wanted, &self.made) {
            (Some(kind), _) => kind.clone(),
            (None, Made::Nothing | Made::Text(_)) => Kind::Text,
            (None, Made::Numbers(numbers)) => {
                let dtype = numbers.dtype.unwrap_or(DType::I64);
                match (&numbers.ends, &numbers.shape) {
                    (None, Some(shape)) => Kind::Number { dtype, shape: shape.clone() },
                    _ => Kind::List { dtype },
                }
            }
        }
    }

    /// The rows up to this one had no value.
    fn lacks(&mut self, row: usize, memory: &mut Memory) -> Result<(), String> {
        let missing = (self.rows..row).try_for_each(|row| self.gap(Gap::missing(row), memory));
        missing.map_err(|stop| match stop {
            Stop::Fault(reason) | Stop::Memory(reason) => reason,
        })
    }

    /// The column of so many rows.
    pub(super) fn finish(mut self, name: String, rows: usize, memory: &mut Memory) -> Result<TableColumn, String> {
        self.lacks(rows, memory)?;
        let kind = self.kind();
        let reason = |stop| match stop {
            Stop::Fault(reason) | Stop::Memory(reason) => reason,
        };
        let cells = match &mut self.made {
            Made::Nothing => Cells::Bytes(vec![Bytes::new(); rows]),
            Made::Text(cells) => {
                memory.take(rows - cells.len(), 2 * size_of::<Bytes>()).map_err(reason)?;
                cells.resize(rows, Bytes::new());
                Cells::Bytes(std::mem::take(cells))
            }
            Made::Numbers(numbers) => numbers.finish(rows, memory).map_err(reason)?,
        };
        Ok(TableColumn { name, kind, cells: PartialCells::new(cells, self.gaps) })
    }
}

/// Numbers of rows, all of them in 8 bytes.
#[derive(Default)]
struct Numbers {
    /// What the words are; `None` before the first.
    dtype: Option<DType>,
    words: Vec<u64>,
    /// The row that is being taken.
    row: usize,
    /// The shape of every row; `None` before the first.
    shape: Option<Vec<usize>>,
    /// Of arrays of one dimension that differ in length: where those of each row end.
    ends: Option<Vec<usize>>,
    /// Whether type and shape are those that are wanted.
    is_fixed: bool,
    /// Rows whose numbers turned out to be of no type with those behind them, and why.
    rounded: Vec<(usize, String)>,
}

/// A number as it is written.
#[derive(Clone, Copy)]
enum Literal {
    Bool(bool),
    /// Of 64 bits with or without a sign.
    Whole(i128),
    Fraction(f64),
}

impl Literal {
    fn parse(word: &str) -> Result<Literal, String> {
        let range = i128::from(i64::MIN)..=i128::from(u64::MAX);
        match word {
            "true" => return Ok(Literal::Bool(true)),
            "false" => return Ok(Literal::Bool(false)),
            _ => {}
        }
        if let Ok(whole) = word.parse::<i128>()
            && range.contains(&whole)
        {
            return Ok(Literal::Whole(whole));
        }
        let number = word.parse::<f64>().ok().filter(|number| number.is_finite());
        let number = number.ok_or_else(|| format!("`{word:.40}` is no number that 64 bits hold"))?;
        // A whole number that 64 bits do not hold is taken where a float is exactly it.
        if !word.contains(['.', 'e', 'E']) && format!("{number:.0}") != word {
            return Err(format!("`{word:.40}` would be rounded: 64 bits do not hold it"));
        }
        Ok(Literal::Fraction(number))
    }

    /// The type that it has alone.
    fn dtype(self) -> DType {
        match self {
            Literal::Bool(_) => DType::Bool,
            Literal::Whole(whole) if i64::try_from(whole).is_ok() => DType::I64,
            Literal::Whole(_) => DType::U64,
            Literal::Fraction(_) => DType::F64,
        }
    }

    /// Its bits as a type; `None` where that is not exactly it.
    fn word(self, dtype: DType) -> Option<u64> {
        match (self, dtype) {
            (Literal::Bool(value), DType::Bool) => Some(u64::from(value)),
            (Literal::Whole(whole), DType::I64) => i64::try_from(whole).ok().map(i64::cast_unsigned),
            (Literal::Whole(whole), DType::U64) => u64::try_from(whole).ok(),
            (Literal::Whole(whole), DType::F64) => {
                let float = whole as f64;
                (float as i128 == whole).then(|| float.to_bits())
            }
            (Literal::Fraction(number), DType::F64) => Some(number.to_bits()),
            _ => None,
        }
    }
}

/// How the arrays of a value nest.
#[derive(Default)]
struct Nest {
    /// The length of the arrays at each depth, once one of them has ended.
    lengths: Vec<Option<usize>>,
    /// Whether a number was there, below which no array may be.
    has_numbers: bool,
}

const BESIDE: &str = "holds arrays beside numbers in one row";

/// The number that bits of a type are.
fn literal(word: u64, dtype: DType) -> Literal {
    match dtype {
        DType::U64 => Literal::Whole(word.into()),
        _ => Literal::Whole(word.cast_signed().into()),
    }
}

impl Numbers {
    /// Takes a number or an array; words of one that does not fit are taken back.
    fn push(&mut self, walk: &mut Walk<'_>, row: usize, memory: &mut Memory) -> Result<(), Stop> {
        self.fill(row, memory)?;
        let before = self.words.len();
        let mut nest = Nest::default();
        let taken = self.value(walk, 0, &mut nest, memory).and_then(|()| self.place(&nest, before, row, memory));
        if taken.is_err() {
            self.words.truncate(before);
        }
        taken
    }

    /// Zeros for the rows before this one that have no cell.
    fn fill(&mut self, row: usize, memory: &mut Memory) -> Result<(), Stop> {
        self.row = row;
        let Some(shape) = &self.shape else { return Ok(()) };
        match &mut self.ends {
            Some(ends) => {
                memory.take(row - ends.len(), WORD_BYTES + size_of::<Tensor>())?;
                ends.resize(row, self.words.len());
            }
            None => {
                let words = row.saturating_mul(shape.iter().product());
                memory.take(words.saturating_sub(self.words.len()), WORD_BYTES)?;
                self.words.resize(words, 0);
            }
        }
        Ok(())
    }

    /// Takes what is at the position, `depth` arrays deep.
    fn value(&mut self, walk: &mut Walk<'_>, depth: usize, nest: &mut Nest, memory: &mut Memory) -> Result<(), Stop> {
        match walk.peek() {
            b'[' if depth == RANK_MAX => Err(Stop::Fault(format!("arrays nest more than {RANK_MAX} deep"))),
            b'[' if nest.has_numbers && nest.lengths.len() == depth => Err(Stop::Fault(BESIDE.to_owned())),
            b'[' => {
                walk.at += 1;
                if nest.lengths.len() == depth {
                    nest.lengths.push(None);
                }
                let mut count = 0;
                while walk.peek() != b']' {
                    self.value(walk, depth + 1, nest, memory)?;
                    count += 1;
                    if walk.peek() == b',' {
                        walk.at += 1;
                    }
                }
                walk.at += 1;
                match nest.lengths[depth].replace(count) {
                    Some(length) if length != count => {
                        Err(Stop::Fault(format!("holds arrays of {length} and of {count} in one row")))
                    }
                    _ => Ok(()),
                }
            }
            _ if nest.lengths.len() > depth => Err(Stop::Fault(BESIDE.to_owned())),
            b'"' => Err(Stop::Fault("holds text in an array; arrays of numbers are read".into())),
            b'{' => Err(Stop::Fault("holds an object in an array; arrays of numbers are read".into())),
            b'n' => Err(Stop::Fault("has no value for an element of its array".into())),
            _ => {
                memory.take(1, WORD_BYTES)?;
                nest.has_numbers = true;
                self.number(walk.word())
            }
        }
    }

    fn number(&mut self, word: &str) -> Result<(), Stop> {
        let literal = Literal::parse(word).map_err(Stop::Fault)?;
        let dtype = self.dtype.unwrap_or_else(|| literal.dtype());
        let bits = match literal.word(dtype) {
            Some(bits) => bits,
            None => {
                let none = || Stop::Fault(format!("`{word:.40}` is not {dtype}, as others are, and not rounded to it"));
                let wider = if self.is_fixed { None } else { self.widen(dtype, literal) };
                wider.and_then(|dtype| literal.word(dtype)).ok_or_else(none)?
            }
        };
        self.dtype.get_or_insert(dtype);
        self.words.push(bits);
        Ok(())
    }

    /// Makes the words a type that holds this number too; `None` where there is none.
    fn widen(&mut self, dtype: DType, next: Literal) -> Option<DType> {
        let to = match (dtype, next) {
            (DType::I64, Literal::Whole(_)) if self.words.iter().all(|word| word.cast_signed() >= 0) => DType::U64,
            (DType::I64 | DType::U64, Literal::Fraction(_)) => DType::F64,
            _ => return None,
        };
        let width = self.shape.as_ref().map_or(0, |shape| shape.iter().product::<usize>());
        for (at, word) in self.words.iter_mut().enumerate() {
            let Literal::Whole(whole) = literal(*word, dtype) else { continue };
            *word = Literal::Whole(whole).word(to).unwrap_or_else(|| {
                let row = match &self.ends {
                    Some(ends) => ends.partition_point(|end| *end <= at),
                    None => at.checked_div(width).map_or(self.row, |row| row.min(self.row)),
                };
                self.rounded.push((row, format!("`{whole}` would be rounded: others of its column have a fraction")));
                0
            });
        }
        self.dtype = Some(to);
        Some(to)
    }

    /// Makes the words from `before` on the cell of a row.
    fn place(&mut self, nest: &Nest, before: usize, row: usize, memory: &mut Memory) -> Result<(), Stop> {
        let found: Vec<usize> = nest.lengths.iter().map(|length| length.unwrap_or(0)).collect();
        match (&self.shape, &mut self.ends) {
            (None, _) => {
                // Only now is it known what the rows before, which have no cell, are filled with.
                let zeros = row.saturating_mul(found.iter().product());
                memory.take(zeros, WORD_BYTES)?;
                self.words.splice(before..before, std::iter::repeat_n(0, zeros));
                self.shape = Some(found);
            }
            (Some(_), Some(ends)) if found.len() == 1 => {
                memory.take(1, WORD_BYTES + size_of::<Tensor>())?;
                ends.push(self.words.len());
            }
            (Some(shape), None) if *shape == found => {}
            (Some(shape), None) if !self.is_fixed && shape.len() == 1 && found.len() == 1 => {
                memory.take(row + 1, WORD_BYTES + size_of::<Tensor>())?;
                let mut ends: Vec<usize> = (1..=row).map(|row| row * shape[0]).collect();
                ends.push(self.words.len());
                self.ends = Some(ends);
            }
            (Some(shape), ends) => {
                let shape: &[usize] = if ends.is_some() { &[] } else { shape };
                let reason = match (found.as_slice(), shape) {
                    ([found], [length]) => format!("holds {found} values; {length} are expected"),
                    ([], _) => "is no array, as others are".to_owned(),
                    (found, []) => format!("is an array of shape {found:?}, as others are not"),
                    (found, shape) => format!("is an array of shape {found:?}, and others are of {shape:?}"),
                };
                return Err(Stop::Fault(reason));
            }
        }
        Ok(())
    }

    fn finish(&mut self, rows: usize, memory: &mut Memory) -> Result<Cells, Stop> {
        self.fill(rows, memory)?;
        let dtype = self.dtype.unwrap_or(DType::I64);
        let bytes = |words: &[u64]| -> Vec<u8> {
            match dtype {
                DType::I64 | DType::U64 | DType::F64 => words.iter().flat_map(|word| word.to_ne_bytes()).collect(),
                DType::Bool => words.iter().map(|word| u8::from(*word != 0)).collect(),
                // Of other types, that only who wants them can know of, there is no value.
                other => vec![0; words.len() * other.size_in_memory()],
            }
        };
        let words = std::mem::take(&mut self.words);
        let Some(ends) = &self.ends else {
            let shape = [&[rows], self.shape.as_deref().unwrap_or_default()].concat();
            return Ok(Cells::Numbers(tensor_of(dtype, &shape, &bytes(&words))));
        };
        let starts = std::iter::once(&0).chain(ends);
        let list = |(start, end): (&usize, &usize)| tensor_of(dtype, &[end - start], &bytes(&words[*start..*end]));
        Ok(Cells::Lists(starts.zip(ends).map(list).collect()))
    }
}
