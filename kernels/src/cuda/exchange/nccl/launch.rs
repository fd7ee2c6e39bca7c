//! Launches of `pack.cu`, `few.cu` and `many.cu` of this folder.

use super::messages::{ArriveFew, ArriveMany, ChooseFew, PackFew, PackMany, ResultsMany, ReturnFew, SumFew};
use crate::backend::Result;
use crate::cuda::{Gpu, Launch};
use crate::ops::rmsnorm::cuda::pairs;

const PACK_THREADS: u32 = 256;
const FEW_THREADS: u32 = 512;
const RETURN_THREADS: u32 = 384;
const MANY_THREADS: u32 = 256;
const MOST_THREADS: u32 = 1024;
/// Most blocks of few rows; more rows are taken in turns.
const FEW_BLOCKS: usize = 264;
/// Blocks of the bulk kernels per multiprocessor.
const MANY_PER_MULTIPROCESSOR: u32 = 4;
/// The same of the kernel that sums slots and ranks: its blocks need more registers.
const SUMS_PER_MULTIPROCESSOR: u32 = 3;
/// Turns of a warp, so that all end at about the same time.
const ROUNDS: usize = 4;

fn launch(blocks: u32, threads: u32, shared: usize) -> Launch {
    Launch {
        grid: (blocks, 1),
        threads,
        shared: shared as u32,
        overlap: true,
    }
}

fn name(exact: bool) -> &'static str {
    if exact { "exact" } else { "bf16" }
}

/// A block a row, of all ranks.
fn row_blocks(ranks: i32, carried: i32) -> u32 {
    ((ranks * carried) as usize).clamp(1, FEW_BLOCKS) as u32
}

/// A grid of warps for `rows` rows.
fn warps(gpu: &Gpu, rows: usize) -> Launch {
    let blocks = (rows as u32).div_ceil(MANY_THREADS / 32);
    launch(
        blocks.clamp(1, MANY_PER_MULTIPROCESSOR * gpu.blocks()),
        MANY_THREADS,
        0,
    )
}

pub(super) fn pack_few(gpu: &Gpu, exact: bool, params: &PackFew) -> Result<()> {
    let blocks = params.tokens.count.max(1) as u32;
    gpu.launch(
        &format!("nccl_pack_{}", name(exact)),
        launch(blocks, PACK_THREADS, 0),
        params,
    )
}

pub(super) fn choose_few(gpu: &Gpu, exact: bool, params: &ChooseFew) -> Result<()> {
    gpu.launch(
        &format!("nccl_choose_{}", name(exact)),
        launch(params.route.tokens.max(1) as u32, FEW_THREADS + 32, 0),
        params,
    )
}

pub(super) fn arrive_few(gpu: &Gpu, exact: bool, params: &ArriveFew) -> Result<()> {
    let exchange = &params.exchange;
    let slots_of_message = (params.messages.carried * exchange.k) as usize;
    // The slots' experts and places, by fours; the marks and what they count.
    let slots = exchange.ranks as usize * slots_of_message.next_multiple_of(4);
    let marks = (params.group.experts * params.group.words) as usize;
    let shared = (slots + marks) * (2 + 4);
    let blocks = 1 + row_blocks(exchange.ranks, params.messages.carried);
    gpu.launch(
        &format!("nccl_arrive_{}", name(exact)),
        launch(blocks, FEW_THREADS, shared),
        params,
    )
}

pub(super) fn return_few(gpu: &Gpu, exact: bool, params: &ReturnFew) -> Result<()> {
    let blocks = row_blocks(params.exchange.ranks, params.messages.carried);
    gpu.launch(
        &format!("nccl_return_{}", name(exact)),
        launch(blocks, RETURN_THREADS, 0),
        params,
    )
}

pub(super) fn sum_few(gpu: &Gpu, exact: bool, params: &SumFew) -> Result<()> {
    let hidden = params.exchange.hidden;
    gpu.launch(
        &format!("nccl_sum_{}_{}", name(exact), pairs(hidden)),
        launch(params.tokens.count.max(1) as u32, FEW_THREADS, 0),
        params,
    )
}

/// Units of 16 bytes of a row that a warp moves at once.
const PACK_AHEAD: usize = 4;

/// How many warps share a row of `units` units, so that `rows` rows occupy the device evenly.
fn parts(gpu: &Gpu, rows: usize, units: usize) -> usize {
    let warps = (MANY_PER_MULTIPROCESSOR * gpu.blocks() * MANY_THREADS / 32) as usize;
    (ROUNDS * warps / rows.max(1)).clamp(1, units.div_ceil(32).max(1))
}

pub(super) fn pack_many(gpu: &Gpu, params: &PackMany) -> Result<()> {
    let rows = params.tokens.count as usize;
    let even = parts(gpu, rows, (params.padded as usize / 8).div_ceil(PACK_AHEAD));
    let parts = match (params.plane, params.messages.straight) {
        // Only experts and weights are to be written.
        (0, 0) => 1,
        _ => even,
    };
    let params = PackMany {
        parts: parts as i32,
        ..*params
    };
    gpu.launch("nccl_pack_many", warps(gpu, rows * parts), &params)
}

/// `rows`: of all ranks' messages.
pub(super) fn arrive_many(gpu: &Gpu, rows: usize, params: &ArriveMany) -> Result<()> {
    gpu.launch("nccl_arrive_many", warps(gpu, rows), params)
}

/// `rows`: for which there are results; `beside`: so many multiprocessors are left to what runs beside it.
pub(super) fn return_many(gpu: &Gpu, rows: usize, beside: Option<u32>, params: &ResultsMany) -> Result<()> {
    let parts = parts(gpu, rows, params.exchange.hidden as usize / 8);
    let launch = match beside {
        None => warps(gpu, rows * parts),
        // A block a multiprocessor.
        Some(left) => launch(gpu.blocks().saturating_sub(left).max(1), MOST_THREADS, 0),
    };
    let params = ResultsMany {
        parts: parts as i32,
        ..*params
    };
    gpu.launch("nccl_return_many", launch, &params)
}

/// `whole`: this rank's own results lie where the others' do.
pub(super) fn sum_many(gpu: &Gpu, whole: bool, params: &ResultsMany) -> Result<()> {
    let name = if whole { "nccl_add_many" } else { "nccl_sum_many" };
    let rows = params.tokens.count as usize;
    let parts = parts(gpu, rows, params.exchange.hidden as usize / 8);
    let params = ResultsMany {
        parts: parts as i32,
        ..*params
    };
    let mut launch = warps(gpu, rows * parts);
    if !whole {
        launch.grid.0 = launch.grid.0.min(SUMS_PER_MULTIPROCESSOR * gpu.blocks());
    }
    gpu.launch(name, launch, &params)
}
