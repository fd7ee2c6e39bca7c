//! Launch of `combine.cu`.

use crate::backend::Result;
use crate::cuda::{Gpu, Launch};

const THREADS: usize = 384;
/// Values that a thread takes at a time.
const VALUES: usize = 8;

/// Mirrors `CombineSorted`.
#[repr(C)]
pub(crate) struct CombineSorted {
    pub(crate) hidden: u64,
    pub(crate) sorted: u64,
    pub(crate) row_of_slot: u64,
    pub(crate) weights: u64,
    pub(crate) width: i32,
    pub(crate) slots: i32,
}

/// Whether rows of this width can be added so.
pub(crate) fn fits(width: usize) -> bool {
    width.is_multiple_of(VALUES)
}

pub(crate) fn combine_sorted(gpu: &Gpu, tokens: usize, params: &CombineSorted) -> Result<()> {
    let threads = (params.width as usize / VALUES).next_multiple_of(32).min(THREADS);
    let launch = Launch {
        grid: (tokens as u32, 1),
        threads: threads as u32,
        shared: 0,
        overlap: true,
    };
    gpu.launch("combine_sorted", launch, params)
}
