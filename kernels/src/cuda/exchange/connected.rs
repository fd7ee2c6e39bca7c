//! An exchange within an epoch, whatever carries it: the kernels' parameters and the order of their launches.

use std::cell::Cell;

use super::ipc::Epoch;
use super::launch::FewBlocks;
use super::layout::{
    Area, CombineFew, CombineMany, DispatchFew, DispatchMany, ExchangeParams, ExchangeTokens, GroupRows,
};
use super::places::{Places, table};
use super::{
    Choice, ExchangeShape, FewResults, FewRows, MAX_RANKS, ManyResults, ManyRows, Tokens, Wire, launch,
};
use crate::backend::{KernelError, Result};
use crate::cuda::format::padded;
use crate::cuda::{Gpu, shape};
use crate::ops::experts::cuda::Rows;
use crate::ops::linear::cuda::INLINE_WIDTH;

/// What an epoch fixes.
pub(super) struct Connected {
    pub(super) shape: ExchangeShape,
    pub(super) at: Area,
    pub(super) places: Places,
    pub(super) params: ExchangeParams,
    /// Ranks on this device.
    pub(super) sharing: usize,
    /// Of the few-token kernels ([`launch::few_part_bits`]).
    pub(super) part_bits: Cell<i32>,
}

impl Connected {
    /// `areas`: where this rank writes for each rank, its own included; `host`: the words of a `Control`; `staged`: the others
    /// are one area of this device; `sharing`: ranks of this device; `kept`: what an epoch before needed. The stream must be
    /// waited for before the first exchange.
    pub(super) fn new(
        gpu: &Gpu,
        epoch: &Epoch<'_>,
        area: [u64; MAX_RANKS],
        (host, staged, sharing): (u64, bool, usize),
        kept: Option<Places>,
    ) -> Result<Connected> {
        let sizes = epoch.shape;
        let (at, _) = Area::new(&sizes);
        let (entries, local) = table(epoch.placement, epoch.layers, epoch.rank as u32)?;
        let experts = epoch.placement.experts as usize;
        let kept = kept.filter(|places| places.hold(&sizes, entries.len(), experts));
        let mut places = match kept {
            Some(places) => places,
            None => Places::new(gpu, &sizes, entries.len(), experts)?,
        };
        places.set(gpu, &sizes, &entries, local)?;
        let timeout = epoch.timeout.as_nanos().try_into().unwrap_or(u64::MAX);
        places.start(gpu, epoch.number, timeout)?;
        let params = ExchangeParams {
            area,
            at,
            state: places.state.address,
            host,
            placement: places.placement.address,
            loads: places.loads.address,
            owner: places.owner.address,
            counts: places.counts.address,
            ids: places.ids.address,
            weights: places.weights.address,
            ranks: sizes.ranks as i32,
            rank: epoch.rank as i32,
            hidden: sizes.hidden as i32,
            k: sizes.top_k as i32,
            experts: epoch.placement.experts as i32,
            few_tokens: sizes.few_tokens as i32,
            many_tokens: sizes.many_tokens as i32,
            row_bytes: sizes.row_bytes() as i32,
            deterministic: i32::from(sizes.deterministic),
            alone: i32::from(sharing == 1),
            staged: i32::from(staged),
            trace: 0,
        };
        Ok(Connected {
            shape: sizes,
            at,
            places,
            params,
            sharing,
            part_bits: Cell::new(0),
        })
    }

    pub(super) fn tokens(&self, tokens: &Tokens, most: usize) -> Result<ExchangeTokens> {
        if tokens.count > most {
            return Err(shape(
                "exchange",
                "tokens",
                tokens.count,
                format!("at most {most}"),
            ));
        }
        Ok(ExchangeTokens {
            ids: tokens.ids,
            weights: tokens.weights,
            count: tokens.count as i32,
            layer: tokens.layer as i32,
        })
    }

    /// For steps in which no rank has more than `largest` tokens.
    pub(super) fn begin(&self, largest: usize) {
        if self.sharing == 1 {
            self.part_bits
                .set(launch::few_part_bits(self.shape.ranks, largest));
        }
    }

    fn few_blocks(&self) -> FewBlocks {
        FewBlocks {
            sharing: self.sharing,
            part_bits: self.part_bits.get(),
        }
    }

    pub(super) fn dispatch_few(&self, gpu: &Gpu, tokens: &Tokens, choice: &Choice) -> Result<FewRows> {
        let wide = self.shape.hidden > INLINE_WIDTH;
        if tokens.count > 0 && choice.normed == 0 && (choice.norm.x0 == 0 || wide) {
            let wanted = format!("rows, or a norm of at most {INLINE_WIDTH} values");
            return Err(shape("exchange", "input", self.shape.hidden, wanted));
        }
        let params = DispatchFew {
            exchange: self.params,
            tokens: self.tokens(tokens, self.shape.few_tokens)?,
            normed: choice.normed,
            x: self.places.x.address,
            group: self.group_rows(),
            route: choice.route,
            ids: tokens.ids,
            weights: tokens.weights,
            norm: choice.norm,
        };
        launch::dispatch_few(gpu, self.shape.exact, self.few_blocks(), &params)?;
        Ok(self.few_rows())
    }

    /// Where rows that came are grouped.
    pub(super) fn group_rows(&self) -> GroupRows {
        GroupRows {
            groups: self.places.groups,
            rows: self.places.rows.address,
            experts: self.places.local_experts as i32,
            words: self.shape.few_rows().div_ceil(32) as i32,
        }
    }

    /// The same for the experts' kernels.
    pub(super) fn few_rows(&self) -> FewRows {
        FewRows {
            x: self.places.x.address,
            kind: match self.shape.exact {
                true => Rows::Any,
                false => Rows::Bf16,
            },
            groups: self.places.groups,
            most_groups: self.places.most_groups,
        }
    }

    pub(super) fn combine_few(&self, gpu: &Gpu, tokens: &Tokens, results: &FewResults) -> Result<()> {
        let params = CombineFew {
            exchange: self.params,
            tokens: self.tokens(tokens, self.shape.few_tokens)?,
            y: results.y,
            norm: results.norm,
            part_bits: self.part_bits.get(),
        };
        launch::combine_few(gpu, self.shape.exact, self.few_blocks(), &params)
    }

    pub(super) fn dispatch_many(&self, gpu: &Gpu, tokens: &Tokens, plane: (u64, usize)) -> Result<ManyRows> {
        self.send_many(gpu, tokens, plane)?;
        self.arrive_many(gpu, tokens)
    }

    fn dispatch_params(&self, tokens: &Tokens, (plane, blocks): (u64, usize)) -> Result<DispatchMany> {
        Ok(DispatchMany {
            exchange: self.params,
            tokens: self.tokens(tokens, self.shape.many_tokens)?,
            plane,
            plane_blocks: blocks as i32,
            padded: padded(self.shape.hidden) as i32,
            fp8: i32::from(self.shape.wire == Wire::Fp8),
            rows: self.places.rows.address,
        })
    }

    /// This rank's rows to where the others look for them, or to where they are carried from.
    pub(super) fn send_many(&self, gpu: &Gpu, tokens: &Tokens, plane: (u64, usize)) -> Result<()> {
        launch::send_many(gpu, &self.dispatch_params(tokens, plane)?)
    }

    /// Waits for everybody's.
    pub(super) fn arrive_many(&self, gpu: &Gpu, tokens: &Tokens) -> Result<ManyRows> {
        launch::arrive_many(gpu, &self.dispatch_params(tokens, (0, 0))?)?;
        let own = self.params.area[self.params.rank as usize];
        Ok(ManyRows {
            planes: false,
            rows: own + self.at.many_rows,
            row_bytes: self.shape.row_bytes(),
            region_bytes: self.shape.many_tokens * self.shape.row_bytes(),
            wire: self.shape.wire,
            ids: own + self.at.many_ids,
            counts: self.places.counts.address,
            total: self.places.rows.address,
        })
    }

    fn combine_params(&self, tokens: &Tokens, results: &ManyResults) -> Result<CombineMany> {
        Ok(CombineMany {
            exchange: self.params,
            tokens: self.tokens(tokens, self.shape.many_tokens)?,
            sorted: results.sorted,
            row_of_slot: results.row_of_slot,
            hidden: results.hidden,
            senders: 0,
            ahead: 0,
        })
    }

    pub(super) fn combine_many(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()> {
        if self.sharing == 1 {
            return launch::combine_many(gpu, &self.combine_params(tokens, results)?);
        }
        self.return_many(gpu, tokens, results)?;
        self.settle_many(gpu, tokens, results)
    }

    /// Results to the owners of their tokens, or to where they are carried from.
    pub(super) fn return_many(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()> {
        launch::return_many(
            gpu,
            self.shape.many_rows(),
            &self.combine_params(tokens, results)?,
        )
    }

    /// Waits for everybody's and adds them.
    pub(super) fn settle_many(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()> {
        launch::settle_many(gpu, &self.combine_params(tokens, results)?)
    }
}

/// What is asked of an exchange that has no epoch.
pub(super) fn of_no_epoch() -> KernelError {
    KernelError::Unsupported("the exchange has no epoch: connect it first".into())
}
