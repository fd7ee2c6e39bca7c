//! An exchange within an epoch, whatever carries it: the kernels' parameters and the order of their launches.

use super::ipc::Epoch;
use super::layout::{
    Area, CombineFew, CombineMany, DispatchFew, DispatchMany, ExchangeParams, ExchangeTokens, GroupRows,
    Phase,
};
use super::places::{Places, table};
use super::{ExchangeShape, FewResults, FewRows, MAX_RANKS, ManyResults, ManyRows, Tokens, Wire, launch};
use crate::backend::{KernelError, Result};
use crate::cuda::format::padded;
use crate::cuda::{Gpu, shape};

/// What an epoch fixes.
pub(super) struct Connected {
    pub(super) shape: ExchangeShape,
    pub(super) at: Area,
    pub(super) places: Places,
    pub(super) params: ExchangeParams,
    /// Ranks on this device.
    pub(super) sharing: usize,
}

/// Between sending and receiving: carries what was staged to the other ranks.
pub(super) type Carry<'a> = Option<&'a dyn Fn() -> Result<()>>;

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
        let (at, _) = Area::new(&sizes, staged);
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
        };
        Ok(Connected {
            shape: sizes,
            at,
            places,
            params,
            sharing,
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

    pub(super) fn dispatch_few(
        &self,
        gpu: &Gpu,
        tokens: &Tokens,
        normed: u64,
        carry: Carry<'_>,
    ) -> Result<FewRows> {
        let params = DispatchFew {
            exchange: self.params,
            tokens: self.tokens(tokens, self.shape.few_tokens)?,
            normed,
            x: self.places.x.address,
            group: self.group_rows(),
            phase: Phase::Whole,
        };
        let run = |phase| {
            launch::dispatch_few(
                gpu,
                self.shape.exact,
                self.sharing,
                &DispatchFew { phase, ..params },
            )
        };
        in_phases(run, carry)?;
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
            groups: self.places.groups,
            most_groups: self.places.most_groups,
        }
    }

    pub(super) fn combine_few(
        &self,
        gpu: &Gpu,
        tokens: &Tokens,
        results: &FewResults,
        carry: Carry<'_>,
    ) -> Result<()> {
        let params = CombineFew {
            exchange: self.params,
            tokens: self.tokens(tokens, self.shape.few_tokens)?,
            y: results.y,
            norm: results.norm,
            phase: Phase::Whole,
        };
        let run = |phase| {
            launch::combine_few(
                gpu,
                self.shape.exact,
                self.sharing,
                &CombineFew { phase, ..params },
            )
        };
        in_phases(run, carry)
    }

    pub(super) fn dispatch_many(
        &self,
        gpu: &Gpu,
        tokens: &Tokens,
        (plane, blocks): (u64, usize),
        carry: Carry<'_>,
    ) -> Result<ManyRows> {
        let params = DispatchMany {
            exchange: self.params,
            tokens: self.tokens(tokens, self.shape.many_tokens)?,
            plane,
            plane_blocks: blocks as i32,
            padded: padded(self.shape.hidden) as i32,
            fp8: i32::from(self.shape.wire == Wire::Fp8),
            rows: self.places.rows.address,
        };
        launch::send_many(gpu, &params)?;
        carry.map_or(Ok(()), |carry| carry())?;
        launch::arrive_many(gpu, &params)?;
        let own = self.params.area[self.params.rank as usize];
        Ok(ManyRows {
            rows: own + self.at.many_rows,
            row_bytes: self.shape.row_bytes(),
            region_bytes: self.shape.many_tokens * self.shape.row_bytes(),
            wire: self.shape.wire,
            ids: own + self.at.many_ids,
            counts: self.places.counts.address,
            total: self.places.rows.address,
        })
    }

    pub(super) fn combine_many(
        &self,
        gpu: &Gpu,
        tokens: &Tokens,
        results: &ManyResults,
        carry: Carry<'_>,
    ) -> Result<()> {
        let params = CombineMany {
            exchange: self.params,
            tokens: self.tokens(tokens, self.shape.many_tokens)?,
            sorted: results.sorted,
            row_of_slot: results.row_of_slot,
            hidden: results.hidden,
        };
        launch::return_many(gpu, self.shape.many_rows(), &params)?;
        carry.map_or(Ok(()), |carry| carry())?;
        launch::settle_many(gpu, &params)
    }
}

/// One kernel, or one that sends and one that receives, and the carriage between them.
fn in_phases(run: impl Fn(Phase) -> Result<()>, carry: Carry<'_>) -> Result<()> {
    let Some(carry) = carry else {
        return run(Phase::Whole);
    };
    run(Phase::Send)?;
    carry()?;
    run(Phase::Receive)
}

/// What is asked of an exchange that has no epoch.
pub(super) fn of_no_epoch() -> KernelError {
    KernelError::Unsupported("the exchange has no epoch: connect it first".into())
}
