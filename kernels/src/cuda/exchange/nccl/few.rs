//! Few tokens over NCCL: every message has room for as many rows as the step's largest rank has, so that its size is recorded
//! with the graph.

use super::epoch::Live;
use super::launch;
use super::messages::{ArriveFew, HEAD, PackFew, ReturnFew, SumFew};
use crate::backend::Result;
use crate::cuda::Gpu;
use crate::cuda::exchange::{FewResults, FewRows, Tokens};
use crate::ops::route::cuda::PackBeside;

impl Live {
    /// What the choice of experts is to write beside its own work.
    pub(super) fn pack(&self, tokens: &Tokens, normed: u64) -> Result<PackBeside> {
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
            row_bytes: self.places.sizes.few_row as i32,
            hidden: shape.hidden as i32,
            exact: i32::from(shape.exact),
        })
    }

    pub(super) fn dispatch_few(&self, gpu: &Gpu, tokens: &Tokens, normed: u64) -> Result<FewRows> {
        let (connected, few, rank) = (&self.connected, self.step.get().few, self.communicator.rank);
        self.fits(tokens, few)?;
        let (exact, messages) = (connected.shape.exact, self.places.few(few));
        let pack = PackFew {
            exchange: connected.params,
            messages,
            tokens: connected.tokens(tokens, few)?,
            normed,
            rows: connected.places.rows.address,
        };
        if !tokens.packed {
            launch::pack_few(gpu, exact, &pack)?;
        }
        let bytes = self.places.sizes.few_bytes(few);
        let message = |rank| (self.places.message(rank), bytes);
        self.carry(&gpu.stream, |_| message(rank), message)?;
        let arrive = ArriveFew {
            exchange: connected.params,
            messages,
            x: connected.places.x.address,
            group: connected.group_rows(),
            layer: tokens.layer as i32,
        };
        launch::arrive_few(gpu, exact, &arrive)?;
        Ok(connected.few_rows())
    }

    pub(super) fn combine_few(&self, gpu: &Gpu, tokens: &Tokens, results: &FewResults) -> Result<()> {
        let (connected, few) = (&self.connected, self.step.get().few);
        let (exact, messages) = (connected.shape.exact, self.places.few(few));
        self.fits(tokens, few)?;
        let back = ReturnFew {
            exchange: connected.params,
            messages,
            y: results.y,
        };
        launch::return_few(gpu, exact, &back)?;
        let bytes = self.places.sizes.few_back_bytes(few);
        let to = |rank| (self.places.results_for(rank), bytes);
        self.carry(&gpu.stream, to, |rank| (self.places.results_of(rank), bytes))?;
        let sum = SumFew {
            exchange: connected.params,
            messages,
            tokens: connected.tokens(tokens, few)?,
            norm: results.norm,
        };
        launch::sum_few(gpu, exact, &sum)
    }
}
