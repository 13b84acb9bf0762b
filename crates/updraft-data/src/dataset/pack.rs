//! What becomes of samples that are filtered or packed: what each counts for, and the tensors of rows of pieces.

use updraft_graph::{DType, Tensor};

use super::Dataset;
use crate::config::PackConfig;
use crate::error::DataError;
use crate::packing::Piece;
use crate::source::Cells;
use crate::stall::{Stage, Stopwatch};

impl Dataset {
    /// What each sample counts for: its tokens with the separator where rows are packed, else 1; `None` where it is
    /// filtered out.
    pub(crate) fn weigh(&self, samples: &[u64]) -> Result<Vec<Option<u64>>, DataError> {
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
            let passes = filter.passes(&cells, asked.len()).map_err(|reason| DataError::file(&self.path, reason))?;
            let asked = weights.iter_mut().filter(|weight| weight.is_some());
            asked.zip(passes).filter(|(_, pass)| !pass).for_each(|(weight, _)| *weight = None);
        }
        if let Some(pack) = &self.pack {
            let kept: Vec<u64> = samples.iter().zip(&weights).filter(|(_, w)| w.is_some()).map(|(s, _)| *s).collect();
            let lists = self.lists(&kept, &mut Stopwatch::start(None))?;
            for (weight, list) in weights.iter_mut().filter(|w| w.is_some()).zip(&lists) {
                *weight = Some(list.len() as u64 + u64::from(pack.separator.is_some() && !list.is_empty()));
            }
        }
        Ok(weights)
    }

    /// The tensors of packed rows.
    pub(crate) fn packed(
        &self,
        pack: &PackConfig,
        rows: &[Vec<Piece>],
        watch: &mut Stopwatch,
    ) -> Result<Vec<(String, Tensor)>, DataError> {
        let mut samples: Vec<u64> = rows.iter().flatten().map(|piece| piece.sample).collect();
        samples.sort_unstable();
        samples.dedup();
        let lists = self.lists(&samples, watch)?;
        let document = |sample| samples.binary_search(&sample).ok().and_then(|i| lists.get(i));
        let name = self.tensors.first().map(|t| t.name.as_str()).unwrap_or_default();
        let made = tensors(pack, name, rows, document).map_err(|reason| DataError::tensor(name, reason));
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
        lists.into_iter().map(whole).collect()
    }
}

/// # Errors
/// What is wrong with the configuration: rows of no tokens, or other than one tensor to pack.
pub(super) fn check(pack: &PackConfig, tensors: usize) -> Result<(), String> {
    if pack.length == 0 {
        return Err("`pack.length` must be at least 1".into());
    }
    if tensors != 1 {
        return Err(format!("packing makes rows of one tensor of tokens, and {tensors} are configured"));
    }
    Ok(())
}

/// The tensors of packed rows: the tokens under `name`, and what else the configuration names.
fn tensors<'a>(
    pack: &PackConfig,
    name: &str,
    rows: &[Vec<Piece>],
    document: impl Fn(u64) -> Option<&'a Tensor>,
) -> Result<Vec<(String, Tensor)>, String> {
    let length = pack.length;
    let mut tokens = vec![pack.padding; rows.len() * length];
    let mut targets = vec![pack.ignore; if pack.targets.is_some() { tokens.len() } else { 0 }];
    let mut documents = vec![0i64; if pack.documents.is_some() { tokens.len() } else { 0 }];
    let mut positions = vec![0i64; if pack.positions.is_some() { tokens.len() } else { 0 }];
    for (row, pieces) in rows.iter().enumerate() {
        let mut place = row * length;
        for (number, piece) in pieces.iter().enumerate() {
            let missing = || format!("sample {} is shorter than when its row was planned", piece.sample);
            let list = document(piece.sample).ok_or_else(missing)?;
            let list = list.as_slice::<i64>().map_err(|e| e.to_string())?;
            let token = |at: usize| match (list.get(at), pack.separator) {
                (Some(token), _) => Some(*token),
                (None, Some(separator)) if at == list.len() => Some(separator),
                _ => None,
            };
            let (offset, len) = (piece.offset as usize, piece.len as usize);
            if place + len > (row + 1) * length {
                return Err(format!("row {row} has more than {length} tokens"));
            }
            for at in offset..offset + len {
                tokens[place] = token(at).ok_or_else(missing)?;
                // What follows is of the same document, even where the row ends: each token is predicted once.
                if let (Some(target), Some(next)) = (targets.get_mut(place), token(at + 1)) {
                    *target = next;
                }
                if let Some(document) = documents.get_mut(place) {
                    *document = number as i64 + 1;
                }
                if let Some(position) = positions.get_mut(place) {
                    *position = at as i64;
                }
                place += 1;
            }
        }
    }
    let shaped = |values: &[i64]| Tensor::new(&[rows.len(), length], values).map_err(|e| e.to_string());
    let mut out = vec![(name.to_owned(), shaped(&tokens)?)];
    for (named, values) in [(&pack.targets, targets), (&pack.documents, documents), (&pack.positions, positions)] {
        if let Some(named) = named {
            if out.iter().any(|(name, _)| name == named) {
                return Err(format!("two tensors are named `{named}`"));
            }
            out.push((named.clone(), shaped(&values)?));
        }
    }
    Ok(out)
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
        let made = tensors(&pack, "tokens", &rows, |sample| lists.get(sample as usize)).unwrap();
        let values = |name: &str| made.iter().find(|(n, _)| n == name).unwrap().1.to_i64().unwrap();
        assert_eq!(values("tokens"), [10, 11, 12, 99, 20, -1, -1, 21, 99, -1, -1, -1, -1, -1]);
        assert_eq!(values("next"), [11, 12, 99, -100, 21, -100, -100, 99, -100, -100, -100, -100, -100, -100]);
        assert_eq!(values("documents"), [1, 1, 1, 1, 2, 0, 0, 1, 1, 0, 0, 0, 0, 0]);
        assert_eq!(values("positions"), [0, 1, 2, 3, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0]);
        let error = tensors(&pack, "tokens", &[vec![piece(1, 0, 4)]], |sample| lists.get(sample as usize)).unwrap_err();
        assert!(error.contains("sample 1 is shorter"), "{error}");
    }
}
