//! Launches of `few_dispatch.cu`, `few_combine.cu`, `many_dispatch.cu`, `many_combine.cu` and `many_return.cu`.

use super::layout::{CHUNK, CombineFew, CombineMany, DispatchFew, DispatchMany, ExchangeParams};
use crate::backend::Result;
use crate::cuda::{Gpu, Launch};
use crate::ops::rmsnorm::cuda::pairs;

const FEW_THREADS: u32 = 512;
/// One warp more in dispatch: the scout.
const DISPATCH_THREADS: u32 = FEW_THREADS + 32;
const MANY_THREADS: u32 = 256;
/// Blocks that may wait on one device, all of its ranks together: the others' kernels need the rest.
const WAITING_BLOCKS: usize = 64;
const FEW_BLOCKS: u32 = 128;
/// Blocks of the bulk kernels per multiprocessor.
const MANY_PER_MULTIPROCESSOR: u32 = 4;
/// Chunks whose own shares are summed before what is added to them has come, and the shared memory for them of one of as many
/// blocks. With more of them in the beginning results go out late.
const MOST_AHEAD: usize = 2;
const ADDING_SHARED: usize = 48 << 10;

fn name(exact: bool) -> &'static str {
    if exact { "exact" } else { "bf16" }
}

/// What decides the blocks of the few-token kernels: ranks on the device, and `few_part_bits`.
#[derive(Clone, Copy)]
pub(super) struct FewBlocks {
    pub(super) sharing: usize,
    pub(super) part_bits: i32,
}

/// How many blocks share the results of a row, as a power of two, when no rank has more than `largest` tokens, on a device of
/// its own.
pub(super) fn few_part_bits(ranks: usize, largest: usize) -> i32 {
    match largest * ranks {
        ..=16 => 2,
        _ => 0,
    }
}

/// Steps of `tokens` tokens here and no more than `most` on any rank, by the most that there are: one of each kind.
pub(super) fn few_cases(ranks: usize, tokens: usize, most: usize) -> Vec<usize> {
    let mut cases: Vec<usize> = (tokens..=most).collect();
    cases.dedup_by_key(|largest| few_part_bits(ranks, *largest));
    cases
}

/// Blocks of a kernel that waits, on a device of `sharing` ranks: one groups or settles, the others move rows, each several
/// if there are more.
fn few_blocks(sharing: usize, part_bits: i32) -> u32 {
    match (sharing, part_bits) {
        (1, 0) => 1 + FEW_BLOCKS,
        (1, _) => 1 + FEW_BLOCKS / 2,
        (ranks, _) => (WAITING_BLOCKS / ranks).max(2) as u32,
    }
}

/// Kernels that write down when their blocks do what have this in their names.
fn traced(exchange: &ExchangeParams) -> &'static str {
    if exchange.trace == 0 { "" } else { "_traced" }
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
    let blocks = (rows as u32).div_ceil(CHUNK as u32);
    launch(
        blocks.clamp(1, MANY_PER_MULTIPROCESSOR * gpu.blocks()),
        MANY_THREADS,
        0,
    )
}

pub(super) fn dispatch_few(gpu: &Gpu, exact: bool, blocks: FewBlocks, params: &DispatchFew) -> Result<()> {
    let exchange = &params.exchange;
    let slots = (exchange.ranks * exchange.few_tokens * exchange.k) as usize;
    let marks = (params.group.experts * params.group.words * 4) as usize + slots * 2;
    let kind = match params.normed {
        0 if params.tokens.count > 0 => "_norm",
        _ => traced(exchange),
    };
    gpu.launch(
        &format!("exchange_dispatch_{}{kind}", name(exact)),
        launch(
            few_blocks(blocks.sharing, blocks.part_bits),
            DISPATCH_THREADS,
            marks,
        ),
        params,
    )
}

pub(super) fn combine_few(gpu: &Gpu, exact: bool, blocks: FewBlocks, params: &CombineFew) -> Result<()> {
    let hidden = params.exchange.hidden;
    let (name, traced) = (name(exact), traced(&params.exchange));
    gpu.launch(
        &format!("exchange_combine_{name}_{}{traced}", pairs(hidden)),
        launch(
            few_blocks(blocks.sharing, blocks.part_bits),
            FEW_THREADS,
            hidden as usize * 8,
        ),
        params,
    )
}

pub(super) fn send_many(gpu: &Gpu, params: &DispatchMany) -> Result<()> {
    gpu.launch(
        &format!("exchange_send{}", traced(&params.exchange)),
        many_launch(gpu, params.tokens.count as usize),
        params,
    )
}

pub(super) fn arrive_many(gpu: &Gpu, params: &DispatchMany) -> Result<()> {
    gpu.launch(
        &format!("exchange_arrive{}", traced(&params.exchange)),
        launch(1, super::MAX_RANKS as u32, 0),
        params,
    )
}

pub(super) fn return_many(gpu: &Gpu, rows: usize, params: &CombineMany) -> Result<()> {
    gpu.launch("exchange_return", many_launch(gpu, rows), params)
}

pub(super) fn settle_many(gpu: &Gpu, params: &CombineMany) -> Result<()> {
    gpu.launch("exchange_settle", launch(1, super::MAX_RANKS as u32, 0), params)?;
    if params.tokens.count == 0 {
        return Ok(());
    }
    gpu.launch(
        "exchange_add",
        many_launch(gpu, params.tokens.count as usize),
        params,
    )
}

/// Both in one kernel, on a device that no other rank shares. With few rows more blocks would only wait.
pub(super) fn combine_many(gpu: &Gpu, params: &CombineMany) -> Result<()> {
    let tokens = params.tokens.count as usize;
    let each = if tokens > 256 { 2 } else { 1 } * gpu.blocks();
    let ahead = chunks_ahead(
        tokens.div_ceil(CHUNK).div_ceil(each as usize),
        params.exchange.hidden as usize,
    );
    let params = CombineMany {
        senders: each as i32,
        ahead: ahead as i32,
        ..*params
    };
    gpu.launch(
        &format!("exchange_combine_many{}", traced(&params.exchange)),
        launch(
            2 * each,
            MANY_THREADS,
            ahead * CHUNK * params.exchange.hidden as usize * 2,
        ),
        &params,
    )
}

/// Of the `chunks` that a block adds, how many it sums its own share of before it needs them.
fn chunks_ahead(chunks: usize, hidden: usize) -> usize {
    let room = ADDING_SHARED / (CHUNK * hidden * 2);
    chunks.min(MOST_AHEAD).min(room).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_shares_are_summed_ahead_as_far_as_there_is_room_and_work() {
        for (chunks, hidden, ahead) in [
            (0, 3072, 1),
            (1, 3072, 1),
            (8, 3072, 2),
            (8, 8192, 1),
            (8, 16384, 1),
        ] {
            assert_eq!(
                chunks_ahead(chunks, hidden),
                ahead,
                "{chunks} chunks of {hidden} values"
            );
        }
    }

    #[test]
    fn cases_are_all_kinds_once() {
        for (ranks, tokens, kinds) in [
            (2, 0, 2),
            (2, 8, 2),
            (2, 9, 1),
            (8, 2, 2),
            (8, 3, 1),
            (1, 1, 2),
            (40, 1, 1),
        ] {
            let cases = few_cases(ranks, tokens, 128.min(1024 / ranks));
            assert_eq!(cases.len(), kinds, "{ranks} ranks, {tokens} tokens: {cases:?}");
            assert_eq!(cases[0], tokens);
        }
    }
}
