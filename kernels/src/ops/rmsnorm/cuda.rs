//! Launches of `rmsnorm.cu`, `few.cu` and `many.cu`: rows of the residual stream to F32 and to planes, and the weighted sum over experts.

use crate::backend::Result;
use crate::cuda::{Gpu, Launch};

const THREADS: u32 = 512;
/// Values of the widest row: what a block's registers hold.
pub(crate) const MAX_WIDTH: usize = 16 * 2 * 512;

/// Mirrors `NormInput` of `gemv.cuh`. Zero: absent.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct NormInput {
    pub(crate) x0: u64,
    pub(crate) x1: u64,
    pub(crate) weight: u64,
    pub(crate) sum_out: u64,
    pub(crate) eps: f32,
    pub(crate) k: i32,
    pub(crate) more: i32,
    pub(crate) stride: i32,
}

/// Mirrors `NormRows`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct NormRows {
    pub(crate) input: NormInput,
    pub(crate) rows: u64,
    pub(crate) normed: u64,
    pub(crate) plane: u64,
    pub(crate) quantised: u64,
    pub(crate) padded: i32,
    pub(crate) plane_blocks: i32,
    /// `input.x1` is BF16.
    pub(crate) bf16_parts: i32,
}

/// Mirrors `CombineRows`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct CombineRows {
    pub(crate) norm: NormRows,
    pub(crate) y: u64,
    pub(crate) sorted: u64,
    pub(crate) row_of_slot: u64,
    pub(crate) weights: u64,
    pub(crate) slots: i32,
}

/// Pairs of a row that one thread holds, as the kernels are compiled for.
pub(crate) fn pairs(width: i32) -> i32 {
    match width {
        ..=3072 => 3,
        3073..=6144 => 6,
        _ => 16,
    }
}

fn launch(rows: usize) -> Launch {
    Launch {
        grid: (rows as u32, 1),
        threads: THREADS,
        shared: 0,
        overlap: true,
    }
}

pub(crate) fn norm_rows(gpu: &Gpu, rows: usize, params: &NormRows) -> Result<()> {
    gpu.launch(
        &format!("norm_rows_{}", pairs(params.input.k)),
        launch(rows),
        params,
    )
}

/// Values of the widest row of `few.cu`, those that one of its passes takes, and the blocks of a row.
const FEW_WIDTH: i32 = 8192;
const FEW_PASS: i32 = 4096;
const FEW_SPREAD: u32 = 8;

/// The launch of a kernel of `few.cu`, and its passes, where it serves such rows.
fn few(rows: usize, params: &NormRows) -> Option<(Launch, i32)> {
    let fits = params.padded <= FEW_WIDTH && params.input.k % 4 == 0;
    let launch = Launch {
        grid: (rows as u32 * FEW_SPREAD, 1),
        threads: 128,
        shared: 0,
        overlap: true,
    };
    fits.then_some((launch, (params.padded + FEW_PASS - 1) / FEW_PASS))
}

/// `norm_rows` for a decode step: many blocks a row. A sum's order is another one.
pub(crate) fn norm_few(gpu: &Gpu, rows: usize, params: &NormRows) -> Result<()> {
    match few(rows, params) {
        Some((launch, passes)) => gpu.launch(&format!("norm_few_{passes}"), launch, params),
        None => norm_rows(gpu, rows, params),
    }
}

/// `combine_rows` of F32 results for a decode step, likewise; `norm.padded` must be there whether there is a norm or not.
pub(crate) fn combine_few(gpu: &Gpu, rows: usize, params: &CombineRows) -> Result<()> {
    match few(rows, &params.norm) {
        Some((launch, passes)) => gpu.launch(&format!("combine_few_{passes}"), launch, params),
        None => combine_rows(gpu, rows, params),
    }
}

pub(crate) fn combine_rows(gpu: &Gpu, rows: usize, params: &CombineRows) -> Result<()> {
    gpu.launch(
        &format!("combine_rows_{}", pairs(params.norm.input.k)),
        launch(rows),
        params,
    )
}

/// Mirrors `NormMany`. Zero: absent.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct NormMany {
    pub(crate) x: u64,
    pub(crate) weight: u64,
    pub(crate) plane: u64,
    pub(crate) quantised: u64,
    pub(crate) eps: f32,
    pub(crate) width: i32,
    pub(crate) padded: i32,
    pub(crate) plane_blocks: i32,
}

/// Rows to planes, many at a time.
pub(crate) fn norm_many(gpu: &Gpu, rows: usize, params: &NormMany) -> Result<()> {
    let launch = Launch {
        grid: (rows as u32, 1),
        threads: 128,
        shared: 0,
        overlap: true,
    };
    gpu.launch(&format!("norm_many_{}", pairs(params.width)), launch, params)
}
