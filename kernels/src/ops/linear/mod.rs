//! Linear: `y[t, o] = sum over k of x[t, k] * w[o, k]`, w in its stored format.
//!
//! The one order of a sum (invariant K1). Inputs are cut into chunks; within a chunk each of 16 lanes owns some
//! of the inputs and adds their products by fused multiply-add in ascending chunk order, and within a chunk in
//! ascending order of the inputs; the lanes are added by the tree of `Simd::sum`. Inputs past the end of the row
//! count as 0.
//!
//! | format | chunk | lane of input k of the chunk | product |
//! |---|---|---|---|
//! | F32, F16 | 16 | k | x * w |
//! | BF16 | 32 | k / 2 | x * w |
//! | FP8 | 64 | 4 (k / 16) + k % 8 / 2 | (x * (scale * 256)) * (w / 256), the first product rounded |
//! | INT4 | 128 | k / 8 | see below |
//!
//! INT4: the inputs of a chunk are rounded to 16-bit integers, `x = xi * sx` with `sx = max |x| / 32767` (error
//! below 2^-16 of the chunk's largest input); each lane's `p = sum of (q - zero) * xi` over its 8 inputs is an exact
//! integer, converted to F32 exactly; the lane becomes `fma(p, scale * sx, lane)`, the product rounded. A chunk that holds a NaN or an infinity has `sx = NaN`.
//!
//! Keeps invariant K1 of ARCHITECTURE.md.

mod block;
mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
pub(crate) mod few;
mod floats;
mod int4;
mod integers;
mod order;
mod out;
mod pack;
#[cfg(feature = "cuda")]
pub(crate) mod tall;
#[cfg(test)]
mod tests;
mod tile;

pub(crate) use block::{Block, Scratch};
pub(crate) use cpu::{dequantize_row, linears_of};
pub(crate) use order::{Order, permute, restore};
pub(crate) use out::Out;
pub(crate) use pack::{Packed, SharedTokens, Tokens, TokensMut, pack};
pub(crate) use tile::{Bf16, Decode, E4m3, E5m2, F32, tile_of};
