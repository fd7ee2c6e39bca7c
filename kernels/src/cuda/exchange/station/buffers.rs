//! Device memory of a station.

use super::super::ExchangeShape;
use crate::backend::Result;
use crate::cuda::format::padded;
use crate::cuda::plane::{PLANE_ROWS, plane_blocks, plane_bytes};
use crate::cuda::{Gpu, Memory};
use crate::ops::experts::many::{SortArea, sorted_rows};

pub(super) struct Buffers {
    pub(super) shape: ExchangeShape,
    pub(super) rows: Memory,
    pub(super) plane: Memory,
    pub(super) blocks: usize,
    pub(super) ids: Memory,
    pub(super) weights: Memory,
    pub(super) hidden: Memory,
    pub(super) y: Memory,
    pub(super) factors: Memory,
    pub(super) sort: Memory,
    pub(super) sorted: Memory,
    pub(super) sorted_blocks: usize,
    pub(super) sorted_y: Memory,
    pub(super) count: usize,
    /// What the buffers were made for.
    room: (ExchangeShape, usize),
}

impl Buffers {
    pub(super) fn new(gpu: &Gpu, shape: ExchangeShape, experts: usize) -> Result<Buffers> {
        let alloc = |bytes: usize| gpu.alloc(bytes, "a station");
        let (hidden, k) = (shape.hidden, shape.top_k);
        let tokens = shape.few_tokens.max(shape.many_tokens);
        let blocks = plane_blocks(tokens);
        let sorted = sorted_rows(shape.many_rows() * k, experts);
        Ok(Buffers {
            rows: alloc(tokens * hidden * 4)?,
            plane: alloc(plane_bytes(blocks, padded(hidden)))?,
            blocks,
            ids: alloc(tokens * k * 4)?,
            weights: alloc(tokens * k * 4)?,
            hidden: alloc(tokens * hidden * 4)?,
            y: alloc(shape.few_rows() * k * hidden * 4)?,
            factors: alloc(experts * 4)?,
            sort: alloc(SortArea::bytes(shape.many_rows().max(128), k))?,
            sorted: alloc(plane_bytes(sorted / PLANE_ROWS, padded(hidden)))?,
            sorted_blocks: sorted / PLANE_ROWS,
            sorted_y: alloc(sorted * hidden * 2)?,
            count: 0,
            room: (shape, experts),
            shape,
        })
    }

    /// Whether there is room for another epoch.
    pub(super) fn hold(&self, shape: &ExchangeShape, experts: usize) -> bool {
        let (room, most) = &self.room;
        let same = (room.hidden, room.top_k, *most) == (shape.hidden, shape.top_k, experts);
        same && room.few_rows() >= shape.few_rows()
            && room.few_tokens.max(room.many_tokens) >= shape.few_tokens.max(shape.many_tokens)
            && room.many_rows() >= shape.many_rows()
    }
}
