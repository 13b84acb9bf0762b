//! The inner loops: rows of weights times a packed input found through a table of offsets, and their transpose, the
//! weight gradient. Blocks of results stay in registers over the whole depth of the sum.

use crate::cpu::isa::{self, Isa};
use crate::cpu::lanes::{LANES_MAX, Lanes, with_lanes};

/// Rows of a full block of weights: what fills the registers without spilling.
pub(crate) fn block_rows(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 => 8,
        Isa::Avx2 | Isa::Portable => 4,
    }
}

/// The blocks that `rows` rows are cut into: full ones, then the smallest power of two that holds the rest.
pub(crate) fn blocks(isa: Isa, rows: usize) -> impl Iterator<Item = Block> {
    let full = block_rows(isa);
    (0..rows.div_ceil(full)).map(move |index| {
        let used = (rows - index * full).min(full);
        Block { start: index * full, used, rows: used.next_power_of_two() }
    })
}

/// Consecutive rows of weights, interleaved so that the weights of one depth lie together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Block {
    pub(crate) start: usize,
    /// Rows that exist.
    pub(crate) used: usize,
    /// Rows with those of zeros: 1, 2, 4 or 8.
    pub(crate) rows: usize,
}

/// `results[row][p] = Σ_k weights[k][row] * input[start + offsets[k] + p]` for a run of positions.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    /// `offsets.len()` times `rows` numbers.
    pub(crate) weights: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) offsets: &'a [u32],
    /// The largest of the offsets.
    pub(crate) offset_max: usize,
    pub(crate) input: &'a [f32],
    /// Where position 0 of the run begins in the input.
    pub(crate) start: usize,
    /// Positions of the run.
    pub(crate) len: usize,
    /// From one row of results to the next.
    pub(crate) pitch: usize,
}

/// Computes a run of positions of a block. Whole registers are written: `results` beyond `len`, up to the next multiple
/// of [`LANES_MAX`], become unspecified where the input has that many numbers more; where it ends with the run, the last
/// register of positions is computed from its end backwards, and nothing beyond is touched.
///
/// # Panics
/// If a slice is too short for what the numbers say.
pub(crate) fn product(isa: Isa, product: Product<'_>, results: &mut [f32]) {
    let Product { weights, rows, offsets, offset_max, input, start, len, pitch } = product;
    if len == 0 {
        return;
    }
    assert!(isa <= isa::detected(), "{isa:?} is not there");
    let first_end = start + offset_max;
    let padded = len.next_multiple_of(LANES_MAX);
    let has_slack = input.len() >= first_end + padded;
    assert!(has_slack || (len >= LANES_MAX && input.len() >= first_end + len), "input of {} is short", input.len());
    assert!(weights.len() >= offsets.len() * rows && pitch >= padded && results.len() >= (rows - 1) * pitch + padded);
    debug_assert!(offsets.iter().all(|offset| *offset as usize <= offset_max));
    // SAFETY: the processor has the instruction set by the assertion. Reads end at `start + offset + padded`, or `+ len` without slack, which
    // the assertion on the input covers given that no offset exceeds `offset_max`; writes end at
    // `(rows - 1) * pitch + padded`, which the assertion on the results covers.
    unsafe {
        with_lanes!(isa, product_run(product: Product<'_>, has_slack: bool, results: &mut [f32]));
    }
}

#[inline(always)]
unsafe fn product_run<L: Lanes>(product: Product<'_>, has_slack: bool, results: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        // Many registers of positions for few rows, fewer for more: the accumulators fill the register file, and there
        // are enough of them to hide the latency of a multiply-add.
        match (product.rows, L::WIDTH) {
            (1, _) => product_rows::<L, 1>(product, has_slack, 8, results),
            (2, LANES_MAX) => product_rows::<L, 2>(product, has_slack, 8, results),
            (2, _) => product_rows::<L, 2>(product, has_slack, 5, results),
            (4, LANES_MAX) => product_rows::<L, 4>(product, has_slack, 6, results),
            (4, _) => product_rows::<L, 4>(product, has_slack, 3, results),
            (8, LANES_MAX) => product_rows::<L, 8>(product, has_slack, 3, results),
            (rows, _) => unreachable!("no block has {rows} rows"),
        }
    }
}

#[inline(always)]
unsafe fn product_rows<L: Lanes, const ROWS: usize>(
    product: Product<'_>,
    has_slack: bool,
    registers_max: usize,
    results: &mut [f32],
) {
    let whole = if has_slack { product.len.div_ceil(L::WIDTH) } else { product.len / L::WIDTH };
    let mut done = 0;
    while done < whole {
        // Equal parts rather than full ones and a rest: a block of one register waits for its own results.
        let parts = (whole - done).div_ceil(registers_max);
        let registers = (whole - done).div_ceil(parts);
        let position = done * L::WIDTH;
        // SAFETY: the caller's promise, as the run has `whole` registers.
        unsafe {
            match registers {
                1 => product_block::<L, ROWS, 1>(product, position, results),
                2 => product_block::<L, ROWS, 2>(product, position, results),
                3 => product_block::<L, ROWS, 3>(product, position, results),
                4 => product_block::<L, ROWS, 4>(product, position, results),
                5 => product_block::<L, ROWS, 5>(product, position, results),
                6 => product_block::<L, ROWS, 6>(product, position, results),
                7 => product_block::<L, ROWS, 7>(product, position, results),
                _ => product_block::<L, ROWS, 8>(product, position, results),
            }
        }
        done += registers;
    }
    if whole * L::WIDTH < product.len {
        // SAFETY: without slack the run has at least one register, and this one ends where the run ends.
        unsafe { product_block::<L, ROWS, 1>(product, product.len - L::WIDTH, results) }
    }
}

#[inline(always)]
unsafe fn product_block<L: Lanes, const ROWS: usize, const REGISTERS: usize>(
    product: Product<'_>,
    position: usize,
    results: &mut [f32],
) {
    // No instruction set has the registers: the match above names such blocks only because it is generic.
    if ROWS * REGISTERS > 24 {
        unreachable!("{ROWS} rows of {REGISTERS} registers");
    }
    // SAFETY: the caller's promise; every access lies in the run.
    unsafe {
        let mut sums = [[L::splat(0.0); REGISTERS]; ROWS];
        let input = product.input.as_ptr().add(product.start + position);
        let mut weights = product.weights.as_ptr();
        for offset in product.offsets {
            let input = input.add(*offset as usize);
            let mut columns = [L::splat(0.0); REGISTERS];
            for register in 0..REGISTERS {
                columns[register] = L::load(input.add(register * L::WIDTH));
            }
            for row in 0..ROWS {
                let weight = L::splat(*weights.add(row));
                for register in 0..REGISTERS {
                    sums[row][register] = weight.mul_add(columns[register], sums[row][register]);
                }
            }
            weights = weights.add(ROWS);
        }
        let results = results.as_mut_ptr().add(position);
        for row in 0..ROWS {
            for register in 0..REGISTERS {
                sums[row][register].store(results.add(row * product.pitch + register * L::WIDTH));
            }
        }
    }
}

/// `sums[row][k] += Σ_p errors[row][p] * input[start + offsets[k] + p]` over runs of positions.
#[derive(Clone, Copy)]
pub(crate) struct OuterProduct<'a> {
    /// Rows of errors, zero at positions that do not exist.
    pub(crate) errors: &'a [f32],
    pub(crate) rows: usize,
    /// From one row of errors to the next.
    pub(crate) errors_pitch: usize,
    /// Positions of each run, a multiple of [`LANES_MAX`]; the runs of a row of errors lie one after the other.
    pub(crate) len: usize,
    pub(crate) offsets: &'a [u32],
    pub(crate) offset_max: usize,
    pub(crate) input: &'a [f32],
    /// Where position 0 of each run begins in the input.
    pub(crate) starts: &'a [usize],
    /// From one row of sums to the next.
    pub(crate) sums_pitch: usize,
}

/// Adds a tile's share to the sums.
///
/// # Panics
/// If a slice is too short for what the numbers say.
pub(crate) fn outer_product(isa: Isa, product: OuterProduct<'_>, sums: &mut [f32]) {
    let OuterProduct { errors, rows, errors_pitch, len, offsets, offset_max, input, starts, sums_pitch } = product;
    let Some(last) = starts.iter().max() else { return };
    if rows == 0 || offsets.is_empty() {
        return;
    }
    assert!(isa <= isa::detected(), "{isa:?} is not there");
    assert!(len.is_multiple_of(LANES_MAX) && input.len() >= last + offset_max + len);
    assert!(errors_pitch >= starts.len() * len && errors.len() >= rows * errors_pitch);
    assert!(sums_pitch >= offsets.len() && sums.len() >= (rows - 1) * sums_pitch + offsets.len());
    debug_assert!(offsets.iter().all(|offset| *offset as usize <= offset_max));
    // SAFETY: the processor has the instruction set by the first assertion; the assertions bound every read of the input (no offset exceeds
    // `offset_max`, no start `last`) and of the errors, and every write to the sums.
    unsafe {
        with_lanes!(isa, outer_product_runs(product: OuterProduct<'_>, sums: &mut [f32]));
    }
}

#[inline(always)]
unsafe fn outer_product_runs<L: Lanes>(product: OuterProduct<'_>, sums: &mut [f32]) {
    let taps_max = if L::WIDTH == LANES_MAX { 6 } else { 3 };
    let mut row = 0;
    while row < product.rows {
        let rows = if product.rows - row >= 4 { 4 } else { 1 };
        // A single row has accumulators to spare for more taps.
        let taps_max = if rows == 1 { 9 } else { taps_max };
        let mut tap = 0;
        while tap < product.offsets.len() {
            let parts = (product.offsets.len() - tap).div_ceil(taps_max);
            let taps = (product.offsets.len() - tap).div_ceil(parts);
            // SAFETY: the caller's promise, as rows and taps are in bounds.
            unsafe {
                match (rows, taps) {
                    (4, 1) => outer_product_block::<L, 4, 1>(product, row, tap, sums),
                    (4, 2) => outer_product_block::<L, 4, 2>(product, row, tap, sums),
                    (4, 3) => outer_product_block::<L, 4, 3>(product, row, tap, sums),
                    (4, 4) => outer_product_block::<L, 4, 4>(product, row, tap, sums),
                    (4, 5) => outer_product_block::<L, 4, 5>(product, row, tap, sums),
                    (4, _) => outer_product_block::<L, 4, 6>(product, row, tap, sums),
                    (_, 1) => outer_product_block::<L, 1, 1>(product, row, tap, sums),
                    (_, 2) => outer_product_block::<L, 1, 2>(product, row, tap, sums),
                    (_, 3) => outer_product_block::<L, 1, 3>(product, row, tap, sums),
                    (_, 4) => outer_product_block::<L, 1, 4>(product, row, tap, sums),
                    (_, 5) => outer_product_block::<L, 1, 5>(product, row, tap, sums),
                    (_, 6) => outer_product_block::<L, 1, 6>(product, row, tap, sums),
                    (_, 7) => outer_product_block::<L, 1, 7>(product, row, tap, sums),
                    (_, 8) => outer_product_block::<L, 1, 8>(product, row, tap, sums),
                    (_, _) => outer_product_block::<L, 1, 9>(product, row, tap, sums),
                }
            }
            tap += taps;
        }
        row += rows;
    }
}

#[inline(always)]
unsafe fn outer_product_block<L: Lanes, const ROWS: usize, const TAPS: usize>(
    product: OuterProduct<'_>,
    row_start: usize,
    tap_start: usize,
    sums: &mut [f32],
) {
    // SAFETY: the caller's promise; rows and taps of the block are in bounds.
    unsafe {
        let mut block = [[L::splat(0.0); TAPS]; ROWS];
        let mut errors = product.errors.as_ptr().add(row_start * product.errors_pitch);
        let offsets = product.offsets.as_ptr().add(tap_start);
        for start in product.starts {
            let input = product.input.as_ptr().add(*start);
            let inputs: [*const f32; TAPS] = std::array::from_fn(|tap| input.add(*offsets.add(tap) as usize));
            let mut position = 0;
            while position < product.len {
                let mut row_errors = [L::splat(0.0); ROWS];
                for row in 0..ROWS {
                    row_errors[row] = L::load(errors.add(row * product.errors_pitch + position));
                }
                for tap in 0..TAPS {
                    let column = L::load(inputs[tap].add(position));
                    for row in 0..ROWS {
                        block[row][tap] = row_errors[row].mul_add(column, block[row][tap]);
                    }
                }
                position += L::WIDTH;
            }
            errors = errors.add(product.len);
        }
        for row in 0..ROWS {
            let sums = sums.as_mut_ptr().add((row_start + row) * product.sums_pitch + tap_start);
            for tap in 0..TAPS {
                *sums.add(tap) += block[row][tap].sum();
            }
        }
    }
}
