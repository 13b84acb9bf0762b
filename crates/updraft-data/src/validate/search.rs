//! Rows that can be read, told apart from those that cannot.
//!
//! What is wrong with one cell readers say with the cell. What is wrong with more (a page, a block) is an error of the
//! whole read, so the rows are halved until those are left that nothing is wrong with, and those that share their bytes
//! with no other: k bad ones among n cost O(k log n) reads.

use crate::error::DataError;
use crate::rows::PartialCells;
use crate::source::shard::ShardReader;

/// Reads rows, which ascend, and shows them in that order: with their cells, or with the reason for which each of them
/// cannot be read, even alone.
///
/// # Errors
/// Those of `seen`, and what is not about the content.
pub(super) fn read_apart(
    reader: &dyn ShardReader,
    columns: &[usize],
    rows: &[u64],
    mut seen: impl FnMut(&[u64], Result<Vec<PartialCells>, DataError>) -> Result<(), DataError>,
) -> Result<(), DataError> {
    // What is still to be read, the first rows last.
    let mut parts = vec![rows];
    while let Some(part) = parts.pop() {
        let (Some(first), Some(last)) = (part.first(), part.last()) else { continue };
        match reader.read_partial(columns, part) {
            Ok(cells) => seen(part, Ok(cells))?,
            Err(error) if !error.is_about_content() => return Err(error),
            Err(error) if first == last || reader.decoded_together(columns, *first).contains(last) => {
                seen(part, Err(error))?;
            }
            Err(_) => {
                let (before, behind) = part.split_at(part.len() / 2);
                parts.push(behind);
                parts.push(before);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::rows::Cells;
    use crate::schema::Schema;

    /// Rows without columns, of which some cannot be read; each comes with the others of its page.
    struct Torn {
        schema: Arc<Schema>,
        bad: Vec<u64>,
        page_rows: u64,
        reads: AtomicU64,
    }

    impl ShardReader for Torn {
        fn schema(&self) -> &Arc<Schema> {
            &self.schema
        }

        fn rows(&self) -> u64 {
            4096
        }

        fn blocks(&self) -> &[u64] {
            &[4096]
        }

        fn block_bytes(&self, _: usize, _: &[usize]) -> u64 {
            0
        }

        fn read(&self, _: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            let pages: Vec<u64> = rows.iter().map(|row| row / self.page_rows).collect();
            match self.bad.iter().find(|bad| pages.contains(&(**bad / self.page_rows))) {
                Some(bad) => Err(DataError::file("torn".as_ref(), format!("row {bad}"))),
                None => Ok(Vec::new()),
            }
        }

        fn decoded_together(&self, _: &[usize], row: u64) -> Range<u64> {
            let start = row / self.page_rows * self.page_rows;
            start..start + self.page_rows
        }

        fn place(&self, row: u64) -> String {
            row.to_string()
        }
    }

    #[test]
    fn bad_rows_are_those_that_cannot_be_read_alone_in_few_reads() {
        let every = |step: usize| (0..4096).step_by(step).collect::<Vec<u64>>();
        for (bad, page_rows) in [
            (vec![], 1),
            (vec![0], 1),
            (vec![4095], 1),
            (every(100), 1),
            (every(1), 1),
            (vec![77, 900], 64),
            (every(1), 4096),
        ] {
            let schema = Arc::new(Schema { columns: Vec::new() });
            let torn = Torn { schema, bad: bad.clone(), page_rows, reads: AtomicU64::new(0) };
            let rows: Vec<u64> = (0..4096).collect();
            let (mut seen, mut found) = (Vec::new(), Vec::new());
            read_apart(&torn, &[], &rows, |rows, read| {
                seen.extend_from_slice(rows);
                found.extend(rows.iter().filter(|_| read.is_err()));
                Ok(())
            })
            .unwrap();
            let reads = torn.reads.load(Ordering::Relaxed);
            let alone: Vec<u64> = rows.iter().filter(|row| torn.read(&[], &[**row]).is_err()).copied().collect();
            assert_eq!((seen, &found), (rows, &alone), "{page_rows} rows to a page, bad {bad:?}");
            let pages = found.len() as u64 / page_rows;
            assert!(reads <= 1 + 2 * pages * 12, "{reads} reads for {pages} bad pages of {page_rows}");
        }
    }
}
