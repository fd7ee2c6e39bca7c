//! Launch of `tall.cu`: up to 16 tokens of a decode step times one weight, or up to three side by side, without parts.

use crate::backend::{KernelError, Result};
use crate::cuda::format::TILE_ROWS;
use crate::cuda::plane::{PLANE_BLOCK, PLANE_ROWS};
use crate::cuda::weights::{Linear, WeightParam};
use crate::cuda::{Format, Gpu, Launch};

pub(crate) const TALL_TOKENS: usize = 16;
/// Rows of a block, and inputs of a step of each quarter.
const ROWS: usize = 64;
const QUARTERS: usize = 4;
const STEP: usize = 128;
const THREADS: u32 = 544;
const MOST_DEPTH: usize = 6;
/// What a ring may have, so that a block of attention fits beside this one.
const RING_ROOM: usize = 70 * 1024;
/// Blocks of the plane, and shared memory for it.
pub(crate) const TALL_BLOCKS: usize = TALL_TOKENS / PLANE_ROWS;
const PLANES: usize = 2 * QUARTERS * 2 * TALL_BLOCKS * PLANE_BLOCK;

/// Mirrors `TallParams`.
#[repr(C)]
struct TallParams {
    segments: [WeightParam; 3],
    plane: u64,
    y: u64,
    residual: u64,
    squares: u64,
    tokens: i32,
    width: i32,
    steps: i32,
    depth: i32,
}

/// `y = plane * weights + residual`, F32. Zero addresses: absent.
pub(crate) struct TallCall<'a> {
    pub(crate) weights: &'a [&'a Linear],
    /// Of [`TALL_BLOCKS`] blocks.
    pub(crate) plane: u64,
    pub(crate) tokens: usize,
    pub(crate) y: u64,
    /// May be `y`.
    pub(crate) residual: u64,
    /// `[tokens, width / 32]`: the sums of squares of 32 values of `y` each.
    pub(crate) squares: u64,
}

/// Whether [`linear_tall`] takes these weights.
pub(crate) fn serves(weights: &[&Linear]) -> bool {
    let Some(first) = weights.first().filter(|_| weights.len() <= 3) else {
        return false;
    };
    weights.iter().all(|weight| {
        matches!(weight.format, Format::Fp8 | Format::Int4G128)
            && weight.format == first.format
            && weight.inputs == first.inputs
            && weight.rows.is_multiple_of(ROWS)
            && weight.padded().is_multiple_of(QUARTERS * STEP)
    })
}

pub(crate) fn linear_tall(gpu: &Gpu, call: &TallCall<'_>) -> Result<()> {
    if !serves(call.weights) || call.tokens > TALL_TOKENS {
        return Err(KernelError::Unsupported(format!(
            "linear_tall: {} tokens, {} weights; it takes {TALL_TOKENS} at most, and one to three of the same format, of multiples of {ROWS} rows and of {} inputs",
            call.tokens,
            call.weights.len(),
            QUARTERS * STEP
        )));
    }
    let (first, mut segments) = (call.weights[0], [WeightParam::default(); 3]);
    for (segment, weight) in segments.iter_mut().zip(call.weights) {
        *segment = weight.param();
    }
    let width: usize = call.weights.iter().map(|weight| weight.rows).sum();
    let step = QUARTERS * ROWS / TILE_ROWS * first.format.stage_bytes();
    let depth = (RING_ROOM / step).clamp(1, MOST_DEPTH);
    let sets = (width / ROWS) as u32;
    let pair = 2 * sets <= gpu.blocks() && first.padded().is_multiple_of(2 * QUARTERS * STEP);
    let params = TallParams {
        segments,
        plane: call.plane,
        y: call.y,
        residual: call.residual,
        squares: call.squares,
        tokens: call.tokens as i32,
        width: width as i32,
        steps: (first.padded() / STEP) as i32,
        depth: depth as i32,
    };
    let launch = Launch {
        grid: (if pair { 2 * sets } else { sets }, 1),
        threads: THREADS,
        shared: (1024 + PLANES + depth * step) as u32,
        overlap: true,
    };
    let name = if pair { "linear_tall_pair" } else { "linear_tall" };
    gpu.launch(&format!("{name}_{}", first.format.name()), launch, &params)
}
