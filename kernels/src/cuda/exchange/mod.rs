//! The exchange of experts between devices: every token's row to the ranks that own its experts, the results back.
//!
//! All of it is kernels on the backend's stream, so a layer with its exchange can be recorded in a graph; the host only
//! sets it up, reads its status and may abort it. `ipc` (this folder) writes straight into peers' memory; NCCL's
//! implementation of [`Exchange`] shares the grouping, the sums and the status.
//!
//! Contract. All ranks of an epoch call `dispatch_*` and `combine_*` once per layer and piece, in the same order and of the
//! same family, also with no tokens. Which family and how many pieces follows from the largest number of tokens that any
//! rank has in the step, which the sequencer tells every rank ([`crate::backend::Backend::begin_group`]).
//!
//! - A row travels once per destination rank, with the (local expert, weight) of each of its slots; a slot whose expert
//!   is elsewhere is marked absent. Capacity is per rank pair and counts only say how many of the places of a pair are
//!   used: a count beyond the capacity is a fault of the peer, so overflow is impossible.
//! - few (up to `few_tokens` a rank; decode): rows are F32 or BF16 inside 16-byte units of 12 bytes and a stamp; a unit is
//!   one 16-byte store, so its reader needs no flag and no fence: it polls until the stamp is the exchange's own.
//!   Received rows come out as F32 rows with `Groups`, as `route_groups` makes them, for the few-row expert kernels.
//! - many (prefill): rows are BF16 (in the order of planes, so nothing is lost: planes are BF16), or FP8 with a scale per
//!   128 values; a stamp per rank pair is stored with release after a system-wide fence. Received rows stay where
//!   they are; `sort` gathers them into the plane of sorted rows.
//!   Results of a rank that has its device to itself have a stamp per chunk of two tokens, and one kernel sends and adds.
//!   Long steps have two pieces under way ([`halves`]).
//! - Fast mode: a rank adds its slots of a token, in the order of slots, and sends one row back per (token, rank); the owner
//!   adds those in the order of ranks. Deterministic mode: F32 both ways, one row back per slot, and the owner adds them
//!   in the order of slots: bits do not depend on the placement or the number of ranks.
//!
//! One set of receive buffers is enough, without a barrier. Exchange s of a rank starts (wait_for_inputs) when its
//! combine s-1 has ended, hence after every peer has signalled in combine s-1, which each does in a kernel behind its expert
//! kernels of s-1, the last readers of what dispatch s-1 brought. So dispatch s overwrites nothing that is still read.
//! Likewise combine s starts after every peer has signalled in dispatch s, in a kernel behind its combine s-1, the last
//! reader of what combine s-1 brought. Hence every rank signals every rank in both phases, with rows or without.
//! Stamps count exchanges on the device and never repeat within an epoch; buffers are zeroed between epochs.
//!
//! Waiting. Every poll ends at its deadline (globaltimer) or when the host's abort word (pinned) is set; the first that
//! gives up writes a status that the host can read without the device, and a device word that makes all later kernels of
//! the exchange pass: no rows, no waiting, nothing sent. The graph ends, the device is usable, results are void.
//! Kernels that wait let the next kernel in only afterwards, and ranks that share a device wait with few blocks: so
//! waiting blocks never keep a peer's kernels off the device. Ranks of one device are threads of one process or
//! processes under MPS; without MPS they are time-sliced, milliseconds an exchange (`IpcExchange::describe` says).

mod carried;
mod connected;
pub mod control;
pub(crate) mod group;
mod halves;
pub mod ipc;
mod launch;
mod layout;
pub mod nccl;
pub mod peer;
mod places;
pub mod station;
pub mod trace;

use crate::backend::{KernelError, Result};
use crate::cuda::Gpu;
use crate::ops::experts::cuda::Rows;
use crate::ops::experts::many::SortParams;
use crate::ops::rmsnorm::cuda::{NormInput, NormRows};
use crate::ops::route::cuda::{Groups, RouteParams};

/// Most ranks of an epoch, and most ranks that hold the same expert.
pub const MAX_RANKS: usize = 64;
pub const MAX_REPLICAS: usize = 4;

/// How rows of the many-token family travel; results are BF16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Wire {
    #[default]
    Bf16,
    /// E4M3 with an F32 scale per 128 values.
    Fp8,
}

/// Sizes that all ranks of an epoch agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExchangeShape {
    pub ranks: usize,
    pub hidden: usize,
    pub top_k: usize,
    /// Tokens of one rank in one exchange of the few-token family: at most 128.
    pub few_tokens: usize,
    /// The same for many tokens: a multiple of 128.
    pub many_tokens: usize,
    /// Rows and results of the few-token family travel as F32, not BF16.
    pub exact: bool,
    /// Results travel per slot; only with `exact`, and only in the few-token family.
    pub deterministic: bool,
    pub wire: Wire,
}

/// This rank's tokens of one exchange.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tokens {
    /// Index of the layer's placement.
    pub(crate) layer: usize,
    /// Which piece of the step, and how many tokens this rank has in it.
    pub(crate) piece: usize,
    pub(crate) count: usize,
    /// U32 `[count, top_k]`: experts, counted over the whole model's.
    pub(crate) ids: u64,
    /// F32 `[count, top_k]`.
    pub(crate) weights: u64,
}

/// What a step is, before its exchanges.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StepSizes {
    /// The most tokens that any rank has.
    pub(crate) largest: usize,
    /// Tokens of this rank.
    pub(crate) tokens: usize,
    /// Tokens of a piece, if the step goes through the many-token family.
    pub(crate) many: Option<usize>,
}

/// What an exchange that makes the choice of experts itself starts from.
#[derive(Clone, Copy, Default)]
pub(crate) struct Choice {
    /// F32 `[count, hidden]`; 0: the norm of `norm`, of at most `INLINE_WIDTH` values, `x1` one array.
    pub(crate) normed: u64,
    pub(crate) norm: NormInput,
    /// The gate's logits, of a sigmoid; none: the choice has been made.
    pub(crate) route: RouteParams,
}

/// What came, for the expert kernels of few rows.
#[derive(Clone, Copy)]
pub(crate) struct FewRows {
    /// F32 `[ranks * few_tokens, hidden]`; `groups.row_token` points into it, `groups.row_slot` is row * top_k + slot.
    pub(crate) x: u64,
    /// What travelled.
    pub(crate) kind: Rows,
    pub(crate) groups: Groups,
    /// Most groups that there can be.
    pub(crate) most_groups: usize,
}

/// What came, for `sort` and the expert kernels of many rows.
#[derive(Clone, Copy)]
pub(crate) struct ManyRows {
    /// `[ranks][many_tokens]` rows of `row_bytes` as `wire` says; each rank's begin `region_bytes` after the one before.
    pub(crate) rows: u64,
    /// Each rank's are a plane of as many blocks as its rows take.
    pub(crate) planes: bool,
    pub(crate) row_bytes: usize,
    pub(crate) region_bytes: usize,
    pub(crate) wire: Wire,
    /// U32 `[ranks][many_tokens, top_k]`: local expert or 0xffffffff.
    pub(crate) ids: u64,
    /// I32 `[ranks]`: rows of each rank.
    pub(crate) counts: u64,
    /// I32: where the sort says how many expert rows there are; the next exchange tells the others.
    pub(crate) total: u64,
}

impl ManyRows {
    /// What `sort` is told about these rows, beside the places of its results in `to`.
    pub(crate) fn sort_params(
        &self,
        shape: &ExchangeShape,
        local_experts: usize,
        to: SortParams,
    ) -> SortParams {
        SortParams {
            ids: self.ids,
            plane: 0,
            tokens: shape.many_rows() as i32,
            experts: local_experts as i32,
            region_counts: self.counts,
            rows: self.rows,
            region: shape.many_tokens as i32,
            row_bytes: self.row_bytes as i32,
            region_bytes: self.region_bytes as u64,
            fp8: i32::from(self.wire == Wire::Fp8),
            planes: i32::from(self.planes),
            sorted_rows: self.total,
            ..to
        }
    }
}

/// Where the results of `few` rows are and where their sums go.
#[derive(Clone, Copy)]
pub(crate) struct FewResults {
    /// F32 `[ranks * few_tokens * top_k, hidden]`, at `groups.row_slot`.
    pub(crate) y: u64,
    /// As for `combine_rows`: `input.x0` and `input.sum_out` are the hidden state.
    pub(crate) norm: NormRows,
}

/// Where the results of `many` rows are and where their sums go.
#[derive(Clone, Copy)]
pub(crate) struct ManyResults {
    /// BF16 `[sorted rows, hidden]`, and U32 `[ranks][many_tokens, top_k]`: the sorted row of each slot or 0xffffffff.
    pub(crate) sorted: u64,
    pub(crate) row_of_slot: u64,
    /// F32 `[count, hidden]`, added to.
    pub(crate) hidden: u64,
}

/// Why an exchange ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub reason: FaultReason,
    /// The rank that was waited for, and how many exchanges of the epoch had been begun.
    pub peer: u32,
    pub exchange: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultReason {
    /// The peer did not signal in time, in dispatch or in combine.
    DispatchDeadline,
    CombineDeadline,
    /// The same where the host watches the time.
    Deadline,
    Aborted,
    /// The peer's count exceeds the capacity of the pair.
    Count,
}

impl Fault {
    pub(crate) fn error(&self) -> KernelError {
        let (peer, exchange) = (self.peer, self.exchange);
        let what = match self.reason {
            FaultReason::DispatchDeadline => {
                format!("rank {peer} did not send in time in exchange {exchange}")
            }
            FaultReason::CombineDeadline => {
                format!("rank {peer} did not send its results in time in exchange {exchange}")
            }
            FaultReason::Deadline => format!("rank {peer} did not come in time in exchange {exchange}"),
            FaultReason::Aborted => format!("aborted while waiting for rank {peer} in exchange {exchange}"),
            FaultReason::Count => {
                format!("rank {peer} announced more tokens than its capacity in exchange {exchange}")
            }
        };
        KernelError::Exchange { peer, what }
    }
}

/// See the head of this file. Calls queue kernels on `gpu`'s stream and never wait; they may be captured.
pub(crate) trait Exchange: Send {
    /// For the log: kind, ranks, which of them share this device and how.
    fn describe(&self) -> String;

    fn shape(&self) -> Result<&ExchangeShape>;

    /// Experts of a layer that this rank holds, at most.
    fn local_experts(&self) -> Result<usize>;

    /// Before the exchanges of a step are queued or recorded. May wait for the other ranks, no longer than the timeout.
    fn begin(&self, gpu: &Gpu, sizes: &StepSizes) -> Result<()> {
        let _ = (gpu, sizes);
        Ok(())
    }

    /// Whether steps may be recorded as graphs while peers run.
    fn recordable(&self) -> bool {
        true
    }

    /// What recorded exchanges depend on, beside their tokens: another value, another recording.
    fn recorded(&self) -> usize {
        0
    }

    /// What steps in which this rank has `tokens` tokens may be, as far as their recordings differ: for recording them before
    /// they come. Nothing: they are recorded when they come.
    fn recordings(&self, tokens: usize) -> Vec<StepSizes> {
        let _ = tokens;
        Vec::new()
    }

    /// All of a step is queued.
    fn queued(&self, gpu: &Gpu) -> Result<()> {
        let _ = gpu;
        Ok(())
    }

    /// Whether `choose_and_dispatch` is there.
    fn chooses(&self) -> bool {
        false
    }

    /// `dispatch_few` that makes the choice of experts itself, and writes it to where `tokens` looks for it.
    fn choose_and_dispatch(&self, gpu: &Gpu, tokens: &Tokens, choice: &Choice) -> Result<FewRows> {
        let _ = (gpu, tokens, choice);
        Err(KernelError::Unsupported(
            "this exchange does not choose experts".into(),
        ))
    }

    /// `normed`: F32 `[count, hidden]`.
    fn dispatch_few(&self, gpu: &Gpu, tokens: &Tokens, normed: u64) -> Result<FewRows>;

    /// hidden += the weighted results of this rank's tokens, then the norm as in `combine_rows`.
    fn combine_few(&self, gpu: &Gpu, tokens: &Tokens, results: &FewResults) -> Result<()>;

    /// Where the plane of `count` tokens, and of how many blocks, is best written for the next dispatch of many, if anywhere: it
    /// travels from there. `piece`: that of `Halves`; otherwise 0.
    fn plane(&self, piece: usize, count: usize) -> Option<(u64, usize)> {
        let _ = (piece, count);
        None
    }

    /// `plane`: of the tokens, `blocks` blocks of 8 rows.
    fn dispatch_many(&self, gpu: &Gpu, tokens: &Tokens, plane: u64, blocks: usize) -> Result<ManyRows>;

    fn combine_many(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()>;

    /// The way to have two pieces of many tokens under way at once, if there is one.
    fn halves(&self) -> Option<&dyn Halves> {
        None
    }

    /// The first fault of the epoch; reads host memory only.
    fn fault(&self) -> Option<Fault>;
}

/// `dispatch_many` and `combine_many` in two halves, between which the stream does other work. Pieces of odd and of even number
/// may be under way at once; all ranks call the same in the same order. Calls queue work and never wait.
pub(crate) trait Halves {
    /// What `tokens` and `plane` point to may be written again when the call's work on the stream has ended.
    fn start_dispatch(&self, gpu: &Gpu, tokens: &Tokens, plane: (u64, usize)) -> Result<()>;
    fn finish_dispatch(&self, gpu: &Gpu, tokens: &Tokens) -> Result<ManyRows>;
    /// Likewise what `results` points to, but for `hidden`, which `finish_combine` adds to.
    fn start_combine(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()>;
    fn finish_combine(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()>;
}
