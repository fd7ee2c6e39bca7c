//! Launches of `route.cu`.

use crate::backend::Result;
use crate::cuda::{Gpu, Launch};

/// What `route.cuh` can hold.
pub(crate) const MAX_EXPERTS: usize = 256;
pub(crate) const MAX_TOP_K: usize = 16;
/// Rows of one group: what an expert kernel keeps in shared memory.
pub(crate) const GROUP_ROWS: usize = 8;
/// Into how many parts the gate's inputs are cut, so that its few rows occupy the device.
pub(crate) const GATE_PARTS: usize = 8;

/// Mirrors `RouteParams`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct RouteParams {
    pub(crate) logits: u64,
    pub(crate) bias: u64,
    pub(crate) parts: i32,
    pub(crate) tokens: i32,
    pub(crate) experts: i32,
    pub(crate) k: i32,
    pub(crate) softmax: i32,
    pub(crate) renormalize: i32,
}

/// Mirrors `Groups`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Groups {
    pub(crate) count: u64,
    pub(crate) group: u64,
    pub(crate) row_token: u64,
    pub(crate) row_slot: u64,
}

/// Mirrors `Group`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Group {
    pub(crate) expert: i32,
    pub(crate) first: i32,
    pub(crate) rows: i32,
    pub(crate) token: i32,
}

/// Most groups of `rows` rows over `experts` experts.
pub(crate) fn max_groups(rows: usize, experts: usize) -> usize {
    (experts + rows / GROUP_ROWS).min(rows)
}

impl Groups {
    /// Bytes for up to `rows` rows over `experts` experts.
    pub(crate) fn bytes(rows: usize, experts: usize) -> usize {
        16 + max_groups(rows, experts) * size_of::<Group>() + 2 * rows * 4
    }

    /// The parts of a piece of memory of [`Groups::bytes`].
    pub(crate) fn at(address: u64, rows: usize, experts: usize) -> Groups {
        let group = address + 16;
        let row_token = group + (max_groups(rows, experts) * size_of::<Group>()) as u64;
        Groups {
            count: address,
            group,
            row_token,
            row_slot: row_token + rows as u64 * 4,
        }
    }
}

/// Mirrors `PackBeside`: a message to other ranks that the choice of experts writes beside; `rows` 0: none.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct PackBeside {
    pub(crate) normed: u64,
    pub(crate) rows: u64,
    pub(crate) ids: u64,
    pub(crate) weights: u64,
    pub(crate) head: u64,
    pub(crate) load: u64,
    pub(crate) begun: u64,
    pub(crate) at_peers: u64,
    pub(crate) straight: u64,
    pub(crate) row_bytes: i32,
    pub(crate) hidden: i32,
    pub(crate) exact: i32,
}

/// Mirrors `RouteTokens`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct RouteTokens {
    pub(crate) route: RouteParams,
    pub(crate) ids: u64,
    pub(crate) weights: u64,
    pub(crate) router_logits: u64,
    pub(crate) local: u64,
    pub(crate) groups: Groups,
    pub(crate) arrived: u64,
    pub(crate) pack: PackBeside,
}

/// Any number of tokens; no groups.
pub(crate) fn route(gpu: &Gpu, params: &RouteTokens) -> Result<()> {
    let packed = if params.pack.rows == 0 {
        0
    } else {
        params.route.tokens as u32
    };
    let blocks = (params.route.tokens as u32).div_ceil(8) + packed;
    gpu.launch(
        "route",
        Launch {
            grid: (blocks, 1),
            threads: 256,
            shared: 0,
            overlap: true,
        },
        params,
    )
}

/// At most 128 tokens, with groups.
pub(crate) fn route_groups(gpu: &Gpu, params: &RouteTokens) -> Result<()> {
    let tokens = params.route.tokens as u32;
    // A block a token where the scores are sigmoids, and nobody asks for the gate's sums.
    let (name, blocks) = match params.route.softmax == 0 && params.router_logits == 0 {
        true => ("route_groups_sigmoid", tokens),
        false => ("route_groups", tokens.div_ceil(8)),
    };
    gpu.launch(
        name,
        Launch {
            grid: (blocks, 1),
            threads: 256,
            shared: 0,
            overlap: true,
        },
        params,
    )
}
