//! Launches of `sort.cu`, `wide.cu` and `quantised.cu`: the experts of many tokens.

use crate::backend::Result;
use crate::cuda::plane::{
    GEMM_COLUMNS, LEAVING_BYTES, PLANE_ROWS, WIDE_COLUMNS, WIDE_TILES, quantised_launch, wide_launch,
};
use crate::cuda::{Format, Gpu, Launch};
use crate::ops::experts::cuda::ExpertsParam;
use crate::ops::route::cuda::MAX_EXPERTS;

const SORT_TOKENS: usize = 128;

/// Mirrors `SortParams`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct SortParams {
    pub(crate) ids: u64,
    pub(crate) local: u64,
    pub(crate) counts: u64,
    pub(crate) starts: u64,
    pub(crate) tiles: u64,
    pub(crate) tile_count: u64,
    pub(crate) row_of_slot: u64,
    pub(crate) plane: u64,
    pub(crate) sorted: u64,
    pub(crate) tokens: i32,
    pub(crate) k: i32,
    pub(crate) experts: i32,
    pub(crate) steps: i32,
    pub(crate) plane_blocks: i32,
    pub(crate) sorted_blocks: i32,
    pub(crate) region_counts: u64,
    pub(crate) rows: u64,
    pub(crate) region_bytes: u64,
    pub(crate) region: i32,
    pub(crate) row_bytes: i32,
    pub(crate) fp8: i32,
    pub(crate) sorted_rows: u64,
    pub(crate) quantised: i32,
    pub(crate) tile_rows: i32,
    pub(crate) planes: i32,
}

/// Mirrors `ManyParams`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ManyParams {
    pub(crate) experts: ExpertsParam,
    pub(crate) tiles: u64,
    pub(crate) tile_count: u64,
    pub(crate) plane: u64,
    pub(crate) acted: u64,
    pub(crate) y: u64,
    pub(crate) blocks: i32,
}

/// Rows of the sorted plane for so many (token, slot) pairs: every expert's padded to eight, and one tile to read past.
pub(crate) fn sorted_rows(pairs: usize, experts: usize) -> usize {
    (pairs + experts * (PLANE_ROWS - 1)).next_multiple_of(PLANE_ROWS) + GEMM_COLUMNS
}

/// The pieces of one area of memory that the sort fills.
#[derive(Clone, Copy)]
pub(crate) struct SortArea {
    counts: u64,
    starts: u64,
    pub(crate) tiles: u64,
    pub(crate) tile_count: u64,
    pub(crate) row_of_slot: u64,
}

impl SortArea {
    pub(crate) fn bytes(tokens: usize, k: usize) -> usize {
        let tiles = MAX_EXPERTS + tokens * k / GEMM_COLUMNS + 1;
        (tokens.div_ceil(SORT_TOKENS) + 1) * MAX_EXPERTS * 4 + tiles * 16 + 16 + tokens * k * 4
    }

    pub(crate) fn at(address: u64, tokens: usize, k: usize) -> SortArea {
        let starts = address + (tokens.div_ceil(SORT_TOKENS) * MAX_EXPERTS * 4) as u64;
        let tiles = starts + MAX_EXPERTS as u64 * 4;
        let tile_count = tiles + (MAX_EXPERTS + tokens * k / GEMM_COLUMNS + 1) as u64 * 16;
        SortArea {
            counts: address,
            starts,
            tiles,
            tile_count,
            row_of_slot: tile_count + 16,
        }
    }

    pub(crate) fn fill(&self, params: SortParams) -> SortParams {
        SortParams {
            counts: self.counts,
            starts: self.starts,
            tiles: self.tiles,
            tile_count: self.tile_count,
            row_of_slot: self.row_of_slot,
            ..params
        }
    }
}

/// Sorts the rows of a step by expert and gathers them.
pub(crate) fn sort(gpu: &Gpu, params: &SortParams) -> Result<()> {
    let blocks = (params.tokens as u32).div_ceil(SORT_TOKENS as u32);
    let launch = |blocks: u32| Launch {
        grid: (blocks, 1),
        threads: MAX_EXPERTS as u32,
        shared: 0,
        overlap: true,
    };
    gpu.launch("sort_count", launch(blocks), params)?;
    gpu.launch("sort_scan", launch(1), params)?;
    gpu.launch("sort_place", launch(blocks), params)?;
    gpu.launch("sort_rows", launch(params.tokens as u32), params)
}

/// Rows of a tile of the sort's list, for the products that follow.
pub(crate) const TILE_ROWS: usize = WIDE_COLUMNS;

/// Shared memory through which the activations of `wide.cu` go out.
const ACTED_BYTES: usize = WIDE_COLUMNS * 128;

/// Shared memory in which two blocks of `quantised.cu` tell each other largest values (`Largest`): of five tiles, 32 rows a warp.
const LARGEST_BYTES: usize = 5 * 8 * (32 * 4 + 8);

/// Both products; `rows`: most sorted rows, to size the grid. `quantised`: FP8 weights see quantised activations.
pub(crate) fn products(
    gpu: &Gpu,
    format: Format,
    quantised: bool,
    rows: usize,
    up: &ManyParams,
    down: &ManyParams,
) -> Result<()> {
    let tiles = rows.div_ceil(TILE_ROWS) + MAX_EXPERTS;
    let work = |rows_of_weight: usize, per_tile: usize| tiles * rows_of_weight.div_ceil(per_tile);
    let up_work = work(up.experts.inter_padded as usize, 2 * WIDE_TILES * 8);
    let down_work = work(down.experts.hidden as usize, 2 * WIDE_TILES * 16);
    if quantised {
        gpu.launch(
            "quantised_gate_up",
            quantised_launch(gpu, up_work, 4, LARGEST_BYTES),
            up,
        )?;
        return gpu.launch(
            "quantised_down",
            quantised_launch(gpu, down_work, 3, LEAVING_BYTES),
            down,
        );
    }
    let name = format.name();
    gpu.launch(
        &format!("wide_gate_up_{name}"),
        wide_launch(gpu, format, up_work, ACTED_BYTES),
        up,
    )?;
    gpu.launch(
        &format!("wide_down_{name}"),
        wide_launch(gpu, format, down_work, 0),
        down,
    )
}
