//! Few tokens over NCCL: every message has room for as many rows as the step's largest rank has, so that its size is recorded
//! with the graph. To ranks of this host all but its head is written straight, as of many tokens, and so are results.

use super::epoch::Live;
use super::launch;
use super::messages::{ArriveFew, ChooseFew, HEAD, Messages, PackFew, ReturnFew, SumFew, carried};
use crate::backend::Result;
use crate::cuda::Gpu;
use crate::cuda::exchange::layout::{ExchangeParams, GroupRows};
use crate::cuda::exchange::{Choice, FewResults, FewRows, Tokens};
use crate::cuda::shape;
use crate::ops::linear::cuda::INLINE_WIDTH;
use crate::ops::route::cuda::{PackBeside, RouteTokens, max_groups, route};

impl Live {
    /// Of `few` rows, written straight wherever that reaches.
    fn messages(&self, few: usize) -> Messages {
        let mut messages = self.places.few(few);
        messages.straight = self.straight;
        messages
    }

    /// What the choice of experts is to write beside its own work.
    fn pack(&self, tokens: &Tokens, normed: u64) -> Result<PackBeside> {
        let (shape, few) = (&self.connected.shape, self.step.get().few);
        self.fits(tokens, few)?;
        let message = self.places.message(self.communicator.rank);
        let (ids, weights) = self.places.sizes.few_slots(few);
        Ok(PackBeside {
            normed,
            rows: message + HEAD as u64,
            ids: message + ids as u64,
            weights: message + weights as u64,
            head: message,
            load: self.connected.places.rows.address,
            begun: self.connected.places.state.address,
            at_peers: self.at_peers,
            straight: self.straight,
            row_bytes: self.places.sizes.few_row as i32,
            hidden: shape.hidden as i32,
            exact: i32::from(shape.exact),
        })
    }

    pub(super) fn dispatch_few(&self, gpu: &Gpu, tokens: &Tokens, normed: u64) -> Result<FewRows> {
        let (connected, few) = (&self.connected, self.step.get().few);
        self.fits(tokens, few)?;
        let pack = PackFew {
            exchange: self.of_few(few),
            messages: self.messages(few),
            tokens: connected.tokens(tokens, few)?,
            normed,
            rows: connected.places.rows.address,
        };
        launch::pack_few(gpu, connected.shape.exact, &pack)?;
        self.carry_few(gpu, tokens)
    }

    /// The same where experts are still to be chosen: by a kernel that packs as well.
    pub(super) fn choose_and_dispatch(&self, gpu: &Gpu, tokens: &Tokens, choice: &Choice) -> Result<FewRows> {
        let (connected, few) = (&self.connected, self.step.get().few);
        self.fits(tokens, few)?;
        if choice.normed != 0 {
            let params = RouteTokens {
                route: choice.route,
                ids: tokens.ids,
                weights: tokens.weights,
                pack: self.pack(tokens, choice.normed)?,
                ..RouteTokens::default()
            };
            route(gpu, &params)?;
            return self.carry_few(gpu, tokens);
        }
        let hidden = connected.shape.hidden;
        if choice.norm.x0 == 0 || choice.norm.more > 1 || hidden > INLINE_WIDTH {
            let wanted = format!("rows, or a norm of at most {INLINE_WIDTH} values");
            return Err(shape("exchange", "input", hidden, wanted));
        }
        let params = ChooseFew {
            exchange: self.of_few(few),
            messages: self.messages(few),
            route: choice.route,
            ids: tokens.ids,
            weights: tokens.weights,
            norm: choice.norm,
            rows: connected.places.rows.address,
        };
        launch::choose_few(gpu, connected.shape.exact, &params)?;
        self.carry_few(gpu, tokens)
    }

    /// This rank's message is written: to all others, and theirs as rows for the experts here.
    fn carry_few(&self, gpu: &Gpu, tokens: &Tokens) -> Result<FewRows> {
        let (connected, few, rank) = (&self.connected, self.step.get().few, self.communicator.rank);
        let (exact, messages) = (connected.shape.exact, self.messages(few));
        let all = self.places.sizes.few_bytes(few);
        let bytes = |peer| carried(messages.straight, peer, all);
        let to = |peer| (self.places.message(rank), bytes(peer));
        let from = |peer| (self.places.message(peer), bytes(peer));
        self.carry(&gpu.stream, to, from)?;
        let arrive = ArriveFew {
            exchange: self.of_few(few),
            messages,
            x: connected.places.x.address,
            group: GroupRows {
                // An odd number, so that experts' words lie in different banks.
                words: (connected.shape.ranks * few).div_ceil(32) as i32 | 1,
                ..connected.group_rows()
            },
            layer: tokens.layer as i32,
        };
        launch::arrive_few(gpu, exact, &arrive)?;
        let slots = connected.shape.ranks * few * connected.shape.top_k;
        Ok(FewRows {
            most_groups: max_groups(slots, connected.places.local_experts),
            ..connected.few_rows()
        })
    }

    /// The kernels' parameters where each rank has at most `few` tokens: rows that came are counted by that many a rank.
    fn of_few(&self, few: usize) -> ExchangeParams {
        ExchangeParams {
            few_tokens: few as i32,
            ..self.connected.params
        }
    }

    pub(super) fn combine_few(&self, gpu: &Gpu, tokens: &Tokens, results: &FewResults) -> Result<()> {
        let (connected, few) = (&self.connected, self.step.get().few);
        let (exact, messages) = (connected.shape.exact, self.messages(few));
        self.fits(tokens, few)?;
        let exchange = self.of_few(few);
        let back = ReturnFew {
            exchange,
            messages,
            y: results.y,
        };
        launch::return_few(gpu, exact, &back)?;
        let all = self.places.sizes.few_back_bytes(few);
        let bytes = |rank| carried(messages.straight, rank, all);
        let to = |rank| (self.places.results_for(rank), bytes(rank));
        let from = |rank| (self.places.results_of(rank), bytes(rank));
        self.carry(&gpu.stream, to, from)?;
        let sum = SumFew {
            exchange,
            messages,
            tokens: connected.tokens(tokens, few)?,
            norm: results.norm,
        };
        launch::sum_few(gpu, exact, &sum)
    }
}
