//! Cells of which some are missing or cannot be read: what validation counts where a loader refuses.

use updraft_graph::DType;

use super::{Cells, tensor_of};

/// A row without a cell that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// Its place among the cells.
    pub row: usize,
    /// What is wrong with what is there; `None` where nothing is.
    pub fault: Option<String>,
}

impl Gap {
    /// Of a row where nothing is.
    pub(crate) fn missing(row: usize) -> Gap {
        Gap { row, fault: None }
    }

    /// Of a row where something is that cannot be read.
    pub(crate) fn fault(row: usize, reason: impl Into<String>) -> Gap {
        Gap { row, fault: Some(reason.into()) }
    }

    /// What a loader says of it, where it numbers the row `row`.
    pub(crate) fn refusal(&self, row: u64) -> String {
        match &self.fault {
            None => format!("row {row} has no value"),
            Some(reason) => format!("row {row}: {reason}"),
        }
    }
}

/// The cells of a column, and which of them are not there.
#[derive(Debug, Clone, PartialEq)]
pub struct PartialCells {
    /// A cell for every row; that of a gap is NaN, zero or empty.
    pub cells: Cells,
    /// In rising order, each row once.
    pub gaps: Vec<Gap>,
}

impl From<Cells> for PartialCells {
    fn from(cells: Cells) -> PartialCells {
        PartialCells { cells, gaps: Vec::new() }
    }
}

impl PartialCells {
    /// Cells with gaps, in any order; of several of a row the first counts.
    pub(crate) fn new(mut cells: Cells, mut gaps: Vec<Gap>) -> PartialCells {
        gaps.sort_by_key(|gap| gap.row);
        gaps.dedup_by_key(|gap| gap.row);
        blank(&mut cells, &gaps);
        PartialCells { cells, gaps }
    }

    /// The gap at a row.
    pub fn gap(&self, row: usize) -> Option<&Gap> {
        let at = self.gaps.binary_search_by_key(&row, |gap| gap.row).ok()?;
        self.gaps.get(at)
    }

    /// The first cell that is there and cannot be read: its row, and the reason.
    pub fn fault(&self) -> Option<(usize, &str)> {
        self.gaps.iter().find_map(|gap| Some((gap.row, gap.fault.as_deref()?)))
    }

    /// The cells, if there is no gap.
    pub(crate) fn whole(self) -> Result<Cells, Gap> {
        match self.gaps.into_iter().next() {
            None => Ok(self.cells),
            Some(gap) => Err(gap),
        }
    }

    /// The cells that are there.
    pub(crate) fn present(&self) -> Cells {
        let rows: Vec<usize> = (0..self.cells.len()).filter(|row| self.gap(*row).is_none()).collect();
        self.cells.gather(rows.into_iter())
    }

    /// The cells at `rows`, in that order.
    ///
    /// # Panics
    /// If a row is past the end.
    pub(crate) fn gather(&self, rows: &[usize]) -> PartialCells {
        let mut gaps = Vec::new();
        if !self.gaps.is_empty() {
            let found = rows.iter().enumerate().filter_map(|(at, row)| Some((at, self.gap(*row)?)));
            gaps.extend(found.map(|(row, gap)| Gap { row, fault: gap.fault.clone() }));
        }
        PartialCells { cells: self.cells.gather(rows.iter().copied()), gaps }
    }

    /// The cells of several parts, one after the other.
    ///
    /// # Errors
    /// Where the parts do not hold the same kind of cells.
    pub(crate) fn concat(parts: &[&PartialCells]) -> Result<PartialCells, String> {
        let cells = Cells::concat(&parts.iter().map(|part| &part.cells).collect::<Vec<_>>())?;
        let (mut gaps, mut before) = (Vec::new(), 0);
        for part in parts {
            gaps.extend(part.gaps.iter().map(|gap| Gap { row: before + gap.row, fault: gap.fault.clone() }));
            before += part.cells.len();
        }
        Ok(PartialCells { cells, gaps })
    }
}

/// Puts what stands for nothing into the gaps, so that cells do not depend on what a format keeps there.
fn blank(cells: &mut Cells, gaps: &[Gap]) {
    if gaps.is_empty() {
        return;
    }
    match cells {
        Cells::Bytes(cells) => gaps.iter().for_each(|gap| cells[gap.row].clear()),
        Cells::Lists(lists) => {
            for gap in gaps {
                lists[gap.row] = tensor_of(lists[gap.row].dtype(), &[0], &[]);
            }
        }
        Cells::Numbers(tensor) => {
            let row_bytes = tensor.byte_len().checked_div(tensor.shape().first().copied().unwrap_or(0)).unwrap_or(0);
            let element = nothing(tensor.dtype());
            let bytes = tensor.bytes_mut();
            for gap in gaps {
                let row = &mut bytes[gap.row * row_bytes..][..row_bytes];
                row.chunks_exact_mut(element.len()).for_each(|to| to.copy_from_slice(&element));
            }
        }
    }
}

/// The element that stands for nothing, in native order.
fn nothing(dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F16 => half::f16::NAN.to_ne_bytes().to_vec(),
        DType::BF16 => half::bf16::NAN.to_ne_bytes().to_vec(),
        DType::F32 => f32::NAN.to_ne_bytes().to_vec(),
        DType::F64 => f64::NAN.to_ne_bytes().to_vec(),
        other => vec![0; other.size_in_memory().max(1)],
    }
}

#[cfg(test)]
mod tests {
    use updraft_graph::Tensor;

    use super::*;

    #[test]
    fn gaps_follow_their_rows_through_gathering_and_joining() {
        let cells = Cells::Numbers(Tensor::vector(&[1.5f32, 2.5, 3.5]));
        let partial = PartialCells::new(cells, vec![Gap::fault(2, "is torn"), Gap::missing(0), Gap::missing(2)]);
        let joined = PartialCells::concat(&[&partial.gather(&[2, 1, 0]), &partial]).unwrap();
        let gaps: Vec<(usize, Option<&str>)> = joined.gaps.iter().map(|g| (g.row, g.fault.as_deref())).collect();
        assert_eq!(gaps, [(0, Some("is torn")), (2, None), (3, None), (5, Some("is torn"))]);
        let Cells::Numbers(numbers) = &joined.cells else { panic!("numbers stay numbers") };
        let nan: Vec<bool> = numbers.as_slice::<f32>().unwrap().iter().map(|v| v.is_nan()).collect();
        assert_eq!(nan, [true, false, true, true, false, true]);
        assert_eq!(joined.present(), Cells::Numbers(Tensor::vector(&[2.5f32, 2.5])));
        assert_eq!(joined.fault(), Some((0, "is torn")));
    }
}
