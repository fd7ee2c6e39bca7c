//! Launch of `linear.cu`: few tokens times one weight, or times up to three that lie side by side in the result.

use crate::backend::{KernelError, Result};
use crate::cuda::format::partial_bytes;
use crate::cuda::weights::{Linear, WeightParam};
use crate::cuda::{Gpu, Launch, shape};
use crate::ops::rmsnorm::cuda::NormInput;

const THREADS: u32 = 512;
const SEGMENTS: usize = 3;
/// Slots of a warp's ring that `linear.cu` has barriers for.
const MOST_DEPTH: usize = 4;
/// What a block may have of a multiprocessor's shared memory so that one of attention's still fits beside it: the deeper the rings,
/// the more of the weights is there before the inputs are.
const ROOM_BESIDE_NEXT: usize = 140 * 1024;
/// Tokens whose norm a block computes itself, and how wide they may be.
pub(crate) const INLINE_TOKENS: usize = 4;
pub(crate) const INLINE_WIDTH: usize = 3072;

/// Where the input comes from.
#[derive(Clone, Copy)]
pub(crate) enum Input {
    /// Address of the tokens' F32 rows.
    Rows(u64),
    /// What attention left of at most [`INLINE_TOKENS`] decode tokens.
    Splits(SplitInput),
    /// The norm of a residual stream of at most [`INLINE_TOKENS`] tokens.
    Norm(NormInput),
    /// The norm of rows `x0` of more than [`INLINE_TOKENS`] tokens whose sums of squares of 32 values each lie at the address; it also goes to
    /// `sum_out`.
    Squared(NormInput, u64),
}

/// Mirrors `SplitInput`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct SplitInput {
    pub(crate) partial: u64,
    pub(crate) sums: u64,
    pub(crate) splits_of: u64,
    pub(crate) per_kv: i32,
    pub(crate) blocks_per_kv: i32,
    pub(crate) head_blocks: i32,
    pub(crate) head_dim: i32,
}

/// `y[part] = x w`, plus `residual` in part 0. Zero addresses: absent.
pub(crate) struct LinearCall<'a> {
    pub(crate) weights: &'a [&'a Linear],
    pub(crate) input: Input,
    pub(crate) tokens: usize,
    /// Into how many cuts of the inputs: `y` holds so many results, to be added.
    pub(crate) parts: usize,
    pub(crate) y: u64,
    pub(crate) residual: u64,
    pub(crate) squares: u64,
}

/// Mirrors `LinearParams`.
#[repr(C)]
struct LinearParams {
    segments: [WeightParam; SEGMENTS],
    input: NormInput,
    splits: SplitInput,
    x: u64,
    y: u64,
    residual: u64,
    squares: u64,
    squared: u64,
    tokens: i32,
    inputs: i32,
    width: i32,
    tiles: i32,
    tiles_log2: i32,
    parts: i32,
    depth: i32,
}

/// Rows of one unit when sums of squares are asked for: a warp's worth.
pub(crate) const SQUARES_ROWS: usize = 32;

pub(crate) fn linear(gpu: &Gpu, call: &LinearCall<'_>) -> Result<()> {
    let first = call.weights.first().filter(|_| call.weights.len() <= SEGMENTS);
    let first = first.ok_or_else(|| shape("linear", "weights", call.weights.len(), "1 to 3"))?;
    for (i, weight) in call.weights.iter().enumerate() {
        if weight.format != first.format || weight.inputs != first.inputs {
            return Err(KernelError::Unsupported(
                "weights of one projection differ in format or inputs".into(),
            ));
        }
        if i + 1 < call.weights.len() && weight.rows % 16 != 0 {
            return Err(shape("linear", "rows of a part", weight.rows, "a multiple of 16"));
        }
    }
    let format = first.format;
    let tiles: usize = call.weights.iter().map(|weight| weight.tiles()).sum();
    let width: usize = call.weights.iter().map(|weight| weight.rows).sum();
    let slice = (first.padded() / 128).div_ceil(call.parts) * 128;
    // Tokens of one pass, as the kernels are compiled for.
    let rest = |held: usize| {
        let images = if held == 1 { 1 } else { held.max(4) };
        images * format.image_bytes(slice) + partial_bytes(held.div_ceil(4))
    };
    let shared = |held: usize| format.ring_bytes() + rest(held);
    let limit = gpu.device.shared_bytes as usize - 1024;
    let held = match call.tokens.next_power_of_two() {
        few @ (1 | 2 | 4) => few,
        _ if shared(8) > limit => 4,
        _ => 8,
    };
    let slot = format.ring_bytes() / format.depth();
    let room = ROOM_BESIDE_NEXT.saturating_sub(rest(held));
    let depth = (room / slot).clamp(format.depth(), MOST_DEPTH);
    let stages = format.stages(slice);
    let blocks = gpu.blocks() as usize / call.parts * call.parts;
    let per_part = blocks / call.parts;
    let tiles_per_unit = match call.squares {
        0 => tiles_per_unit(tiles, stages, per_part),
        _ => SQUARES_ROWS / 16,
    };
    let units = tiles.div_ceil(tiles_per_unit);
    let mut segments = [WeightParam::default(); SEGMENTS];
    for (segment, weight) in segments.iter_mut().zip(call.weights) {
        *segment = weight.param();
    }
    let (mut input, mut splits, mut x, mut squared) = (NormInput::default(), SplitInput::default(), 0, 0);
    match call.input {
        Input::Rows(address) => x = address,
        Input::Norm(norm) => input = norm,
        Input::Squared(norm, sums) if held == 8 && first.inputs.is_multiple_of(32) => {
            (input, squared) = (norm, sums)
        }
        Input::Squared(..) => {
            let found = format!("{} tokens, {} inputs", call.tokens, first.inputs);
            return Err(shape(
                "linear",
                "norm",
                found,
                "five tokens or more of a multiple of 32 values",
            ));
        }
        Input::Splits(left) => splits = left,
    }
    if first.inputs % 4 != 0 {
        return Err(shape("linear", "inputs", first.inputs, "a multiple of 4"));
    }
    let params = LinearParams {
        segments,
        input,
        splits,
        x,
        y: call.y,
        residual: call.residual,
        squares: call.squares,
        squared,
        tokens: call.tokens as i32,
        inputs: first.inputs as i32,
        width: width as i32,
        tiles: tiles as i32,
        tiles_log2: tiles_per_unit.ilog2() as i32,
        parts: call.parts as i32,
        depth: depth as i32,
    };
    let launch = Launch {
        grid: (
            (units.min(per_part) * call.parts) as u32,
            call.tokens.div_ceil(held) as u32,
        ),
        threads: THREADS,
        shared: (depth * slot + rest(held)) as u32,
        overlap: true,
    };
    gpu.launch(&format!("linear_{}_{held}", format.name()), launch, &params)
}

/// How many tiles a block takes at a time, so that the busiest block has the least and warps share evenly.
fn tiles_per_unit(tiles: usize, stages: usize, blocks: usize) -> usize {
    let cost = |r: &usize| {
        let units = tiles.div_ceil(*r);
        let splits = 16 / r;
        (
            units.div_ceil(blocks) * r,
            stages.next_multiple_of(splits) - stages,
            units,
        )
    };
    [1, 2, 4].into_iter().min_by_key(cost).unwrap_or(1)
}
