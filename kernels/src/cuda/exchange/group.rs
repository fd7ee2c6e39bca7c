//! The backend's place in a group of ranks: buffers, epochs, and what a step means for all ranks together.

use super::control::Control;
use super::ipc::{Epoch, IpcExchange};
use super::nccl::{NcclExchange, UniqueId, topology};
use super::peer::PeerHandle;
use super::{Exchange, ExchangeShape, StepSizes};
use crate::backend::{KernelError, Result};
use crate::cuda::forward::Forward;
use crate::cuda::step::FEW_TOKENS;
use crate::cuda::{CudaBackend, shape};

/// What a backend knows of its group.
#[derive(Default)]
pub(crate) struct Group {
    ipc: Option<IpcExchange>,
    nccl: Option<NcclExchange>,
    /// Most tokens that any rank has in the step.
    largest: usize,
}

/// What the largest of `shapes` needs of either buffer.
pub(super) fn most_bytes(shapes: &[ExchangeShape]) -> (usize, usize) {
    let all = shapes.iter().map(ExchangeShape::message_bytes);
    all.fold((0, 0), |most, one| (most.0.max(one.0), most.1.max(one.1)))
}

/// How a step is exchanged, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Pieces of so many tokens, through the few-token family.
    Few { tokens: usize, pieces: usize },
    /// The same through the many-token family, piece by piece within each layer.
    Many { tokens: usize, pieces: usize },
}

/// Pieces of which two are under way at once have at least so many tokens: smaller ones read the weights too often.
pub(crate) const HALF_TOKENS: usize = 1024;

/// Rows of an expert, in the mean and at most, up to which the few-token kernels serve it: they read its weights once for every
/// eight. 512 tokens over four H100, 16 rows: 1,042 us a layer for a floor of 337.
const MOST_MEAN_ROWS: usize = 10;

impl Cut {
    /// `experts`: of a layer, 0 if steps of many tokens are not wanted where few do; `halves`: two pieces may be under way at
    /// once.
    fn new(shape: &ExchangeShape, largest: usize, experts: usize, halves: bool) -> Cut {
        let pieces = |tokens: usize| largest.div_ceil(tokens).max(1);
        let crowded = experts > 0 && largest * shape.ranks * shape.top_k > MOST_MEAN_ROWS * experts;
        if shape.deterministic || largest <= shape.few_tokens && !(crowded && shape.many_tokens > 0) {
            let tokens = shape.few_tokens;
            return Cut::Few {
                tokens,
                pieces: pieces(tokens),
            };
        }
        let mut tokens = shape.many_tokens;
        let even = pieces(tokens).next_multiple_of(2);
        if halves && largest >= even * HALF_TOKENS {
            tokens = largest.div_ceil(even).next_multiple_of(128).min(tokens);
        }
        Cut::Many {
            tokens,
            pieces: pieces(tokens),
        }
    }
}

impl CudaBackend {
    /// Receive buffers for an epoch of a shape no larger than `most`: those of the epoch before, unless they are smaller. The handle is for
    /// authenticated peers only.
    pub fn offer_ipc(&mut self, most: &ExchangeShape) -> Result<PeerHandle> {
        self.gpu.device.enter()?;
        most.check()?;
        if let Some(ipc) = self.group.ipc.as_mut().filter(|ipc| ipc.holds(most)) {
            return Ok(ipc.offer());
        }
        let ipc = IpcExchange::new(&self.gpu, std::slice::from_ref(most))?;
        Ok(self.group.ipc.insert(ipc).offer())
    }

    /// Leaves the epoch before, if any, and enters another with `peers[rank]`; see [`IpcExchange::connect`]. No rank may
    /// run a step before all have connected.
    pub fn connect_ipc(&mut self, epoch: &Epoch<'_>, peers: &[PeerHandle]) -> Result<()> {
        self.check_epoch(epoch)?;
        if let Some(nccl) = &mut self.group.nccl {
            nccl.leave(&self.gpu)?;
        }
        let Some(ipc) = &mut self.group.ipc else {
            return Err(KernelError::Unsupported("connect_ipc without offer_ipc".into()));
        };
        ipc.connect(&self.gpu, epoch, peers)?;
        self.reset_forward()
    }

    /// Whether buffers for NCCL are open that do for epochs of `shapes`.
    pub fn nccl_holds(&self, shapes: &[ExchangeShape]) -> bool {
        let nccl = self.group.nccl.as_ref();
        nccl.is_some_and(|nccl| nccl.holds(most_bytes(shapes)))
    }

    /// Buffers for epochs over NCCL of `shapes`, once.
    pub fn open_nccl(&mut self, shapes: &[ExchangeShape]) -> Result<()> {
        self.gpu.device.enter()?;
        shapes.iter().try_for_each(ExchangeShape::check)?;
        self.group.nccl = Some(NcclExchange::new(&self.gpu, most_bytes(shapes))?);
        Ok(())
    }

    /// Leaves the epoch before, if any, and enters another by the communicator of `id`, with all of its ranks.
    pub fn connect_nccl(
        &mut self,
        epoch: &Epoch<'_>,
        id: UniqueId,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<()> {
        self.check_epoch(epoch)?;
        if let Some(ipc) = &mut self.group.ipc {
            ipc.leave(&self.gpu)?;
        }
        let Some(nccl) = &mut self.group.nccl else {
            return Err(KernelError::Unsupported("connect_nccl without open_nccl".into()));
        };
        // The next communicator finds the memory of the one before free. Who goes on without one does not wait for that: an abort
        // takes the library up to half a second.
        nccl.settle();
        nccl.connect(&self.gpu, epoch, id, cancelled)?;
        self.reset_forward()
    }

    /// Leaves the epoch: steps need all experts here from now on.
    pub fn leave_exchange(&mut self) -> Result<()> {
        if self.exchange().is_none() {
            return Ok(());
        }
        self.gpu.device.enter()?;
        if let Some(ipc) = &mut self.group.ipc {
            ipc.leave(&self.gpu)?;
        }
        if let Some(nccl) = &mut self.group.nccl {
            nccl.leave(&self.gpu)?;
        }
        self.reset_forward()
    }

    /// How this device is linked to the others of its host.
    pub fn describe_links(&self) -> Result<String> {
        topology::describe(&self.gpu.device)
    }

    fn check_epoch(&self, epoch: &Epoch<'_>) -> Result<()> {
        const OP: &str = "exchange";
        if epoch.shape.deterministic != self.deterministic {
            return Err(shape(
                OP,
                "deterministic",
                epoch.shape.deterministic,
                self.deterministic,
            ));
        }
        if !epoch.shape.deterministic && epoch.shape.many_tokens == 0 {
            return Err(shape(OP, "many_tokens", 0, "128 or more"));
        }
        Ok(())
    }

    /// Status and abort, for any thread.
    pub fn exchange_control(&self) -> Option<Control> {
        let nccl = self.group.nccl.as_ref().filter(|nccl| nccl.shape().is_ok());
        nccl.map(NcclExchange::control)
            .or_else(|| self.group.ipc.as_ref().map(IpcExchange::control))
    }

    /// `ipc (rank 0 of 2, 1 on this device alone on its device)`.
    pub fn describe_exchange(&self) -> Option<String> {
        self.exchange().map(Exchange::describe)
    }

    pub(crate) fn exchange(&self) -> Option<&dyn Exchange> {
        let ipc = self.group.ipc.as_ref().map(|ipc| ipc as &dyn Exchange);
        let nccl = self.group.nccl.as_ref().map(|nccl| nccl as &dyn Exchange);
        let mut all = ipc.into_iter().chain(nccl);
        all.find(|exchange| exchange.shape().is_ok())
    }

    pub(crate) fn set_group_tokens(&mut self, largest: usize) {
        self.group.largest = largest;
    }

    /// How the step is exchanged, which begins here; `None`: no exchange.
    pub(crate) fn cut(&self, tokens: usize) -> Result<Option<Cut>> {
        let Some(exchange) = self.exchange() else {
            return Ok(None);
        };
        let largest = self.group.largest;
        if tokens > largest {
            return Err(shape(
                "begin_group",
                "largest number of tokens",
                largest,
                format!("at least {tokens}"),
            ));
        }
        let has_many = self.limits.max_tokens > FEW_TOKENS;
        let experts = self.forward.as_ref().filter(|_| has_many);
        let experts = experts.map_or(0, Forward::experts);
        let cut = Cut::new(exchange.shape()?, largest, experts, exchange.halves().is_some());
        let many = match cut {
            Cut::Few { .. } => None,
            Cut::Many { tokens, .. } => Some(tokens),
        };
        exchange.begin(
            &self.gpu,
            &StepSizes {
                largest,
                tokens,
                many,
            },
        )?;
        Ok(Some(cut))
    }

    /// An error once the epoch has failed: what the device computed since is void.
    pub(crate) fn check_exchange(&self) -> Result<()> {
        match self.exchange().and_then(Exchange::fault) {
            Some(fault) => Err(fault.error()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_step_is_cut_into_pairs_of_pieces_that_are_worth_it() {
        let shape = ExchangeShape::new(2, 3072, 8, 8192, false);
        for (largest, tokens, pieces) in [
            (2000, 4096, 1),
            (2048, 1024, 2),
            (4096, 2048, 2),
            (5000, 2560, 2),
            (8192, 4096, 2),
            (8193, 2176, 4),
        ] {
            assert_eq!(Cut::new(&shape, largest, 256, true), Cut::Many { tokens, pieces });
        }
    }

    #[test]
    fn experts_of_many_rows_are_served_by_the_kernels_of_many_tokens() {
        for (ranks, largest, many) in [
            (2, 128, false),
            (4, 64, false),
            (4, 80, false),
            (4, 81, true),
            (4, 128, true),
        ] {
            let shape = ExchangeShape::new(ranks, 3072, 8, 8192, false);
            let cut = Cut::new(&shape, largest, 256, true);
            assert_eq!(
                matches!(cut, Cut::Many { pieces: 1, .. }),
                many,
                "{ranks} ranks, {largest}: {cut:?}"
            );
            let exact = ExchangeShape::new(ranks, 3072, 8, 8192, true);
            assert!(matches!(Cut::new(&exact, largest, 256, true), Cut::Few { .. }));
        }
    }

    #[test]
    fn every_rank_cuts_a_step_alike() {
        let fast = ExchangeShape::new(4, 3072, 8, 8192, false);
        let exact = ExchangeShape::new(4, 3072, 8, 8192, true);
        assert_eq!((fast.few_tokens, fast.many_tokens), (128, 2048));
        for (shape, largest, cut) in [
            (
                fast,
                0,
                Cut::Few {
                    tokens: 128,
                    pieces: 1,
                },
            ),
            (
                fast,
                128,
                Cut::Few {
                    tokens: 128,
                    pieces: 1,
                },
            ),
            (
                fast,
                129,
                Cut::Many {
                    tokens: 2048,
                    pieces: 1,
                },
            ),
            (
                fast,
                2049,
                Cut::Many {
                    tokens: 2048,
                    pieces: 2,
                },
            ),
            (
                exact,
                300,
                Cut::Few {
                    tokens: 128,
                    pieces: 3,
                },
            ),
        ] {
            assert_eq!(Cut::new(&shape, largest, 0, false), cut);
        }
    }
}
