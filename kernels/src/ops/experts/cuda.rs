//! Launches of `gate_up.cu` and `down.cu`.

use crate::backend::Result;
use crate::cuda::format::partial_bytes;
use crate::cuda::{Format, Gpu, Launch};
use crate::ops::rmsnorm::cuda::NormInput;
use crate::ops::route::cuda::{GROUP_ROWS, Group, Groups, RouteParams};

const THREADS: u32 = 512;
/// Slots of half a token's experts in `down_sum`.
pub(crate) const HALF_SLOTS: usize = 4;

/// Mirrors `Experts`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ExpertsParam {
    pub(crate) base: u64,
    pub(crate) expert_bytes: u64,
    pub(crate) up_offset: u64,
    pub(crate) down_offset: u64,
    pub(crate) hidden_padded: i32,
    pub(crate) inter_padded: i32,
    pub(crate) hidden: i32,
    pub(crate) bf16_scales: i32,
}

/// Mirrors `ExpertParams`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ExpertParams {
    pub(crate) experts: ExpertsParam,
    pub(crate) groups: Groups,
    pub(crate) x: u64,
    pub(crate) acted: u64,
    pub(crate) y: u64,
    pub(crate) input: NormInput,
    pub(crate) route: RouteParams,
    pub(crate) residual: u64,
    pub(crate) halves: u64,
    pub(crate) most: i32,
}

fn launch(gpu: &Gpu, shared: usize) -> Launch {
    Launch {
        grid: (gpu.blocks(), 1),
        threads: THREADS,
        shared: shared as u32,
        overlap: true,
    }
}

/// silu(gate) * up for the groups that the device has listed; `groups`: most of them.
pub(crate) fn gate_up_groups(gpu: &Gpu, format: Format, groups: usize, params: &ExpertParams) -> Result<()> {
    let images = GROUP_ROWS * format.image_bytes(params.experts.hidden_padded as usize);
    let shared = format.ring_bytes() + images + partial_bytes(2) + groups * size_of::<Group>();
    let params = ExpertParams {
        most: groups as i32,
        ..*params
    };
    gpu.launch(
        &format!("gate_up_{}_groups", format.name()),
        launch(gpu, shared),
        &params,
    )
}

pub(crate) fn down_groups(gpu: &Gpu, format: Format, groups: usize, params: &ExpertParams) -> Result<()> {
    let images = GROUP_ROWS * format.image_bytes(params.experts.inter_padded as usize);
    let shared = format.ring_bytes() + images + partial_bytes(2) + groups * size_of::<Group>();
    gpu.launch(
        &format!("down_{}_groups", format.name()),
        launch(gpu, shared),
        params,
    )
}

/// Up to four tokens: norm, choice and first products in one kernel.
pub(crate) fn gate_up_inline(gpu: &Gpu, format: Format, params: &ExpertParams) -> Result<()> {
    let held = (params.route.tokens as usize).next_power_of_two();
    let shared = format.ring_bytes()
        + held * format.image_bytes(params.experts.hidden_padded as usize)
        + partial_bytes(1);
    gpu.launch(
        &format!("gate_up_{}_{held}", format.name()),
        launch(gpu, shared),
        params,
    )
}

/// Up to four tokens: second products and weighted sum, in two halves of the slots.
pub(crate) fn down_sum(gpu: &Gpu, format: Format, params: &ExpertParams) -> Result<()> {
    let shared = format.ring_bytes()
        + HALF_SLOTS * format.image_bytes(params.experts.inter_padded as usize)
        + partial_bytes(1);
    let mut launch = launch(gpu, shared);
    launch.grid.0 = launch.grid.0 / 2 * 2;
    gpu.launch(&format!("down_{}_sum", format.name()), launch, params)
}
