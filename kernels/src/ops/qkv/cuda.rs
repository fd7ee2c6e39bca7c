//! Launches of `rope_kv.cu` and `rope_few.cu`.

use conclave_plan::model::QkNorm;

use crate::backend::Result;
use crate::cuda::{Gpu, KvCache, Launch};
use crate::ops::attention::cuda::{Pages, kv_name};

/// Mirrors `RopeParams`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct RopeParams {
    pub(crate) qkv: u64,
    pub(crate) parts: i32,
    pub(crate) tokens: i32,
    pub(crate) heads: i32,
    pub(crate) rotary: i32,
    pub(crate) norm: i32,
    pub(crate) eps: f32,
    pub(crate) q_norm: u64,
    pub(crate) k_norm: u64,
    pub(crate) turns: u64,
    pub(crate) positions: u64,
    pub(crate) token_run: u64,
    pub(crate) pages: Pages,
    pub(crate) q: u64,
    /// For `attention_prefill_wide_*`: of the tokens from `first16` on, scaled BF16 (FP8 keys: F16).
    pub(crate) q16: u64,
    pub(crate) first16: i32,
    pub(crate) scale: f32,
    /// `qkv` is BF16; for `rope_kv` one part.
    pub(crate) bf16: i32,
}

/// The number the kernel knows a q/k norm by.
pub(crate) fn norm_kind(norm: QkNorm) -> i32 {
    match norm {
        QkNorm::None => 0,
        QkNorm::PerHead => 1,
        QkNorm::WholeProjection => 2,
    }
}

/// Blocks of a token in `rope_few.cu`.
const SPREAD: usize = 8;

/// `rope_kv` for a decode step: many blocks a token; queries in F32 only. A sum's order is another one.
pub(crate) fn rope_few(gpu: &Gpu, cache: &KvCache, params: &RopeParams) -> Result<()> {
    if params.norm == norm_kind(QkNorm::PerHead) {
        return rope_kv(gpu, cache, params);
    }
    let heads = params.heads as usize + 2 * cache.kv_heads;
    let launch = Launch {
        grid: ((params.tokens as usize * SPREAD) as u32, 1),
        threads: 256,
        shared: (heads.div_ceil(SPREAD) * cache.head_dim * 4) as u32,
        overlap: true,
    };
    gpu.launch(
        &format!("rope_few_{}_{}", kv_name(cache.dtype)?, cache.head_dim),
        launch,
        params,
    )
}

pub(crate) fn rope_kv(gpu: &Gpu, cache: &KvCache, params: &RopeParams) -> Result<()> {
    let width = (params.heads as usize + 2 * cache.kv_heads) * cache.head_dim;
    let launch = Launch {
        grid: (params.tokens as u32, 1),
        threads: 512,
        shared: (width * 4) as u32,
        overlap: true,
    };
    gpu.launch(
        &format!("rope_kv_{}_{}", kv_name(cache.dtype)?, cache.head_dim),
        launch,
        params,
    )
}
