//! Activations from one order of axes to the other: each image is a matrix, transposed.

use crate::cpu::isa::dispatch;
use crate::cpu::kernel::Pool;

/// Rows and columns of a square that is transposed at once: its lines of both sides fit into the nearest cache.
const SQUARE: usize = 32;

/// Elements of a tile.
const TILE_ELEMENTS: usize = 16384;

/// For each image, `to[column][row] = from[row][column]`, of elements of `SIZE` bytes.
///
/// # Panics
/// If the slices are not of the same number of whole images.
pub(super) fn transpose_images<const SIZE: usize>(
    pool: &Pool,
    [rows, columns]: [usize; 2],
    from: &[u8],
    to: &mut [u8],
) {
    assert_eq!(from.len(), to.len());
    let image_len = rows * columns;
    if image_len == 0 {
        return;
    }
    let (from, to) = (from.as_chunks::<SIZE>().0, to.as_chunks_mut::<SIZE>().0);
    // A band is some columns of one image.
    let band_columns = (TILE_ELEMENTS / rows).clamp(1, columns).next_multiple_of(SQUARE).min(columns);
    let bands = columns.div_ceil(band_columns);
    let images = from.len() / image_len;
    let shared = crate::cpu::kernel::Shared::new(to);
    pool.for_each(images * bands, |index| {
        let (image, first) = (index / bands, index % bands * band_columns);
        let end = (first + band_columns).min(columns);
        let from = &from[image * image_len..][..image_len];
        let start = image * image_len;
        // SAFETY: bands are apart.
        let to = unsafe { shared.range(start + first * rows..start + end * rows) };
        if SIZE == 1 {
            transpose_bytes([rows, columns, first], from.as_flattened(), to.as_flattened_mut());
        } else {
            transpose_in([rows, columns, first], from, to);
        }
    });
}

dispatch!(fn transpose_bytes(shape: [usize; 3], from: &[u8], to: &mut [u8]) = transpose_bytes_in);

#[inline(always)]
fn transpose_bytes_in<const FMA: bool>([rows, columns, first]: [usize; 3], from: &[u8], to: &mut [u8]) {
    if rows == 3 {
        // Pictures: a pixel has three colours.
        let [red, green, blue] = [0, 1, 2].map(|row| &from[row * columns + first..][..to.len() / 3]);
        for (to, ((red, green), blue)) in to.as_chunks_mut().0.iter_mut().zip(red.iter().zip(green).zip(blue)) {
            *to = [*red, *green, *blue];
        }
    } else {
        transpose_in([rows, columns, first], from, to);
    }
}

/// Columns from `first` on.
#[inline(always)]
fn transpose_in<T: Copy>([rows, columns, first]: [usize; 3], from: &[T], to: &mut [T]) {
    for (band, to) in to.chunks_mut(SQUARE * rows).enumerate() {
        let first_column = first + band * SQUARE;
        for first_row in (0..rows).step_by(SQUARE) {
            let end = (first_row + SQUARE).min(rows);
            for (column, to) in to.chunks_exact_mut(rows).enumerate() {
                let from = from[first_row * columns + first_column + column..].iter().step_by(columns);
                to[first_row..end].iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            }
        }
    }
}
