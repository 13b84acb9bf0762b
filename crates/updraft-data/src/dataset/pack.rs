//! What becomes of samples that are filtered or packed: what each counts for, and the tensors of rows of pieces.

use updraft_graph::{DType, Tensor};

use super::Dataset;
use crate::config::PackConfig;
use crate::error::DataError;
use crate::packing::Piece;
use crate::source::Cells;
use crate::stall::{Stage, Stopwatch};
use crate::tokenize::LENGTH_MAX;

impl Dataset {
    /// What each sample counts for: its tokens with the separator where rows are packed, else 1; `None` where it is
    /// filtered out.
    pub(crate) fn weigh(&self, samples: &[u64], watch: &mut Stopwatch) -> Result<Vec<Option<u64>>, DataError> {
        let mut weights = vec![Some(1); samples.len()];
        if let Some((filter, columns)) = &self.filter {
            for (weight, sample) in weights.iter_mut().zip(samples) {
                if filter.excludes(|condition| self.source.bounds(columns[condition], *sample)) {
                    *weight = None;
                }
            }
            // What the bounds of its block exclude need not be read.
            let asked: Vec<u64> = samples.iter().zip(&weights).filter(|(_, w)| w.is_some()).map(|(s, _)| *s).collect();
            let cells = self.source.read(columns, &asked)?;
            watch.lap(Stage::Fetch);
            let passes = filter.passes(&cells, asked.len()).map_err(|reason| DataError::file(&self.path, reason))?;
            let asked = weights.iter_mut().filter(|weight| weight.is_some());
            asked.zip(passes).filter(|(_, pass)| !pass).for_each(|(weight, _)| *weight = None);
            watch.lap(Stage::Transform);
        }
        if let Some(pack) = &self.pack {
            let kept: Vec<u64> = samples.iter().zip(&weights).filter(|(_, w)| w.is_some()).map(|(s, _)| *s).collect();
            let mut lens = Vec::with_capacity(kept.len());
            while lens.len() < kept.len() {
                let together = self.together(kept.len() - lens.len());
                let lists = self.lists(&kept[lens.len()..][..together], watch)?;
                lens.extend(lists.iter().map(Tensor::len));
            }
            for (weight, len) in weights.iter_mut().filter(|w| w.is_some()).zip(lens) {
                *weight = Some(len as u64 + u64::from(pack.separator.is_some() && len > 0));
            }
        }
        Ok(weights)
    }

    /// How many of `documents` are read at once: by the largest so far, as many as a part of the queue's memory holds.
    fn together(&self, documents: usize) -> usize {
        self.tensors.first().map_or(documents, |tensor| tensor.cells_in(self.portion_bytes(), documents))
    }

    /// The tensors of packed rows.
    pub(crate) fn packed(
        &self,
        pack: &PackConfig,
        rows: &[Vec<Piece>],
        watch: &mut Stopwatch,
    ) -> Result<Vec<(String, Tensor)>, DataError> {
        let name = self.tensors.first().map(|t| t.name.as_str()).unwrap_or_default();
        let mut packed = Packed::new(pack, rows.len());
        let mut samples: Vec<u64> = rows.iter().flatten().map(|piece| piece.sample).collect();
        samples.sort_unstable();
        samples.dedup();
        let mut rest = &samples[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(self.together(rest.len()));
            let lists = self.lists(now, watch)?;
            let document = |sample| now.binary_search(&sample).ok().and_then(|i| lists.get(i));
            packed.write(rows, document).map_err(|reason| DataError::tensor(name, reason))?;
            watch.lap(Stage::Collate);
            rest = later;
        }
        let made = packed.tensors(name).map_err(|reason| DataError::tensor(name, reason));
        watch.lap(Stage::Collate);
        made
    }

    /// The tokens of some samples.
    fn lists(&self, samples: &[u64], watch: &mut Stopwatch) -> Result<Vec<Tensor>, DataError> {
        let Some(tensor) = self.tensors.first().filter(|_| !samples.is_empty()) else { return Ok(Vec::new()) };
        let refused = |reason: &str| DataError::tensor(&tensor.name, reason);
        let lists = match self.cells(tensor, samples, watch)? {
            Cells::Lists(lists) => lists,
            Cells::Numbers(rows) if rows.rank() == 2 => {
                let of_row = |row: usize| rows_of(&rows, row).map_err(|e| refused(&e));
                (0..samples.len()).map(of_row).collect::<Result<_, _>>()?
            }
            _ => return Err(refused("is to be packed and does not hold lists of tokens")),
        };
        let whole = |list: Tensor| match list.dtype() {
            DType::I64 => Ok(list),
            dtype if dtype.is_integer() => list.cast(DType::I64).map_err(|e| refused(&e.to_string())),
            dtype => Err(refused(&format!("is to be packed and holds {dtype}, not whole numbers"))),
        };
        let lists: Vec<Tensor> = lists.into_iter().map(whole).collect::<Result<_, _>>()?;
        // With what they were made of, which takes no more.
        tensor.saw_cell_of(2 * lists.iter().map(Tensor::byte_len).max().unwrap_or(0) as u64);
        Ok(lists)
    }
}

/// # Errors
/// What is wrong with the configuration: rows of no tokens, or other than one tensor to pack.
pub(super) fn check(pack: &PackConfig, tensors: usize) -> Result<(), String> {
    if !(1..=LENGTH_MAX).contains(&pack.length) {
        return Err(format!("`pack.length` is 1 to {LENGTH_MAX} tokens"));
    }
    if tensors != 1 {
        return Err(format!("packing makes rows of one tensor of tokens, and {tensors} are configured"));
    }
    Ok(())
}

/// The tensors of packed rows, in the making.
struct Packed<'a> {
    pack: &'a PackConfig,
    rows: usize,
    tokens: Vec<i64>,
    /// These three are empty where they are not asked for.
    targets: Vec<i64>,
    documents: Vec<i64>,
    positions: Vec<i64>,
}

impl<'a> Packed<'a> {
    fn new(pack: &'a PackConfig, rows: usize) -> Packed<'a> {
        let all = rows * pack.length;
        let wanted = |name: &Option<String>, value: i64| vec![value; if name.is_some() { all } else { 0 }];
        Packed {
            pack,
            rows,
            tokens: vec![pack.padding; all],
            targets: wanted(&pack.targets, pack.ignore),
            documents: wanted(&pack.documents, 0),
            positions: wanted(&pack.positions, 0),
        }
    }

    /// Writes the pieces of those documents that are there.
    fn write<'t>(&mut self, rows: &[Vec<Piece>], document: impl Fn(u64) -> Option<&'t Tensor>) -> Result<(), String> {
        let length = self.pack.length;
        for (row, pieces) in rows.iter().enumerate() {
            let mut place = row * length;
            for (number, piece) in pieces.iter().enumerate() {
                let (offset, len) = (piece.offset as usize, piece.len as usize);
                if place + len > (row + 1) * length {
                    return Err(format!("row {row} has more than {length} tokens"));
                }
                let Some(list) = document(piece.sample) else {
                    place += len;
                    continue;
                };
                let list = list.as_slice::<i64>().map_err(|e| e.to_string())?;
                let token = |at: usize| match (list.get(at), self.pack.separator) {
                    (Some(token), _) => Some(*token),
                    (None, Some(separator)) if at == list.len() => Some(separator),
                    _ => None,
                };
                for at in offset..offset + len {
                    let missing = || format!("sample {} is shorter than when its row was planned", piece.sample);
                    self.tokens[place] = token(at).ok_or_else(missing)?;
                    // What follows is of the same document, even where the row ends: each token is predicted once.
                    if let (Some(target), Some(next)) = (self.targets.get_mut(place), token(at + 1)) {
                        *target = next;
                    }
                    if let Some(document) = self.documents.get_mut(place) {
                        *document = number as i64 + 1;
                    }
                    if let Some(position) = self.positions.get_mut(place) {
                        *position = at as i64;
                    }
                    place += 1;
                }
            }
        }
        Ok(())
    }

    /// The tokens under `name`, and what else the configuration names.
    fn tensors(self, name: &str) -> Result<Vec<(String, Tensor)>, String> {
        let shaped = |values: &[i64]| Tensor::new(&[self.rows, self.pack.length], values).map_err(|e| e.to_string());
        let mut out = vec![(name.to_owned(), shaped(&self.tokens)?)];
        for (named, values) in [
            (&self.pack.targets, &self.targets),
            (&self.pack.documents, &self.documents),
            (&self.pack.positions, &self.positions),
        ] {
            if let Some(named) = named {
                if out.iter().any(|(name, _)| name == named) {
                    return Err(format!("two tensors are named `{named}`"));
                }
                out.push((named.clone(), shaped(values)?));
            }
        }
        Ok(out)
    }
}

/// One row of a tensor of rank 2.
fn rows_of(rows: &Tensor, row: usize) -> Result<Tensor, String> {
    let row_bytes = rows.byte_len() / rows.shape()[0].max(1);
    let bytes = &rows.bytes()[row * row_bytes..][..row_bytes];
    Tensor::from_bytes(rows.dtype(), &rows.shape()[1..], bytes).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_row_says_what_follows_each_token_and_where_documents_part() {
        let pack: PackConfig = serde_json::from_value(serde_json::json!({
            "length": 7, "separator": 99, "padding": -1,
            "targets": "next", "documents": "documents", "positions": "positions",
        }))
        .unwrap();
        let lists = [Tensor::vector(&[10i64, 11, 12]), Tensor::vector(&[20i64, 21])];
        let piece = |sample, offset, len| Piece { sample, offset, len };
        // The first document with its separator and the start of the second; then the rest of it.
        let rows = [vec![piece(0, 0, 4), piece(1, 0, 1)], vec![piece(1, 1, 2)]];
        // The documents one at a time, the later first.
        let mut packed = Packed::new(&pack, rows.len());
        for number in [1, 0] {
            packed.write(&rows, |sample| lists.get(sample as usize).filter(|_| sample == number)).unwrap();
        }
        let made = packed.tensors("tokens").unwrap();
        let values = |name: &str| made.iter().find(|(n, _)| n == name).unwrap().1.to_i64().unwrap();
        assert_eq!(values("tokens"), [10, 11, 12, 99, 20, -1, -1, 21, 99, -1, -1, -1, -1, -1]);
        assert_eq!(values("next"), [11, 12, 99, -100, 21, -100, -100, 99, -100, -100, -100, -100, -100, -100]);
        assert_eq!(values("documents"), [1, 1, 1, 1, 2, 0, 0, 1, 1, 0, 0, 0, 0, 0]);
        assert_eq!(values("positions"), [0, 1, 2, 3, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0]);
        let write = |row: Vec<Piece>| Packed::new(&pack, 1).write(&[row], |sample| lists.get(sample as usize));
        let error = write(vec![piece(1, 0, 4)]).unwrap_err();
        assert!(error.contains("sample 1 is shorter"), "{error}");
        assert!(write(vec![piece(0, 0, 4), piece(0, 0, 4)]).unwrap_err().contains("more than 7 tokens"));
    }
}
