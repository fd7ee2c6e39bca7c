//! Launches of `gate_up.cu` and `down.cu`.

use crate::backend::Result;
use crate::cuda::format::partial_bytes;
use crate::cuda::{Format, Gpu, Launch};
use crate::ops::rmsnorm::cuda::NormInput;
use crate::ops::route::cuda::{GROUP_ROWS, Group, Groups, RouteParams};

const THREADS: u32 = 512;
/// Shared memory of the kernels of groups that is not dynamic, at most.
const FIXED_BYTES: usize = 1024;
/// Groups that a block lists, with room to spare: of 128 tokens and 256 experts five.
const MOST_LISTED: usize = 16;
/// A unit of up to four rows, in parts of its time (`share.cuh`).
const EVEN: i32 = 16;
/// Channels and rows of a unit of the two kernels (`experts.cuh`).
const UP_CHANNELS: usize = 32;
const DOWN_ROWS: usize = 64;
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
    pub(crate) images: i32,
    pub(crate) heavy: i32,
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
    let (image, apart) = format.group_image_bytes(padded);
    let (name, image) = match (rows, format) {
        (Rows::Bf16, Format::Fp8Experts | Format::Bf16) => ("rows", padded * 2),
        _ => ("groups", image),
    };
    let heavy = match (name, format) {
        ("rows", _) => 0, // eight at a time
        (_, Format::Int4G128 | Format::Int4G32) => 18,
        (_, Format::Fp8Experts) => 19,
        _ => 0,
    };
    let units = params.experts.inter_padded as usize / UP_CHANNELS;
    let heavy = by_time(heavy, units, gpu.blocks() as usize);
    let name = format!("gate_up_{}_{name}", format.name());
    launch_groups(gpu, &name, format, (image, apart), groups, heavy, params)
}

pub(crate) fn down_groups(gpu: &Gpu, format: Format, groups: usize, params: &ExpertParams) -> Result<()> {
    let name = format!("down_{}_groups", format.name());
    let row = format.group_image_bytes(params.experts.inter_padded as usize);
    let heavy = match format {
        Format::Int4G128 | Format::Int4G32 => 20,
        Format::Fp8Experts => 18,
        _ => 0,
    };
    let units = (params.experts.hidden as usize).div_ceil(DOWN_ROWS);
    let heavy = by_time(heavy, units, gpu.blocks() as usize);
    launch_groups(gpu, &name, format, row, groups, heavy, params)
}

/// `heavy`, if a group has units enough for every block's share to be one part of time or more, as `share.cuh` wants it; else 0: as many units a block.
fn by_time(heavy: i32, units: usize, blocks: usize) -> i32 {
    if units * EVEN as usize >= blocks { heavy } else { 0 }
}

/// Groups that a block lists: neighbours, as many as its share of the time has of light ones.
fn listed(groups: usize, heavy: i32, blocks: usize) -> usize {
    (groups * heavy.max(EVEN) as usize).div_ceil(EVEN as usize * blocks) + 2
}

/// Shared memory of a block of the kernels of groups but for the images of rows.
fn beside_images(format: Format, apart: usize, listed: usize) -> usize {
    format.group_ring_bytes() + partial_bytes(2) + 2 * GROUP_ROWS * apart + listed * size_of::<Group>()
}

/// How wide the inputs of experts may be, so that a group's rows fit into a block's shared memory.
pub(crate) fn widest(format: Format, shared_bytes: usize) -> usize {
    let room = shared_bytes.saturating_sub(FIXED_BYTES);
    let fits = |width: &usize| {
        let (image, apart) = format.group_image_bytes(*width);
        beside_images(format, apart, MOST_LISTED) + GROUP_ROWS * image <= room
    };
    (1..)
        .map(|blocks| blocks * 128)
        .take_while(fits)
        .last()
        .unwrap_or(0)
}

/// `image`: bytes of a row's image; `apart`: what a row has beside it, of each of two groups. `heavy`: how many sixteenths of another's a unit of more than four
/// rows takes, as measured; 0: blocks have as many units each.
fn launch_groups(
    gpu: &Gpu,
    name: &str,
    format: Format,
    (image, apart): (usize, usize),
    groups: usize,
    heavy: i32,
    params: &ExpertParams,
) -> Result<()> {
    let room = gpu.device.shared_bytes as usize - FIXED_BYTES;
    let rest = beside_images(format, apart, listed(groups, heavy, gpu.blocks() as usize));
    // Images of the next group's rows come early where they have room beside this one's.
    let images = (room.saturating_sub(rest) / image).clamp(GROUP_ROWS, 2 * GROUP_ROWS);
    let params = ExpertParams {
        most: groups as i32,
        images: images as i32,
        heavy,
        ..*params
    };
    gpu.launch(name, launch(gpu, rest + images * image), &params)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Where shares of equal time begin, as `share.cuh` has it: light groups in front of heavy ones.
    fn begins(light: usize, all: usize, units: usize, heavy: usize, blocks: usize) -> Vec<usize> {
        let even = EVEN as usize;
        let total = (all * even + (all - light) * (heavy - even)) * units;
        (0..=blocks)
            .map(|block| {
                let mark = total * block / blocks;
                let of_light = light * even * units;
                if mark < of_light {
                    mark.div_ceil(even)
                } else {
                    light * units + (mark - of_light).div_ceil(heavy)
                }
            })
            .collect()
    }

    /// Who says where block `block`'s share begins and where it ends, as the threads of `share.cuh` decide it; the first `light` groups are light.
    fn said(
        light: usize,
        all: usize,
        units: usize,
        heavy: usize,
        blocks: usize,
        block: usize,
    ) -> (usize, usize) {
        let even = EVEN as usize;
        let until = |group: usize| (group * even + group.saturating_sub(light) * (heavy - even)) * units;
        let (mark, next) = (until(all) * block / blocks, until(all) * (block + 1) / blocks);
        let count =
            |says: &dyn Fn(usize, usize) -> bool| (0..all).filter(|g| says(until(*g), until(g + 1))).count();
        (
            count(&|from, to| mark >= from && mark < to),
            count(&|from, to| next > from && next <= to),
        )
    }

    #[test]
    fn a_share_has_one_beginning_and_one_end() {
        let blocks = 132;
        // Models as small as the references': not every share is of a part of time.
        assert_eq!(said(2, 3, 2, 18, blocks, 0), (1, 0));
        for units in 1..=48 {
            let heavy = by_time(18, units, blocks) as usize;
            for all in [1, 2, 3, 7, 31] {
                for (light, block) in (0..all).flat_map(|light| (0..blocks).map(move |block| (light, block)))
                {
                    let once = heavy == 0 || said(light, all, units, heavy, blocks, block) == (1, 1);
                    assert!(once, "{units} units, {light} of {all}, block {block}");
                }
            }
        }
        assert_eq!(by_time(18, 48, blocks), 18);
    }

    #[test]
    fn inputs_of_the_model_fit_and_wider_ones_are_known() {
        let shared = 227 * 1024;
        let all = [
            Format::Fp8Experts,
            Format::Int4G32,
            Format::Bf16,
            Format::Int4G128,
        ];
        assert_eq!(all.map(|format| widest(format, shared)), [3200, 4096, 4352, 4992]);
    }

    #[test]
    fn a_block_lists_all_groups_of_its_share() {
        for heavy in [16, 18, 20, 32] {
            for all in [1, 7, 132, 245, 511] {
                for light in 0..=all {
                    let begins = begins(light, all, 48, heavy, 132);
                    assert_eq!(begins[132], all * 48);
                    for pair in begins.windows(2).filter(|pair| pair[0] < pair[1]) {
                        let groups = (pair[1] - 1) / 48 - pair[0] / 48 + 1;
                        assert!(groups <= listed(all, heavy as i32, 132), "{light} of {all}");
                    }
                }
            }
        }
    }
}
