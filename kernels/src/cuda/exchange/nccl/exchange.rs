//! The exchange over NCCL: the kernels of this folder write what is for other ranks into a staging area of this device,
//! the library carries it to the same places of their areas, and the kernels take it from there.
//!
//! low_latency (few tokens): every pair of ranks carries as many tokens as the largest rank has, rounded up to a power of
//! two, so that sizes are the same for all and are recorded with the graph. high_throughput (many tokens): the ranks
//! tell each other how many tokens they have, once a step, and carry just those. Must stay true: all ranks carry the
//! same stretches in the same order; what a rank is told by a peer is checked against the capacity before it is used.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::watch::Watch;
use super::{Communicator, Nccl, UniqueId, Until};
use crate::backend::{KernelError, Result};
use crate::cuda::exchange::connected::{Connected, of_no_epoch};
use crate::cuda::exchange::control::Control;
use crate::cuda::exchange::ipc::Epoch;
use crate::cuda::exchange::layout::{Area, Carried};
use crate::cuda::exchange::{
    Exchange, ExchangeShape, Fault, FewResults, FewRows, MAX_RANKS, ManyResults, ManyRows, StepSizes, Tokens,
};
use crate::cuda::{Gpu, Memory, as_bytes, shape};

/// Joining: the library may have to be loaded and the network looked at, and peers come when they come.
const JOIN_WITHIN: Duration = Duration::from_secs(10);
/// How long the device may take to leave an exchange that was ended.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);

pub(crate) struct NcclExchange {
    own: Memory,
    staging: Memory,
    /// Tokens of each rank in the step, as they tell each other: U64.
    tally: Memory,
    control: Control,
    live: Option<Live>,
}

/// An epoch.
struct Live {
    connected: Connected,
    communicator: Arc<Communicator>,
    watch: Watch,
    timeout: Duration,
    step: Cell<Step>,
    /// Tokens of each rank in a step of many tokens.
    counts: RefCell<Vec<usize>>,
}

/// What is fixed for a step.
#[derive(Clone, Copy)]
struct Step {
    /// Tokens that each pair of ranks carries in an exchange of few.
    few: usize,
    /// Tokens of a piece of many.
    each: usize,
}

impl NcclExchange {
    /// Buffers for epochs of shapes that need at most `bytes` ([`ExchangeShape::staged_bytes`]).
    pub(crate) fn new(gpu: &Gpu, bytes: usize) -> Result<NcclExchange> {
        Nccl::open()?;
        Ok(NcclExchange {
            own: gpu.alloc(bytes, "receive buffers of the exchange")?,
            staging: gpu.alloc(bytes, "staging buffers of the exchange")?,
            tally: gpu.alloc(MAX_RANKS * 8, "an exchange")?,
            control: Control::new(&gpu.device)?,
            live: None,
        })
    }

    /// Of the receive buffers.
    pub(crate) fn bytes(&self) -> usize {
        self.own.bytes
    }

    pub(crate) fn control(&self) -> Control {
        self.control.clone()
    }

    /// Leaves the epoch before and joins the communicator of `id` with all ranks of the new one. Gives up when
    /// `cancelled`, or after ten seconds.
    pub(crate) fn connect(
        &mut self,
        gpu: &Gpu,
        epoch: &Epoch<'_>,
        id: UniqueId,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<()> {
        const OP: &str = "exchange";
        let sizes = epoch.shape;
        sizes.check()?;
        if epoch.placement.ranks as usize != sizes.ranks || epoch.rank >= sizes.ranks {
            return Err(shape(OP, "ranks", epoch.placement.ranks, sizes.ranks));
        }
        let (_, bytes) = Area::new(&sizes, true);
        if self.own.bytes < bytes {
            return Err(shape(OP, "bytes of this rank's buffers", self.own.bytes, bytes));
        }
        gpu.device.enter()?;
        self.leave(gpu)?;
        let nccl = Nccl::open()?;
        let until = Until {
            deadline: Instant::now() + JOIN_WITHIN,
            cancelled,
        };
        let place = (epoch.rank as u32, sizes.ranks as u32);
        let joined = Communicator::connect(nccl, &gpu.device, id, place, false, until);
        let communicator = Arc::new(joined.map_err(|error| of_the_epoch(place, error))?);
        let mut area = [0; MAX_RANKS];
        area[..sizes.ranks].fill(self.staging.address);
        area[epoch.rank] = self.own.address;
        let connected = Connected::new(gpu, epoch, area, (self.control.address(), true, 1), None)?;
        // Old stamps must not be carried, nor be found here.
        self.own.clear(&gpu.device, &gpu.stream, bytes)?;
        self.staging.clear(&gpu.device, &gpu.stream, bytes)?;
        gpu.stream.wait(&gpu.device)?;
        self.control.clear();
        self.control.set_communicator(Some(Arc::clone(&communicator)));
        let live = Live {
            watch: Watch::new(self.control.clone(), JOIN_WITHIN)?,
            connected,
            communicator,
            timeout: epoch.timeout,
            step: Cell::new(Step {
                few: sizes.few_tokens,
                each: sizes.many_tokens,
            }),
            counts: RefCell::new(vec![sizes.many_tokens; sizes.ranks]),
        };
        // The first operation connects the pairs; it must not happen while a step is recorded.
        self.agree(gpu, &live, 0, until)?;
        live.watch.set_timeout(epoch.timeout);
        self.live = Some(live);
        Ok(())
    }

    /// Ends the epoch here, whatever its exchanges wait for.
    pub(crate) fn leave(&mut self, gpu: &Gpu) -> Result<()> {
        let Some(live) = self.live.take() else {
            return Ok(());
        };
        self.control.abort();
        self.control.set_communicator(None);
        drop(live);
        let deadline = Instant::now() + LEAVE_WITHIN;
        while !gpu.stream.is_idle(&gpu.device)? {
            if Instant::now() > deadline {
                return Err(gpu.device.error(format!(
                    "the exchange was ended, but its kernels were still running {} s later",
                    LEAVE_WITHIN.as_secs()
                )));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    fn live(&self) -> Result<&Live> {
        self.live.as_ref().ok_or_else(of_no_epoch)
    }

    pub(crate) fn set_timeout(&self, gpu: &Gpu, timeout: Duration) -> Result<()> {
        let live = self.live()?;
        live.watch.set_timeout(timeout);
        let nanoseconds = timeout.as_nanos().try_into().unwrap_or(u64::MAX);
        live.connected.places.set_timeout(gpu, nanoseconds)
    }

    /// Carries `to(r)` from the staging area and takes in `from(r)`, for every other rank r.
    fn carry<const N: usize>(
        &self,
        gpu: &Gpu,
        live: &Live,
        to: impl Fn(u32) -> [Carried; N],
        from: impl Fn(u32) -> [Carried; N],
    ) -> Result<()> {
        let Communicator { rank, ranks, .. } = *live.communicator;
        if ranks == 1 {
            return Ok(());
        }
        let grouped = live.communicator.group(self.until(live), |group| {
            for distance in 1..ranks {
                let (next, last) = ((rank + distance) % ranks, (rank + ranks - distance) % ranks);
                for stretch in to(next) {
                    // SAFETY: inside the staging area, which the stream's kernels alone write; it lives as long.
                    unsafe {
                        group.send(
                            self.staging.address + stretch.of(next),
                            stretch.bytes,
                            next,
                            &gpu.stream,
                        )?
                    };
                }
                for stretch in from(last) {
                    // SAFETY: inside this rank's area, likewise.
                    unsafe {
                        group.recv(
                            self.own.address + stretch.of(last),
                            stretch.bytes,
                            last,
                            &gpu.stream,
                        )?
                    };
                }
            }
            Ok(())
        });
        grouped.map_err(|error| of_the_epoch((rank, ranks), error))
    }

    fn until<'a>(&self, live: &Live) -> Until<'a> {
        Until {
            deadline: Instant::now() + live.timeout,
            cancelled: &|| false,
        }
    }

    /// Every rank's `tokens`.
    fn agree(&self, gpu: &Gpu, live: &Live, tokens: usize, until: Until<'_>) -> Result<Vec<u64>> {
        let Communicator { rank, ranks, .. } = *live.communicator;
        let at = |rank: u32| self.tally.address + u64::from(rank) * 8;
        gpu.write(&self.tally, rank as usize * 8, as_bytes(&[tokens as u64]))?;
        if ranks > 1 {
            let grouped = live.communicator.group(until, |group| {
                for peer in (0..ranks).filter(|peer| *peer != rank) {
                    // SAFETY: one word of the tally each; the stream is waited for below.
                    unsafe {
                        group.send(at(rank), 8, peer, &gpu.stream)?;
                        group.recv(at(peer), 8, peer, &gpu.stream)?;
                    }
                }
                Ok(())
            });
            grouped.map_err(|error| of_the_epoch((rank, ranks), error))?;
        }
        let mark = live.watch.mark(gpu)?;
        while self.control.done() < mark {
            if self.control.is_aborted() {
                return Err(Self::ended(live));
            }
            if (until.cancelled)() || Instant::now() > until.deadline {
                self.control.expire();
                return Err(Self::ended(live));
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        let mut words = vec![0u64; ranks as usize];
        let mut bytes = vec![0; words.len() * 8];
        gpu.read(&self.tally, 0, &mut bytes)?;
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Ok(words)
    }

    /// Why a wait of the host for all ranks ended early.
    fn ended(live: &Live) -> KernelError {
        let Communicator { rank, ranks, .. } = *live.communicator;
        KernelError::Exchange {
            peer: other((rank, ranks)),
            what: "not all ranks met in time before a step".into(),
        }
    }
}

/// Who is to blame when the library does not say: with one peer it was that, else nobody knows.
fn other((rank, ranks): (u32, u32)) -> u32 {
    if ranks == 2 { 1 - rank } else { u32::MAX }
}

/// The library's errors end the epoch; the device is well, or its next call says otherwise.
fn of_the_epoch(place: (u32, u32), error: KernelError) -> KernelError {
    match error {
        KernelError::Device { what, .. } => KernelError::Exchange {
            peer: other(place),
            what,
        },
        error => error,
    }
}

impl Live {
    /// Tokens of `rank` in the piece.
    fn tokens_of(&self, rank: u32, piece: usize) -> usize {
        let each = self.step.get().each;
        let counts = self.counts.borrow();
        let total = counts.get(rank as usize).copied().unwrap_or(0);
        total.saturating_sub(piece * each).min(each)
    }
}

impl Exchange for NcclExchange {
    fn describe(&self) -> String {
        let version = Nccl::open().map_or("?".into(), |nccl| nccl.version.to_string());
        match &self.live {
            None => format!("nccl {version} (not connected)"),
            Some(live) => format!(
                "nccl {version} (rank {} of {})",
                live.communicator.rank, live.communicator.ranks
            ),
        }
    }

    fn shape(&self) -> Result<&ExchangeShape> {
        Ok(&self.live()?.connected.shape)
    }

    fn local_experts(&self) -> Result<usize> {
        Ok(self.live()?.connected.places.local_experts)
    }

    fn begin(&self, gpu: &Gpu, sizes: &StepSizes) -> Result<()> {
        let live = self.live()?;
        let sized = &live.connected.shape;
        let few = sizes.largest.max(1).next_power_of_two().min(sized.few_tokens);
        let each = sizes.many.unwrap_or(sized.many_tokens);
        live.step.set(Step { few, each });
        if sizes.many.is_none() {
            return Ok(());
        }
        let counts = self.agree(gpu, live, sizes.tokens, self.until(live))?;
        let mut kept = live.counts.borrow_mut();
        for ((peer, count), kept) in (0u32..).zip(counts).zip(kept.iter_mut()) {
            if count > sizes.largest as u64 {
                return Err(KernelError::Exchange {
                    peer,
                    what: format!(
                        "rank {peer} has {count} tokens, the largest has {}",
                        sizes.largest
                    ),
                });
            }
            *kept = count as usize;
        }
        Ok(())
    }

    fn recorded(&self) -> usize {
        self.live.as_ref().map_or(0, |live| live.step.get().few)
    }

    fn queued(&self, gpu: &Gpu) -> Result<()> {
        self.live()?.watch.mark(gpu).map(|_| ())
    }

    fn dispatch_few(&self, gpu: &Gpu, tokens: &Tokens, normed: u64) -> Result<FewRows> {
        let live = self.live()?;
        let (at, shape, few) = (&live.connected.at, &live.connected.shape, live.step.get().few);
        let carry = || {
            let stretches = |_| at.dispatch_few(shape, few);
            self.carry(gpu, live, stretches, stretches)
        };
        live.fits(tokens, few)?;
        live.connected.dispatch_few(gpu, tokens, normed, Some(&carry))
    }

    fn combine_few(&self, gpu: &Gpu, tokens: &Tokens, results: &FewResults) -> Result<()> {
        let live = self.live()?;
        let (at, shape, few) = (&live.connected.at, &live.connected.shape, live.step.get().few);
        let carry = || {
            let stretches = |_| at.combine_few(shape, few);
            self.carry(gpu, live, stretches, stretches)
        };
        live.fits(tokens, few)?;
        live.connected.combine_few(gpu, tokens, results, Some(&carry))
    }

    fn dispatch_many(&self, gpu: &Gpu, tokens: &Tokens, plane: u64, blocks: usize) -> Result<ManyRows> {
        let live = self.live()?;
        let (at, shape, piece) = (&live.connected.at, &live.connected.shape, tokens.piece);
        let own = live.tokens_of(live.communicator.rank, piece);
        let carry = || {
            let to = |_| at.dispatch_many(shape, own);
            self.carry(gpu, live, to, |rank| {
                at.dispatch_many(shape, live.tokens_of(rank, piece))
            })
        };
        live.fits(tokens, own)?;
        live.connected
            .dispatch_many(gpu, tokens, (plane, blocks), Some(&carry))
    }

    fn combine_many(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()> {
        let live = self.live()?;
        let (at, shape, piece) = (&live.connected.at, &live.connected.shape, tokens.piece);
        let own = live.tokens_of(live.communicator.rank, piece);
        let carry = || {
            let from = |_| at.combine_many(shape, own);
            self.carry(
                gpu,
                live,
                |rank| at.combine_many(shape, live.tokens_of(rank, piece)),
                from,
            )
        };
        live.connected.combine_many(gpu, tokens, results, Some(&carry))?;
        // A long step is watched layer by layer.
        if gpu.stream.is_capturing(&gpu.device)? {
            return Ok(());
        }
        live.watch.mark(gpu).map(|_| ())
    }

    fn fault(&self) -> Option<Fault> {
        self.control.fault()
    }
}

impl Live {
    fn fits(&self, tokens: &Tokens, most: usize) -> Result<()> {
        match tokens.count {
            count if count <= most => Ok(()),
            count => Err(shape(
                "exchange",
                "tokens",
                count,
                format!("at most {most}, as the step began"),
            )),
        }
    }
}
