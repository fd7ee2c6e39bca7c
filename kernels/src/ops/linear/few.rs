//! What `few.cuh` and `few_quantised.cu`, products of up to 128 tokens, want of a launch; `cuda/plane.rs` launches them.

use crate::cuda::format::TILE_ROWS;
use crate::cuda::{Format, Gpu, Launch};

/// Activation rows that the kernels are compiled for.
const COLUMNS: [usize; 4] = [32, 64, 96, 128];
/// Room of a block of `few.cuh`, barriers' share of it, and steps of 128 inputs that the plane may have.
const ROOM: usize = 226 * 1024;
const BARRIERS: usize = 1024;
const PLANE_STEPS: usize = 8;
/// Of `few_quantised.cu`: tiles of a block, threads, cuts of its inputs, steps of its ring.
pub(crate) const QUANTISED_TILES: usize = 4;
const QUANTISED_THREADS: u32 = 10 * 32;
const HALVES: usize = 2;
const QUANTISED_DEPTH: usize = 6;
/// More than half of what a multiprocessor has: where two blocks fit, some get two while the kernel before still runs, and others none.
const LEAST: usize = 118 * 1024;

/// Whether `few.cuh` has kernels of it.
pub(crate) fn has(format: Format) -> bool {
    matches!(
        format,
        Format::Fp8 | Format::Bf16 | Format::Int4G128 | Format::Int4G32
    )
}

/// Activation rows of the kernel for so many tokens, if there is one.
pub(crate) fn columns(tokens: usize) -> Option<usize> {
    COLUMNS.into_iter().find(|most| tokens <= *most)
}

/// Tiles of 16 weight rows of a block of `few.cuh`.
pub(crate) fn tiles(format: Format, columns: usize) -> usize {
    let most = if format == Format::Bf16 { 64 } else { 96 };
    if columns <= most { 12 } else { 8 }
}

/// Bytes in which the sums of `cuts` cuts of `tiles` tiles leave (`few_results.cuh`).
fn results_bytes(columns: usize, tiles: usize, cuts: usize) -> usize {
    cuts * columns * (tiles * TILE_ROWS + 4) * 4
}

/// A persistent grid of `few.cuh` for all tiles of the weight and parts: alignment, the plane's ring, those of the weights, results and barriers.
pub(crate) fn launch(gpu: &Gpu, format: Format, columns: usize, (all, parts): (usize, usize)) -> Launch {
    let (tiles, plane) = (tiles(format, columns), format.stage_inputs() * columns * 2);
    let depth = if tiles == 8 || format == Format::Bf16 {
        3
    } else {
        2
    };
    let rest = tiles * depth * format.span() * format.stage_bytes() + results_bytes(columns, tiles, 1);
    let planes = (ROOM - 1024 - BARRIERS - rest) / plane;
    let planes = planes.min(PLANE_STEPS * 128 / format.stage_inputs());
    Launch {
        grid: (gpu.blocks().min((all.div_ceil(tiles) * parts) as u32), 1),
        threads: (tiles as u32 + 1) * 32,
        shared: (1024 + planes * plane + rest + BARRIERS) as u32,
        overlap: true,
    }
}

/// A block of `few_quantised.cu` for each of its shares of work.
pub(crate) fn quantised_launch(columns: usize, (all, parts): (usize, usize)) -> Launch {
    let step = columns * (128 + 4) + QUANTISED_TILES * TILE_ROWS * 128 + 16;
    let shared = 1024 + QUANTISED_DEPTH * (step + 2 * 8) + results_bytes(columns, QUANTISED_TILES, HALVES);
    Launch {
        grid: ((all.div_ceil(QUANTISED_TILES) * parts) as u32, 1),
        threads: QUANTISED_THREADS,
        shared: shared.max(LEAST) as u32,
        overlap: true,
    }
}
