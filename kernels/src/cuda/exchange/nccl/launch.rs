//! Launches of `few.cu` and `many.cu` of this folder.

use super::messages::{ArriveFew, ArriveMany, PackFew, PackMany, ReturnFew, ReturnMany, SumFew, SumMany};
use crate::backend::Result;
use crate::cuda::{Gpu, Launch};
use crate::ops::rmsnorm::cuda::pairs;

const PACK_THREADS: u32 = 256;
const FEW_THREADS: u32 = 512;
const MANY_THREADS: u32 = 256;
/// Most blocks of few rows; more rows are taken in turns.
const FEW_BLOCKS: usize = 264;
/// Blocks of the bulk kernels per multiprocessor.
const MANY_PER_MULTIPROCESSOR: u32 = 4;

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

pub(super) fn arrive_few(gpu: &Gpu, exact: bool, params: &ArriveFew) -> Result<()> {
    let exchange = &params.exchange;
    let slots = (exchange.ranks * exchange.few_tokens * exchange.k) as usize;
    let marks = (params.group.experts * params.group.words * 4) as usize + slots * 2;
    let blocks = 1 + row_blocks(exchange.ranks, params.messages.carried);
    gpu.launch(
        &format!("nccl_arrive_{}", name(exact)),
        launch(blocks, FEW_THREADS, marks),
        params,
    )
}

pub(super) fn return_few(gpu: &Gpu, exact: bool, params: &ReturnFew) -> Result<()> {
    let blocks = row_blocks(params.exchange.ranks, params.messages.carried);
    gpu.launch(
        &format!("nccl_return_{}", name(exact)),
        launch(blocks, FEW_THREADS, 0),
        params,
    )
}

pub(super) fn sum_few(gpu: &Gpu, exact: bool, params: &SumFew) -> Result<()> {
    let hidden = params.exchange.hidden;
    gpu.launch(
        &format!("nccl_sum_{}_{}", name(exact), pairs(hidden)),
        launch(
            params.tokens.count.max(1) as u32,
            FEW_THREADS,
            hidden as usize * 4,
        ),
        params,
    )
}

pub(super) fn pack_many(gpu: &Gpu, params: &PackMany) -> Result<()> {
    gpu.launch("nccl_pack_many", warps(gpu, params.tokens.count as usize), params)
}

/// `rows`: of all ranks' messages.
pub(super) fn arrive_many(gpu: &Gpu, rows: usize, params: &ArriveMany) -> Result<()> {
    gpu.launch("nccl_arrive_many", warps(gpu, rows), params)
}

pub(super) fn return_many(gpu: &Gpu, rows: usize, params: &ReturnMany) -> Result<()> {
    gpu.launch("nccl_return_many", warps(gpu, rows), params)
}

pub(super) fn sum_many(gpu: &Gpu, params: &SumMany) -> Result<()> {
    gpu.launch("nccl_sum_many", warps(gpu, params.tokens.count as usize), params)
}
