//! Launches of `gate_up.cu` and `down.cu`.

use crate::backend::Result;
use crate::cuda::format::partial_bytes;
use crate::cuda::{Format, Gpu, Launch};
use crate::ops::rmsnorm::cuda::NormInput;
use crate::ops::route::cuda::{GROUP_ROWS, Group, Groups, RouteParams};

const THREADS: u32 = 512;
/// Slots of a ring at most in the kernels of groups, as `experts.cuh` has it.
const GROUPS_DEPTH: usize = 3;
/// Shared memory of the kernels of groups that is not dynamic, at most.
const FIXED_BYTES: usize = 1024;
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
    pub(crate) ahead: i32,
    pub(crate) depth: i32,
    pub(crate) unused: i32,
}

fn launch(gpu: &Gpu, shared: usize) -> Launch {
    Launch {
        grid: (gpu.blocks(), 1),
        threads: THREADS,
        shared: shared as u32,
        overlap: true,
    }
}

/// What the rows of groups are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// F32 values.
    Any,
    /// F32 words that hold BF16 values: weights of 8 or 16 bits then meet eight rows at a time instead of four.
    Bf16,
}

/// silu(gate) * up for the groups that the device has listed; `groups`: most of them.
pub(crate) fn gate_up_groups(
    gpu: &Gpu,
    format: Format,
    groups: usize,
    rows: Rows,
    params: &ExpertParams,
) -> Result<()> {
    let padded = params.experts.hidden_padded as usize;
    let (name, image, ahead) = match (rows, format) {
        (Rows::Bf16, Format::Fp8Experts | Format::Bf16) => ("rows", padded * 2, true),
        _ => ("groups", format.image_bytes(padded), false),
    };
    let name = format!("gate_up_{}_{name}", format.name());
    launch_groups(gpu, &name, format, (padded, image, ahead), groups, params)
}

pub(crate) fn down_groups(gpu: &Gpu, format: Format, groups: usize, params: &ExpertParams) -> Result<()> {
    let padded = params.experts.inter_padded as usize;
    let name = format!("down_{}_groups", format.name());
    let image = (padded, format.image_bytes(padded), true);
    launch_groups(gpu, &name, format, image, groups, params)
}

/// `padded`: values of a row; `image`: bytes of its image; `ahead`: the kernel can load the images of the next group while it multiplies those of one.
fn launch_groups(
    gpu: &Gpu,
    name: &str,
    format: Format,
    (padded, image, ahead): (usize, usize, bool),
    groups: usize,
    params: &ExpertParams,
) -> Result<()> {
    let images = GROUP_ROWS * image;
    // Images of F16 have a step of each row's 128 values.
    let steps = match format {
        Format::Fp8Experts => 2 * padded / 128 * GROUP_ROWS * size_of::<f32>(),
        _ => 0,
    };
    // A block lists its own groups: neighbours.
    let listed = groups.div_ceil(gpu.blocks() as usize) + 2;
    let rest = partial_bytes(2) + steps + listed * size_of::<Group>();
    let room = gpu.device.shared_bytes as usize - FIXED_BYTES;
    let slot = format.group_slot_bytes();
    let ahead = ahead && rest + format.depth() * slot + 2 * images <= room;
    let fixed = rest + if ahead { 2 * images } else { images };
    // A ring of three lets a warp's weights go on while it waits for others at a unit's end. INT4's are as fast with two.
    let most = match format {
        Format::Fp8Experts => GROUPS_DEPTH,
        _ => format.depth(),
    };
    let depth = (room.saturating_sub(fixed) / slot).clamp(format.depth(), most);
    let params = ExpertParams {
        most: groups as i32,
        ahead: ahead.into(),
        depth: depth as i32,
        ..*params
    };
    gpu.launch(name, launch(gpu, fixed + depth * slot), &params)
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
