//! From the INT4 layouts that are packed across outputs or stored input by input to rows of outputs.
//!
//! Both work in tiles of 16 words (64 bytes) of the result, so that a cache line is read and written once.

/// Words of a result row in one tile.
const TILE: usize = 16;

/// `from` `[rows, columns]` words, little-endian, to `[columns, rows]`: GPTQ's `qweight` to rows of outputs.
pub(super) fn words(from: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let from = from.as_chunks::<4>().0;
    let mut to = vec![0u8; rows * columns * 4];
    let words = to.as_chunks_mut::<4>().0;
    for row in (0..rows).step_by(TILE) {
        let row_end = (row + TILE).min(rows);
        for column in 0..columns {
            for (word, to) in (row..row_end).zip(&mut words[column * rows + row..]) {
                *to = from[word * columns + column];
            }
        }
    }
    to
}

/// AWQ's `qweight` `[inputs, outputs / 8]`, where nibble n of word c is output `8 c + ORDER[n]`, to `[outputs, inputs / 8]`
/// words whose nibble n is input `8 r + n`.
pub(super) fn awq(from: &[u8], inputs: usize, outputs: usize) -> Vec<u8> {
    let from = from.as_chunks::<4>().0;
    let (rows, columns) = (inputs / 8, outputs / 8);
    let mut to = vec![0u8; rows * outputs * 4];
    let words = to.as_chunks_mut::<4>().0;
    let mut tile = [[0u32; 8]; TILE];
    for row in (0..rows).step_by(TILE) {
        let tile = &mut tile[..TILE.min(rows - row)];
        for column in 0..columns {
            for (r, out) in tile.iter_mut().enumerate() {
                let input = (row + r) * 8;
                *out = std::array::from_fn(|i| u32::from_le_bytes(from[(input + i) * columns + column]));
                transpose_nibbles(out);
            }
            for (nibble, order) in super::awq::ORDER.into_iter().enumerate() {
                let start = (column * 8 + order) * rows + row;
                for (to, words) in words[start..].iter_mut().zip(tile.iter()) {
                    *to = words[nibble].to_le_bytes();
                }
            }
        }
    }
    to
}

/// Nibble j of word i becomes nibble i of word j.
fn transpose_nibbles(words: &mut [u32; 8]) {
    for (distance, mask) in [(4, 0x0000_ffff_u32), (2, 0x00ff_00ff), (1, 0x0f0f_0f0f)] {
        for i in (0..8).filter(|i| i & distance == 0) {
            let shift = 4 * distance as u32;
            let swap = ((words[i] >> shift) ^ words[i + distance]) & mask;
            words[i] ^= swap << shift;
            words[i + distance] ^= swap;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(count: usize) -> Vec<u8> {
        let mut state = 1u32;
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        std::iter::repeat_with(next).take(count).collect()
    }

    fn nibble(bytes: &[u8], word: usize, n: usize) -> u8 {
        (bytes[word * 4 + n / 2] >> (4 * (n % 2))) & 15
    }

    #[test]
    fn awq_nibbles_go_where_the_layout_says() {
        for (inputs, outputs) in [(8, 8), (128, 16), (136, 24), (384, 128)] {
            let from = noise(inputs * outputs / 2);
            let to = awq(&from, inputs, outputs);
            for input in 0..inputs {
                for output in 0..outputs {
                    let n = super::super::awq::ORDER
                        .iter()
                        .position(|&o| o == output % 8)
                        .unwrap();
                    let expected = nibble(&from, input * (outputs / 8) + output / 8, n);
                    assert_eq!(
                        nibble(&to, output * (inputs / 8) + input / 8, input % 8),
                        expected
                    );
                }
            }
        }
    }

    #[test]
    fn words_are_transposed() {
        for (rows, columns) in [(1, 1), (16, 128), (17, 3), (5, 40)] {
            let from = noise(rows * columns * 4);
            let to = words(&from, rows, columns);
            for row in 0..rows {
                for column in 0..columns {
                    let (a, b) = (row * columns + column, column * rows + row);
                    assert_eq!(from[a * 4..a * 4 + 4], to[b * 4..b * 4 + 4]);
                }
            }
        }
    }
}
