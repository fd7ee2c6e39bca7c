//! Launch of `quantise.cu`.

use crate::backend::Result;
use crate::cuda::{Gpu, Launch};

const THREADS: u32 = 256;
const ROWS: usize = 32;
/// Blocks that a multiprocessor runs together.
const RESIDENT: usize = 8;

/// Mirrors `QuantiseParams`. `count` 0: `rows` rows.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct QuantiseParams {
    pub(crate) plane: u64,
    pub(crate) quantised: u64,
    pub(crate) count: u64,
    pub(crate) rows: i32,
    pub(crate) chunks: i32,
    pub(crate) blocks: i32,
}

pub(crate) fn quantise_plane(gpu: &Gpu, params: &QuantiseParams) -> Result<()> {
    let work = (params.rows as usize).div_ceil(ROWS) * params.chunks as usize;
    let launch = Launch {
        grid: (work.min(gpu.blocks() as usize * RESIDENT) as u32, 1),
        threads: THREADS,
        shared: 0,
        overlap: true,
    };
    gpu.launch("quantise_plane", launch, params)
}
