//! Documents of any length in rows of one length, resumable at any row.
//!
//! A packer walks the documents of a lane and answers rows: pieces of documents, by sample number and offset. It moves no
//! tokens, so its state is where it stands in the lane and the numbers of what it has taken and not yet given out.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::config::Fill;

/// Consecutive tokens of one document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64, u64)", into = "(u64, u64, u64)")]
pub struct Piece {
    /// The number of the sample that the document is.
    pub sample: u64,
    /// Tokens of the document before the piece.
    pub offset: u64,
    /// Tokens of the piece.
    pub len: u64,
}

impl From<(u64, u64, u64)> for Piece {
    fn from((sample, offset, len): (u64, u64, u64)) -> Piece {
        Piece { sample, offset, len }
    }
}

impl From<Piece> for (u64, u64, u64) {
    fn from(piece: Piece) -> (u64, u64, u64) {
        (piece.sample, piece.offset, piece.len)
    }
}

/// Where a lane stands: what a checkpoint keeps of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaneState {
    /// Samples of the lane that were taken, since the start of training.
    #[serde(rename = "at")]
    pub cursor: u64,
    /// What is left of a document that did not fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rest: Option<Piece>,
    /// Rows that still have room.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub open: Vec<Vec<Piece>>,
}

impl LaneState {
    /// Holds a state that was kept against what lays documents into rows, and the number of samples.
    ///
    /// # Errors
    /// What is in it, and what could be.
    pub(crate) fn check(&self, packer: Option<&Packer>, samples: u64) -> Result<(), [String; 2]> {
        // Far beyond what any training takes, and far below where counting further would overflow.
        if self.cursor > 1 << 62 {
            return Err([format!("{} samples taken", self.cursor), "at most 2^62".into()]);
        }
        let pieces = self.rest.iter().chain(self.open.iter().flatten());
        for Piece { sample, offset, len } in pieces {
            if *sample >= samples {
                return Err([format!("sample {sample}"), format!("of {samples} samples")]);
            }
            if *len == 0 || offset.checked_add(*len).is_none() {
                return Err([format!("{len} tokens after {offset}"), "a piece of a document".into()]);
            }
        }
        let (rows_max, length) = match packer {
            None if self.rest.is_some() => return Err(["the rest of a document".into(), "not packed".into()]),
            None => (0, 0),
            Some(Packer { length, fill: Fill::Cut }) => (1, *length),
            Some(Packer { length, fill: Fill::Whole { open_rows } }) => ((*open_rows).max(1), *length),
        };
        if self.open.len() > rows_max {
            return Err([format!("{} open rows", self.open.len()), format!("of {rows_max} at most")]);
        }
        let is_open = |row: &Vec<Piece>| {
            row.iter().try_fold(0u64, |sum, p| sum.checked_add(p.len)).is_some_and(|sum| (1..length).contains(&sum))
        };
        match self.open.iter().all(is_open) {
            true => Ok(()),
            false => Err(["an open row without a token or without room".into(), format!("of {length} tokens")]),
        }
    }
}

/// How documents are laid into rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packer {
    /// Tokens of a row.
    pub length: u64,
    pub fill: Fill,
}

impl Packer {
    /// The next row of a lane; `next` gives the next document, with offset 0, and moves `cursor`.
    ///
    /// # Errors
    /// Those of `next`; then the state is as it was after the last document.
    pub(crate) fn next_row<E>(
        &self,
        state: &mut LaneState,
        mut next: impl FnMut(&mut u64) -> Result<Piece, E>,
    ) -> Result<Vec<Piece>, E> {
        loop {
            let document = match state.rest.take() {
                Some(rest) => rest,
                None => next(&mut state.cursor)?,
            };
            if let Some(row) = self.place(state, document) {
                return Ok(row);
            }
        }
    }

    /// The rows that are left when there are no more documents, fullest first.
    pub(crate) fn flush(&self, state: &mut LaneState) -> VecDeque<Vec<Piece>> {
        let mut rows = VecDeque::new();
        while let Some(rest) = state.rest.take() {
            rows.extend(self.place(state, rest));
        }
        let mut open = std::mem::take(&mut state.open);
        open.sort_by_key(|row| std::cmp::Reverse(filled(row)));
        rows.extend(open);
        rows
    }

    /// Lays a document down; answers the row that this completes.
    fn place(&self, state: &mut LaneState, document: Piece) -> Option<Vec<Piece>> {
        if document.len == 0 {
            return None;
        }
        match self.fill {
            Fill::Cut => {
                let mut row = state.open.pop().unwrap_or_default();
                let (piece, rest) = cut(document, self.length - filled(&row));
                state.rest = rest;
                row.push(piece);
                if filled(&row) == self.length {
                    return Some(row);
                }
                state.open.push(row);
                None
            }
            Fill::Whole { open_rows } => {
                let (piece, rest) = cut(document, self.length);
                state.rest = rest;
                if piece.len == self.length {
                    return Some(vec![piece]);
                }
                // The fullest row with room (best fit), and of equal ones the oldest.
                let room = |row: &Vec<Piece>| self.length - filled(row);
                let fitting = state.open.iter().enumerate().filter(|(_, row)| room(row) >= piece.len);
                match fitting.min_by_key(|(_, row)| room(row)).map(|(i, _)| i) {
                    Some(best) => {
                        state.open[best].push(piece);
                        (room(&state.open[best]) == 0).then(|| state.open.remove(best))
                    }
                    None => {
                        state.open.push(vec![piece]);
                        if state.open.len() <= open_rows.max(1) {
                            return None;
                        }
                        // The new row is the emptiest only by chance; the fullest has the least to gain from waiting.
                        let fullest = state.open.iter().enumerate().min_by_key(|(_, row)| room(row)).map(|(i, _)| i);
                        fullest.map(|i| state.open.remove(i))
                    }
                }
            }
        }
    }
}

fn filled(row: &[Piece]) -> u64 {
    row.iter().map(|piece| piece.len).sum()
}

/// The first `len` tokens of a piece, and the rest where there is one.
fn cut(piece: Piece, len: u64) -> (Piece, Option<Piece>) {
    if piece.len <= len {
        return (piece, None);
    }
    let rest = Piece { sample: piece.sample, offset: piece.offset + len, len: piece.len - len };
    (Piece { len, ..piece }, Some(rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Documents of a lane, numbered from 0, and then no more.
    fn documents(lens: &[u64]) -> impl FnMut(&mut u64) -> Result<Piece, ()> + '_ {
        |cursor| {
            let sample = *cursor;
            let len = *lens.get(sample as usize).ok_or(())?;
            *cursor += 1;
            Ok(Piece { sample, offset: 0, len })
        }
    }

    fn rows(packer: &Packer, state: &mut LaneState, lens: &[u64]) -> Vec<Vec<Piece>> {
        let mut rows: Vec<Vec<Piece>> = std::iter::from_fn(|| packer.next_row(state, documents(lens)).ok()).collect();
        rows.extend(packer.flush(state));
        rows
    }

    fn fills() -> impl Strategy<Value = Fill> {
        prop_oneof![Just(Fill::Cut), (1usize..9).prop_map(|open_rows| Fill::Whole { open_rows })]
    }

    proptest! {
        #[test]
        fn every_token_is_in_one_row_and_rows_are_not_overfull(
            lens in prop::collection::vec(0u64..50, 0..60), length in 1u64..40, fill in fills(),
        ) {
            let packer = Packer { length, fill };
            let rows = rows(&packer, &mut LaneState::default(), &lens);
            let mut seen: Vec<Vec<bool>> = lens.iter().map(|len| vec![false; *len as usize]).collect();
            for row in &rows {
                prop_assert!((1..=length).contains(&filled(row)));
                for piece in row {
                    for token in piece.offset..piece.offset + piece.len {
                        let seen = &mut seen[piece.sample as usize][token as usize];
                        prop_assert!(!*seen);
                        *seen = true;
                    }
                }
            }
            prop_assert!(seen.iter().flatten().all(|seen| *seen));
            match packer.fill {
                // All rows but the last are full, and documents come in order.
                Fill::Cut => prop_assert!(rows.iter().rev().skip(1).all(|row| filled(row) == length)),
                // Only documents longer than a row are cut.
                Fill::Whole { .. } => {
                    prop_assert!(rows.iter().flatten().all(|p| p.offset == 0 || lens[p.sample as usize] > length));
                }
            }
        }

        #[test]
        fn rows_go_on_from_a_kept_state_as_if_there_had_been_no_break(
            lens in prop::collection::vec(0u64..50, 1..60), length in 1u64..40, fill in fills(), at in 0usize..40,
        ) {
            let packer = Packer { length, fill };
            let mut state = LaneState::default();
            let mut all = Vec::new();
            for _ in 0..at {
                let Ok(row) = packer.next_row(&mut state, documents(&lens)) else { break };
                all.push(row);
            }
            let kept = serde_json::to_string(&state).unwrap();
            let mut state = serde_json::from_str(&kept).unwrap();
            all.extend(rows(&packer, &mut state, &lens));
            prop_assert_eq!(all, rows(&packer, &mut LaneState::default(), &lens));
        }
    }

    #[test]
    fn whole_documents_fill_rows_well_with_a_few_open_rows() {
        // Lengths from 1 to 100 in a row of 128, in a scrambled order.
        let lens: Vec<u64> = (0..2000).map(|i| 1 + i * 7919 % 100).collect();
        let used = |open_rows| {
            let rows = rows(&Packer { length: 128, fill: Fill::Whole { open_rows } }, &mut LaneState::default(), &lens);
            lens.iter().sum::<u64>() as f64 / (128 * rows.len()) as f64
        };
        assert!(used(1) > 0.7 && used(16) > 0.95, "{} and {}", used(1), used(16));
    }
}
