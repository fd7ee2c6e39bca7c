//! Launches of `few.cu` and `many.cu`.

use super::layout::{CombineFew, CombineMany, DispatchFew, DispatchMany};
use crate::backend::Result;
use crate::cuda::{Gpu, Launch};
use crate::ops::rmsnorm::cuda::pairs;

const FEW_THREADS: u32 = 512;
/// One warp more in dispatch: the scout.
const DISPATCH_THREADS: u32 = FEW_THREADS + 32;
const MANY_THREADS: u32 = 256;
/// Blocks that may wait on one device, all of its ranks together: the others' kernels need the rest.
const WAITING_BLOCKS: usize = 64;
const FEW_BLOCKS: usize = 128;
/// Blocks of the bulk kernels per multiprocessor.
const MANY_PER_MULTIPROCESSOR: u32 = 4;

fn name(exact: bool) -> &'static str {
    if exact { "exact" } else { "bf16" }
}

/// Blocks of a kernel that waits, on a device of `sharing` ranks: one groups or settles, the others move rows.
/// `tokens`: of this rank; others may have more, and then blocks take several rows.
fn few_blocks(sharing: usize, ranks: i32, tokens: i32) -> u32 {
    match sharing {
        1 => 1 + ((tokens * ranks) as u32).clamp(32, FEW_BLOCKS as u32),
        ranks => (WAITING_BLOCKS / ranks).max(2) as u32,
    }
}

fn launch(blocks: u32, threads: u32, shared: usize) -> Launch {
    Launch {
        grid: (blocks, 1),
        threads,
        shared: shared as u32,
        overlap: true,
    }
}

/// A grid of warps for `rows` rows.
fn many_launch(gpu: &Gpu, rows: usize) -> Launch {
    let blocks = (rows as u32).div_ceil(MANY_THREADS / 32);
    launch(
        blocks.clamp(1, MANY_PER_MULTIPROCESSOR * gpu.blocks()),
        MANY_THREADS,
        0,
    )
}

pub(super) fn dispatch_few(gpu: &Gpu, exact: bool, sharing: usize, params: &DispatchFew) -> Result<()> {
    let exchange = &params.exchange;
    let slots = (exchange.ranks * exchange.few_tokens * exchange.k) as usize;
    let blocks = few_blocks(sharing, exchange.ranks, params.tokens.count);
    let marks = (params.group.experts * params.group.words * 4) as usize + slots * 2;
    gpu.launch(
        &format!("exchange_dispatch_{}", name(exact)),
        launch(blocks, DISPATCH_THREADS, marks),
        params,
    )
}

pub(super) fn combine_few(gpu: &Gpu, exact: bool, sharing: usize, params: &CombineFew) -> Result<()> {
    let hidden = params.exchange.hidden;
    let blocks = few_blocks(sharing, params.exchange.ranks, params.tokens.count);
    gpu.launch(
        &format!("exchange_combine_{}_{}", name(exact), pairs(hidden)),
        launch(blocks, FEW_THREADS, hidden as usize * 8),
        params,
    )
}

pub(super) fn send_many(gpu: &Gpu, params: &DispatchMany) -> Result<()> {
    gpu.launch(
        "exchange_send",
        many_launch(gpu, params.tokens.count as usize),
        params,
    )
}

pub(super) fn arrive_many(gpu: &Gpu, params: &DispatchMany) -> Result<()> {
    gpu.launch("exchange_arrive", launch(1, super::MAX_RANKS as u32, 0), params)
}

pub(super) fn return_many(gpu: &Gpu, rows: usize, params: &CombineMany) -> Result<()> {
    gpu.launch("exchange_return", many_launch(gpu, rows), params)
}

pub(super) fn settle_many(gpu: &Gpu, params: &CombineMany) -> Result<()> {
    if params.exchange.alone == 0 || params.tokens.count == 0 {
        gpu.launch("exchange_settle", launch(1, super::MAX_RANKS as u32, 0), params)?;
    }
    if params.tokens.count == 0 {
        return Ok(());
    }
    gpu.launch(
        "exchange_add",
        many_launch(gpu, params.tokens.count as usize),
        params,
    )
}
