//! Launches of the attention kernels.

use crate::backend::{KernelError, KvDtype, Result};
use crate::cuda::step::{Step, attention_blocks};
use crate::cuda::workspace::{Slot, Workspace};
use crate::cuda::{Gpu, KvCache, Launch, Memory, as_bytes};
use crate::ops::linear::cuda::SplitInput;

/// Query heads that share one reading of a key.
const HEADS_HELD: usize = 8;

/// A kernel for few tokens: its name, warps, ring of one warp, and whether two of its blocks share a multiprocessor.
struct DecodeKernel {
    name: &'static str,
    warps: usize,
    ring: usize,
    small: bool,
}

/// Warps whose results meet in shared memory.
const MERGED: usize = 4;

/// Mirrors `Pages` of `pages.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Pages {
    k: u64,
    v: u64,
    tables: u64,
    table_stride: i32,
    page_tokens: i32,
    kv_heads: i32,
}

/// Mirrors `AttentionParams` of `decode.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct AttentionParams {
    pub(crate) pages: Pages,
    pub(crate) items: u64,
    pub(crate) item_count: u64,
    pub(crate) q: u64,
    /// Not 0: `decode_inline.cu`, for which the step has been planned.
    pub(crate) qkv: u64,
    pub(crate) squares: u64,
    pub(crate) q_norm: u64,
    pub(crate) k_norm: u64,
    pub(crate) turns: u64,
    pub(crate) eps: f32,
    pub(crate) scale: f32,
    pub(crate) heads: i32,
    pub(crate) rotary: i32,
    pub(crate) partial: u64,
    pub(crate) partial_sums: u64,
    pub(crate) arrived: u64,
    pub(crate) plane: u64,
    pub(crate) out: u64,
    pub(crate) plane_blocks: i32,
    pub(crate) leave_splits: i32,
}

impl Pages {
    pub(crate) fn new(cache: &KvCache, step: &Step) -> Pages {
        let (tables, table_stride) = step.tables();
        Pages {
            k: cache.keys.address,
            v: cache.values.address,
            tables,
            table_stride,
            page_tokens: cache.page_tokens as i32,
            kv_heads: cache.kv_heads as i32,
        }
    }
}

pub(crate) fn kv_name(dtype: KvDtype) -> Result<&'static str> {
    match dtype {
        KvDtype::Bf16 => Ok("bf16"),
        KvDtype::Fp8E4m3 => Ok("e4m3"),
        KvDtype::Fp8E5m2 => Ok("e5m2"),
        KvDtype::F32 => Err(KernelError::Unsupported(
            "the CUDA backend keeps keys and values as bf16, e4m3 or e5m2".into(),
        )),
    }
}

/// Bytes of one value.
pub(crate) fn kv_bytes(dtype: KvDtype) -> usize {
    match dtype {
        KvDtype::F32 => 4,
        KvDtype::Bf16 => 2,
        KvDtype::Fp8E4m3 | KvDtype::Fp8E5m2 => 1,
    }
}

/// Blocks of up to eight query heads of one kv head.
pub(crate) fn head_blocks(heads: usize, kv_heads: usize) -> usize {
    kv_heads * (heads / kv_heads).div_ceil(HEADS_HELD)
}

/// log2(e) / sqrt(head_dim): scores go to base-2 exponentials.
pub(crate) fn scale(head_dim: usize) -> f32 {
    std::f32::consts::LOG2_E / (head_dim as f32).sqrt()
}

/// The parameters that only depend on the cache and the sizes; the rest is zero.
pub(crate) fn params(
    gpu: &Gpu,
    workspace: &mut Workspace,
    step: &Step,
    cache: &KvCache,
    heads: usize,
) -> Result<AttentionParams> {
    let blocks = head_blocks(heads, cache.kv_heads);
    let rows = step.max_items(gpu, blocks) * blocks * HEADS_HELD;
    let (items, item_count) = step.items();
    Ok(AttentionParams {
        pages: Pages::new(cache, step),
        items,
        item_count,
        scale: scale(cache.head_dim),
        heads: heads as i32,
        partial: workspace.get(gpu, Slot::Partial, rows * cache.head_dim * 4)?,
        partial_sums: workspace.get(gpu, Slot::PartialSums, rows * 8)?,
        arrived: workspace.get(gpu, Slot::Arrived, crate::cuda::step::FEW_TOKENS * blocks * 4)?,
        ..AttentionParams::default()
    })
}

/// How the next linear finds what `decode` leaves with `leave_splits`.
pub(crate) fn split_input(params: &AttentionParams, step: &Step, cache: &KvCache) -> SplitInput {
    let per_kv = params.heads as usize / cache.kv_heads;
    SplitInput {
        partial: params.partial,
        sums: params.partial_sums,
        splits_of: step.splits_of(),
        per_kv: per_kv as i32,
        blocks_per_kv: per_kv.div_ceil(HEADS_HELD) as i32,
        head_blocks: head_blocks(params.heads as usize, cache.kv_heads) as i32,
        head_dim: cache.head_dim as i32,
    }
}

fn decode_kernel(cache: &KvCache, inline: bool) -> DecodeKernel {
    let small = inline || cache.dtype != KvDtype::Bf16;
    DecodeKernel {
        name: if inline {
            "attention_decode_inline"
        } else {
            "attention_decode"
        },
        warps: if small { 4 } else { 8 },
        ring: if small { 16384 } else { 24576 },
        small,
    }
}

/// Whether a step's plan is for a kernel of small blocks; `inline`: one that makes its queries itself.
pub(crate) fn small_blocks(cache: &KvCache, inline: bool) -> bool {
    decode_kernel(cache, inline).small
}

/// Few tokens, split over their contexts; the step has been planned, and at least one kernel is queued behind the plan:
/// this one reads the plan, and keys and values of the steps before, while the kernel before it runs.
pub(crate) fn decode(gpu: &Gpu, cache: &KvCache, params: &AttentionParams) -> Result<()> {
    launch_decode(gpu, cache, params, true)
}

/// The same right behind the plan.
pub(crate) fn decode_behind_plan(gpu: &Gpu, cache: &KvCache, params: &AttentionParams) -> Result<()> {
    launch_decode(gpu, cache, params, false)
}

fn launch_decode(gpu: &Gpu, cache: &KvCache, params: &AttentionParams, overlap: bool) -> Result<()> {
    let dim = cache.head_dim;
    let DecodeKernel {
        name,
        warps,
        ring,
        small,
    } = decode_kernel(cache, params.qkv != 0);
    let depth = ring / (2 * 16 * dim * kv_bytes(cache.dtype));
    // The rings, the warps' results, the query, the new key and value, the rotation, the listed work, and small things.
    let shared = warps * ring
        + MERGED * HEADS_HELD * (dim + 4) * 4
        + (HEADS_HELD + 2) * dim * 4
        + 64 * 8
        + 32 * 48
        + warps * depth * 8
        + warps * HEADS_HELD * 8
        + 256;
    let launch = Launch {
        grid: (attention_blocks(gpu, small), 1),
        threads: warps as u32 * 32,
        shared: shared as u32,
        overlap,
    };
    gpu.launch(&format!("{name}_{}_{dim}", kv_name(cache.dtype)?), launch, params)
}

/// Rows (token, head) of one block.
const PREFILL_ROWS: usize = 128;
const PREFILL_THREADS: u32 = 288;
const PREFILL_RING: usize = 98304;
/// The kernel for 128 dims: alignment, two blocks of queries, five tiles of 128 keys or values of two bytes (or four, and two as FP8),
/// small things.
const WIDE_SHARED: u32 = 1024 + 2 * 32_768 + 5 * 32_768 + 256;
/// Words of a `PrefillBlock`.
const BLOCK_WORDS: usize = 8;

/// Mirrors `PrefillParams` of `prefill.cu`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PrefillParams {
    pages: Pages,
    blocks: u64,
    q: u64,
    q16: u64,
    out: u64,
    plane: u64,
    plane_blocks: i32,
    heads: i32,
    block_count: i32,
    scale: f32,
}

/// Where the queries are and where the result goes; tokens are counted from the first one of the piece.
#[derive(Clone, Copy, Default)]
pub(crate) struct PrefillRows {
    pub(crate) q: u64,
    /// Or scaled BF16 (FP8 caches: F16), for `wide` caches only; 0: none.
    pub(crate) q16: u64,
    pub(crate) out: u64,
    pub(crate) plane: u64,
    pub(crate) plane_blocks: usize,
}

/// What the device needs to know of one piece of a step: its units of work.
#[derive(Clone, Copy)]
pub(crate) struct PrefillPlan {
    blocks: u64,
    block_count: usize,
    /// Rows of a unit at most.
    unit: usize,
}

/// The plans of all pieces of a step, made and sent once.
pub(crate) struct PrefillPlans {
    plans: Vec<Option<PrefillPlan>>,
}

impl PrefillPlans {
    /// Bytes that the plans of any step within the limits need.
    pub(crate) fn bytes(tokens: usize, runs: usize, pieces: usize, per_kv: usize) -> usize {
        let blocks = (tokens * per_kv).div_ceil(PREFILL_ROWS) + runs + pieces;
        blocks * BLOCK_WORDS * 4
    }

    /// Plans the pieces [first, end) of the step without its first `skip` runs, for the kernel that serves `cache`.
    pub(crate) fn new(
        gpu: &Gpu,
        area: &Memory,
        step: &Step,
        pieces: impl Iterator<Item = (usize, usize)>,
        skip: usize,
        (cache, per_kv): (&KvCache, usize),
    ) -> Result<PrefillPlans> {
        let unit = PREFILL_ROWS * cluster(cache);
        let (mut words, mut plans) = (Vec::new(), Vec::new());
        for (first, end) in pieces {
            let mut blocks: Vec<(usize, [i32; BLOCK_WORDS])> = Vec::new();
            for (index, &(run_first, len, position)) in step.runs.iter().enumerate().skip(skip) {
                let (from, to) = (
                    (run_first as usize).max(first),
                    (run_first as usize + len as usize).min(end),
                );
                if from >= to {
                    continue;
                }
                let (position, rows) = (
                    position as usize + from - run_first as usize,
                    (to - from) * per_kv,
                );
                for row in (0..rows).step_by(unit) {
                    let last = (row + unit).min(rows) - 1;
                    let words = [index, row, last, from - first, position, 0, 0, 0];
                    blocks.push((position + last / per_kv, words.map(|word| word as i32)));
                }
            }
            // The longest contexts first, so that none is left for the end.
            blocks.sort_unstable_by_key(|block| std::cmp::Reverse(block.0));
            plans.push((!blocks.is_empty()).then(|| PrefillPlan {
                blocks: area.address + words.len() as u64 * 4,
                block_count: blocks.len(),
                unit,
            }));
            words.extend(blocks.iter().flat_map(|block| block.1));
        }
        gpu.write(area, 0, as_bytes(&words))?;
        Ok(PrefillPlans { plans })
    }

    /// `None`: the piece holds nothing for the prefill kernel.
    pub(crate) fn piece(&self, index: usize) -> Option<PrefillPlan> {
        self.plans.get(index).copied().flatten()
    }
}

/// Whether `prefill` runs on warpgroup products.
pub(crate) fn wide(cache: &KvCache) -> bool {
    cache.head_dim == 128
}

/// Blocks that take one unit of work together (`wide_parts.cuh`).
fn cluster(cache: &KvCache) -> usize {
    match wide(cache) && cache.dtype == KvDtype::Bf16 {
        true => 2,
        false => 1,
    }
}

/// Causal attention of one piece of the step.
pub(crate) fn prefill(
    gpu: &Gpu,
    step: &Step,
    cache: &KvCache,
    heads: usize,
    plan: PrefillPlan,
    rows: PrefillRows,
) -> Result<()> {
    if plan.unit != PREFILL_ROWS * cluster(cache) {
        return Err(KernelError::Unsupported(
            "the layers' caches differ in type".into(),
        ));
    }
    let params = PrefillParams {
        pages: Pages::new(cache, step),
        blocks: plan.blocks,
        q: match rows.q16 {
            0 => rows.q,
            _ => 0,
        },
        q16: rows.q16,
        out: rows.out,
        plane: rows.plane,
        plane_blocks: rows.plane_blocks as i32,
        heads: heads as i32,
        block_count: plan.block_count as i32,
        scale: scale(cache.head_dim),
    };
    let dim = cache.head_dim;
    let grid = (plan.block_count as u32, cache.kv_heads as u32);
    if wide(cache) {
        let (cluster, units) = (cluster(cache) as u32, (plan.block_count * cache.kv_heads) as u32);
        let launch = Launch {
            grid: ((gpu.blocks() / cluster).min(units) * cluster, 1),
            threads: match cache.dtype {
                KvDtype::Bf16 => 384,
                _ => 512,
            },
            shared: WIDE_SHARED,
            overlap: true,
        };
        let name = format!("attention_prefill_wide_{}", kv_name(cache.dtype)?);
        return gpu.launch(&name, launch, &params);
    }
    let depth = PREFILL_RING / (2 * 64 * dim * kv_bytes(cache.dtype));
    let launch = Launch {
        grid,
        threads: PREFILL_THREADS,
        shared: (PREFILL_RING + 2 * depth * 8) as u32,
        overlap: true,
    };
    gpu.launch(
        &format!("attention_prefill_{}_{dim}", kv_name(cache.dtype)?),
        launch,
        &params,
    )
}
