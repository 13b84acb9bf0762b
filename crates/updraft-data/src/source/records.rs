//! What tar and TFRecord have in common: rows one after the other, without an index.
//!
//! Such a shard is walked over once, which finds where its blocks start; from then on a block is one range of bytes. The
//! list of blocks is all that is kept: 16 bytes for each [`BLOCK_BYTES`](crate::shard::BLOCK_BYTES).

use std::sync::Arc;

use bytes::Bytes;

use crate::error::DataError;
use crate::rows::{Cells, Gap, PartialCells, empty};
use crate::schema::{Kind, Schema};
use crate::source::cells::kinds;
use crate::source::input::{Content, Walk};
use crate::source::shard::{BLOCK_BYTES, Block, ReadOptions, ShardReader};

/// A format whose rows lie one after the other.
pub(crate) trait Records: Send + Sync + Sized + 'static {
    /// What a walk knows of the rows that it passed: what was read ahead to find the end of one, and the columns.
    type Passed: Default;

    /// Passes over the next row and gives the byte where it ends; `None` at the end of the rows.
    fn skip(&self, walk: &mut Walk<'_>, passed: &mut Self::Passed) -> Result<Option<u64>, DataError>;

    /// The columns of a shard: what they are is told from its first rows, which ones there are from all that were passed.
    fn infer(&self, content: &Content, bytes: &Bytes, passed: &Self::Passed) -> Result<Schema, DataError>;

    /// The cells of some columns at some rows, both in rising order, of a block of `rows` that starts at `offset`. A row
    /// that has not all its cells is shown to `broken`, and left empty if that says nothing against it.
    fn decode(
        &self,
        block: BlockBytes<'_>,
        wanted: &[(&str, &Kind)],
        rows: &mut dyn Iterator<Item = usize>,
        broken: &mut dyn FnMut(BrokenRow) -> Result<(), DataError>,
    ) -> Result<Vec<Cells>, DataError>;
}

/// A row that has not all its cells.
pub(crate) struct BrokenRow {
    /// Its place among the rows asked for.
    pub at: usize,
    /// The column, among those wanted; `None` where it is about all.
    pub column: Option<usize>,
    /// Whether nothing is there, and not something wrong.
    pub is_missing: bool,
    pub error: DataError,
}

/// A block and its bytes.
pub(crate) struct BlockBytes<'a> {
    pub content: &'a Content,
    pub bytes: &'a Bytes,
    /// Where in the content it starts.
    pub offset: u64,
    /// Its rows.
    pub rows: usize,
    /// The number of its first row in the shard.
    pub first_row: u64,
}

impl BlockBytes<'_> {
    /// How messages name a row of it.
    pub(crate) fn place(&self, row: usize, at: usize) -> String {
        format!(
            "{} record {} (byte {})",
            self.content.input.name(),
            self.first_row + row as u64,
            self.offset + at as u64
        )
    }
}

/// One shard.
pub(crate) struct RecordShard<R> {
    records: R,
    content: Content,
    schema: Arc<Schema>,
    blocks: Vec<Block>,
    block_rows: Vec<u64>,
    /// First row of each block, and the number of rows at the end.
    starts: Vec<u64>,
    end: Option<u64>,
}

impl<R: Records> RecordShard<R> {
    pub(crate) fn open(records: R, content: Content, options: &ReadOptions) -> Result<RecordShard<R>, DataError> {
        let mut passed = R::Passed::default();
        let (blocks, end) = if options.blocks.is_empty() {
            find_blocks(&records, &content, &mut passed)?
        } else {
            (options.blocks.clone(), (!content.is_compressed()).then_some(content.input.len()))
        };
        let schema = match &options.schema {
            Some(schema) => schema.clone(),
            None => {
                let bytes = content.read(0, blocks.get(1).map(|b| b.offset).or(end))?;
                Arc::new(records.infer(&content, &bytes, &passed)?)
            }
        };
        let mut starts = vec![0u64];
        for block in &blocks {
            let next = starts[starts.len() - 1].checked_add(block.rows);
            starts.push(next.ok_or_else(|| content.input.error("claims more than 2^64 rows"))?);
        }
        let block_rows = blocks.iter().map(|b| b.rows).collect();
        Ok(RecordShard { records, content, schema, blocks, block_rows, starts, end })
    }

    fn block(&self, index: usize) -> Result<Bytes, DataError> {
        let start = self.blocks[index].offset;
        let end = self.blocks.get(index + 1).map(|b| b.offset).or(self.end);
        self.content.read(start, end)
    }
}

fn find_blocks<R: Records>(
    records: &R,
    content: &Content,
    passed: &mut R::Passed,
) -> Result<(Vec<Block>, Option<u64>), DataError> {
    let mut walk = content.walk()?;
    let mut blocks: Vec<Block> = Vec::new();
    let mut offset = 0;
    while let Some(end) = records.skip(&mut walk, passed)? {
        match blocks.last_mut() {
            Some(block) if content.is_compressed() || end - block.offset <= BLOCK_BYTES => block.rows += 1,
            _ => blocks.push(Block { rows: 1, offset }),
        }
        offset = end;
    }
    Ok((blocks, Some(offset)))
}

impl<R: Records> ShardReader for RecordShard<R> {
    fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    fn rows(&self) -> u64 {
        self.starts[self.starts.len() - 1]
    }

    fn blocks(&self) -> &[u64] {
        &self.block_rows
    }

    fn block_list(&self) -> Vec<Block> {
        self.blocks.clone()
    }

    fn block_bytes(&self, block: usize, columns: &[usize]) -> u64 {
        let fixed = |column: &usize| self.schema.columns.get(*column).and_then(|c| c.kind.row_bytes());
        let rows = self.block_rows.get(block).copied().unwrap_or(0);
        match columns.iter().map(fixed).sum::<Option<usize>>() {
            Some(bytes) => rows.saturating_mul(bytes as u64),
            None => {
                let start = self.blocks.get(block).map_or(0, |b| b.offset);
                let end = self.blocks.get(block + 1).map(|b| b.offset).or(self.end).unwrap_or(start);
                (end - start).saturating_add(rows * 32)
            }
        }
    }

    fn read(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<Cells>, DataError> {
        self.read_with(columns, rows, &mut |broken| Err(broken.error))
    }

    fn read_partial(&self, columns: &[usize], rows: &[u64]) -> Result<Vec<PartialCells>, DataError> {
        let mut gaps: Vec<Vec<Gap>> = vec![Vec::new(); columns.len()];
        let cells = self.read_with(columns, rows, &mut |broken| {
            let fault = (!broken.is_missing).then(|| broken.error.to_string());
            let column = broken.column.map_or(0..columns.len(), |column| column..column + 1);
            gaps[column].iter_mut().for_each(|gaps| gaps.push(Gap { row: broken.at, fault: fault.clone() }));
            Ok(())
        })?;
        Ok(cells.into_iter().zip(gaps).map(|(cells, gaps)| PartialCells::new(cells, gaps)).collect())
    }

    fn place(&self, row: u64) -> String {
        let block = self.starts.partition_point(|start| *start <= row).saturating_sub(1);
        let offset = self.blocks.get(block).map_or(0, |b| b.offset);
        format!("{} record {row} (in the block at byte {offset})", self.content.input.name())
    }
}

impl<R: Records> RecordShard<R> {
    /// Reads rows; a broken one is numbered by its place in `rows`.
    fn read_with(
        &self,
        columns: &[usize],
        rows: &[u64],
        broken: &mut dyn FnMut(BrokenRow) -> Result<(), DataError>,
    ) -> Result<Vec<Cells>, DataError> {
        let kinds = kinds(&self.schema, columns).map_err(|r| self.content.input.error(r))?;
        if rows.is_empty() {
            return kinds.into_iter().map(empty).collect::<Result<_, _>>().map_err(|r| self.content.input.error(r));
        }
        let wanted: Vec<(&str, &Kind)> =
            columns.iter().map(|at| self.schema.columns[*at].name.as_str()).zip(kinds).collect();
        if let Some(row) = rows.iter().find(|row| **row >= self.rows()) {
            return Err(self.content.input.error(format!("has no row {row}, only {}", self.rows())));
        }
        // Blocks are read once each, in the order of the file, and the rows brought into the order asked for.
        let mut order: Vec<usize> = (0..rows.len()).collect();
        let rising = rows.is_sorted();
        if !rising {
            order.sort_by_key(|at| rows[*at]);
        }
        let mut parts: Vec<Vec<Cells>> = Vec::new();
        let mut at = 0;
        while at < order.len() {
            let block = self.starts.partition_point(|start| *start <= rows[order[at]]) - 1;
            let end = at + order[at..].iter().take_while(|i| rows[**i] < self.starts[block + 1]).count();
            let bytes = self.block(block)?;
            let first_row = self.starts[block];
            let block_bytes = BlockBytes {
                content: &self.content,
                bytes: &bytes,
                offset: self.blocks[block].offset,
                rows: self.blocks[block].rows as usize,
                first_row,
            };
            let mut picks = order[at..end].iter().map(|i| (rows[*i] - first_row) as usize);
            let mut in_block = |row: BrokenRow| broken(BrokenRow { at: order[at + row.at], ..row });
            parts.push(self.records.decode(block_bytes, &wanted, &mut picks, &mut in_block)?);
            at = end;
        }
        let mut out = Vec::with_capacity(columns.len());
        for (column, (name, _)) in wanted.iter().enumerate() {
            let cells: Vec<&Cells> = parts.iter().map(|part| &part[column]).collect();
            let joined = match (parts.len(), cells.first()) {
                (1, Some(only)) => Ok((*only).clone()),
                _ => Cells::concat(&cells),
            };
            let joined = joined
                .map_err(|r| self.content.input.error(format!("column `{name}` differs within the shard: {r}")))?;
            out.push(if rising {
                joined
            } else {
                let mut back = vec![0; order.len()];
                order.iter().enumerate().for_each(|(sorted, asked)| back[*asked] = sorted);
                joined.gather(back.into_iter())
            });
        }
        Ok(out)
    }
}
