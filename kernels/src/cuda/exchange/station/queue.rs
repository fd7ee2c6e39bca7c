//! The kernels of a station's exchanges, with experts that multiply by a number each in between.

use super::super::{FewResults, ManyResults, ManyRows, Tokens};
use super::buffers::Buffers;
use super::{Family, Station, Until};
use crate::backend::{KernelError, Result};
use crate::cuda::exchange::ExchangeShape;
use crate::cuda::format::padded;
use crate::cuda::plane::{PLANE_BLOCK, PLANE_ROWS};
use crate::cuda::{Gpu, Launch};
use crate::ops::experts::many::{SortArea, SortParams, TILE_ROWS, sort};
use crate::ops::rmsnorm::cuda::{NormInput, NormRows};
use crate::ops::route::cuda::Groups;

/// Mirrors `StandInFew`.
#[repr(C)]
struct StandInFew {
    groups: Groups,
    x: u64,
    y: u64,
    factor: u64,
    hidden: i32,
}

/// Mirrors `StandInMany`.
#[repr(C)]
struct StandInMany {
    tiles: u64,
    tile_count: u64,
    plane: u64,
    y: u64,
    factor: u64,
    hidden: i32,
    blocks: i32,
}

impl Station {
    /// Queues one exchange.
    pub fn queue(&self, family: Family, layer: usize, until: Until) -> Result<()> {
        let (gpu, b) = (&self.gpu, self.buffers()?);
        let tokens = Tokens {
            layer,
            piece: 0,
            count: b.count,
            ids: b.ids.address,
            weights: b.weights.address,
        };
        match family {
            Family::Few => self.queue_few(gpu, b, &tokens, until)?,
            Family::Many => self.queue_many(gpu, b, &tokens, until)?,
            Family::Halves => self.queue_halves(gpu, b, &tokens, until)?,
        }
        if gpu.stream.is_capturing(&gpu.device)? {
            return Ok(());
        }
        self.exchange().queued(gpu)
    }

    fn queue_few(&self, gpu: &Gpu, b: &Buffers, tokens: &Tokens, until: Until) -> Result<()> {
        let hidden = b.shape.hidden as i32;
        let rows = self.exchange().dispatch_few(gpu, tokens, b.rows.address)?;
        if until == Until::Dispatch {
            return Ok(());
        }
        if until == Until::All {
            let params = StandInFew {
                groups: rows.groups,
                x: rows.x,
                y: b.y.address,
                factor: b.factors.address,
                hidden,
            };
            gpu.launch("stand_in_few", stand_in(gpu), &params)?;
        }
        let norm = NormRows {
            input: NormInput {
                x0: b.hidden.address,
                sum_out: b.hidden.address,
                k: hidden,
                ..NormInput::default()
            },
            ..NormRows::default()
        };
        let results = FewResults { y: b.y.address, norm };
        self.exchange().combine_few(gpu, tokens, &results)
    }

    fn queue_many(&self, gpu: &Gpu, b: &Buffers, tokens: &Tokens, until: Until) -> Result<()> {
        let exchange = self.exchange();
        let there = exchange.plane(0, tokens.count);
        let (plane, blocks) = there.unwrap_or((b.plane.address, b.blocks));
        let rows = exchange.dispatch_many(gpu, tokens, plane, blocks)?;
        if until == Until::Dispatch {
            return Ok(());
        }
        let results = self.work_many(gpu, b, &rows, until)?;
        self.exchange().combine_many(gpu, tokens, &results)
    }

    /// The experts' work on what came.
    fn work_many(&self, gpu: &Gpu, b: &Buffers, rows: &ManyRows, until: Until) -> Result<ManyResults> {
        let sizes = b.shape;
        let area = SortArea::at(b.sort.address, sizes.many_rows(), sizes.top_k);
        if until == Until::All {
            let to = SortParams {
                sorted: b.sorted.address,
                k: sizes.top_k as i32,
                steps: (padded(sizes.hidden) / 128) as i32,
                sorted_blocks: b.sorted_blocks as i32,
                tile_rows: TILE_ROWS as i32,
                ..SortParams::default()
            };
            let params = rows.sort_params(&sizes, self.exchange().local_experts()?, to);
            sort(gpu, &area.fill(params))?;
            let params = StandInMany {
                tiles: area.tiles,
                tile_count: area.tile_count,
                plane: b.sorted.address,
                y: b.sorted_y.address,
                factor: b.factors.address,
                hidden: sizes.hidden as i32,
                blocks: b.sorted_blocks as i32,
            };
            gpu.launch("stand_in_many", stand_in(gpu), &params)?;
        }
        Ok(ManyResults {
            sorted: b.sorted_y.address,
            row_of_slot: area.row_of_slot,
            hidden: b.hidden.address,
        })
    }

    /// Both pieces go before either comes, and the first one's results while the second is worked on.
    fn queue_halves(&self, gpu: &Gpu, b: &Buffers, tokens: &Tokens, until: Until) -> Result<()> {
        let Some(halves) = self.exchange().halves() else {
            return Err(KernelError::Unsupported("pieces under way at once".into()));
        };
        let (each, k, hidden) = (half(&b.shape), b.shape.top_k, b.shape.hidden);
        let pieces = [0, 1].map(|piece| {
            let first = (piece * each).min(tokens.count);
            let count = (tokens.count - first).min(each);
            let slots = (first * k * 4) as u64;
            let of_piece = Tokens {
                piece,
                count,
                ids: tokens.ids + slots,
                weights: tokens.weights + slots,
                ..*tokens
            };
            (of_piece, first)
        });
        for (piece, first) in &pieces {
            let plane = b.plane.address + (first / PLANE_ROWS * PLANE_BLOCK) as u64;
            halves.start_dispatch(gpu, piece, (plane, b.blocks))?;
        }
        if until == Until::Dispatch {
            return Ok(());
        }
        let mut returned = Vec::new();
        for (piece, first) in &pieces {
            let rows = halves.finish_dispatch(gpu, piece)?;
            let mut results = self.work_many(gpu, b, &rows, until)?;
            results.hidden += (first * hidden * 4) as u64;
            halves.start_combine(gpu, piece, &results)?;
            returned.push((*piece, results));
        }
        for (piece, results) in &returned {
            halves.finish_combine(gpu, piece, results)?;
        }
        Ok(())
    }
}

/// Tokens of a piece, where there are two.
pub(super) fn half(shape: &ExchangeShape) -> usize {
    (shape.many_tokens / 2).next_multiple_of(PLANE_ROWS)
}

fn stand_in(gpu: &Gpu) -> Launch {
    Launch {
        grid: (2 * gpu.blocks(), 1),
        threads: 256,
        shared: 0,
        overlap: true,
    }
}
