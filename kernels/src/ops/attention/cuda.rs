//! Launches of the attention kernels.

use crate::backend::{KernelError, KvDtype, Result};
use crate::cuda::step::{Step, attention_blocks};
use crate::cuda::workspace::{Slot, Workspace};
use crate::cuda::{Gpu, KvCache, Launch};

/// Query heads that share one reading of a key.
const HEADS_HELD: usize = 8;
const WARPS: usize = 4;
/// Ring of one warp.
const RING_BYTES: usize = 24576;

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
    pub(crate) positions: u64,
    pub(crate) token_run: u64,
    pub(crate) items: u64,
    pub(crate) item_count: u64,
    pub(crate) q: u64,
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
    pub(crate) image: u64,
    pub(crate) out: u64,
    pub(crate) image_padded: i32,
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
        KvDtype::F32 => Err(KernelError::Unsupported("the CUDA backend keeps keys and values as bf16, e4m3 or e5m2".into())),
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

/// The parameters that only depend on the cache and the step; the rest is zero.
pub(crate) fn params(gpu: &Gpu, workspace: &mut Workspace, step: &Step, cache: &KvCache, heads: usize) -> Result<AttentionParams> {
    let blocks = head_blocks(heads, cache.kv_heads);
    let rows = Step::max_items(gpu, blocks) * blocks * HEADS_HELD;
    let (items, item_count) = step.items();
    Ok(AttentionParams {
        pages: Pages::new(cache, step),
        positions: step.positions(),
        token_run: step.token_run(),
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

/// Few tokens, split over their contexts; the step has been planned.
pub(crate) fn decode(gpu: &Gpu, cache: &KvCache, params: &AttentionParams) -> Result<()> {
    let dim = cache.head_dim;
    let depth = RING_BYTES / (2 * 16 * dim * kv_bytes(cache.dtype));
    let shared = WARPS * RING_BYTES + (HEADS_HELD + 2) * dim * 4 + 2 * WARPS * HEADS_HELD * 4 + WARPS * depth * 8 + 128;
    let launch = Launch { grid: (attention_blocks(gpu), 1), threads: WARPS as u32 * 32, shared: shared as u32, overlap: true };
    gpu.launch(&format!("attention_decode_{}_{dim}", kv_name(cache.dtype)?), launch, params)
}
