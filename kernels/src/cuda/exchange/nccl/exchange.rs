//! The exchange over NCCL: this rank writes one message for all others, the library carries it, and kernels make of all
//! ranks' messages what is to be done here; results go back the same way, one piece to each rank.
//!
//! low_latency (few tokens): every message has room for as many tokens as the largest rank has, rounded up to a power of
//! two, so that sizes are the same for all and are recorded with the graph. high_throughput (many tokens): the ranks
//! tell each other how many tokens they have, once a step, and carry just those. Must stay true: all ranks carry the
//! same sizes in the same order; what a rank is told by a peer is checked against the capacity before it is used.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::messages::{
    ArriveFew, ArriveMany, HEAD, PackFew, PackMany, Places, ReturnFew, ReturnMany, Sizes, SumFew, SumMany,
};
use super::watch::Watch;
use super::{ABORT_WAIT, Communicator, Nccl, UniqueId, Until, launch};
use crate::backend::{KernelError, Result};
use crate::cuda::exchange::connected::{Connected, of_no_epoch};
use crate::cuda::exchange::control::Control;
use crate::cuda::exchange::ipc::Epoch;
use crate::cuda::exchange::places::Places as Kept;
use crate::cuda::exchange::{
    Exchange, ExchangeShape, Fault, FewResults, FewRows, MAX_RANKS, ManyResults, ManyRows, StepSizes, Tokens,
    Wire,
};
use crate::cuda::format::padded;
use crate::cuda::{Gpu, Memory, as_bytes, shape};
use crate::ops::route::cuda::PackBeside;

/// Joining: the library may have to be loaded and the network looked at, and peers come when they come.
const JOIN_WITHIN: Duration = Duration::from_secs(10);
/// How long the device may take to leave an exchange that was ended.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);

pub(crate) struct NcclExchange {
    /// Messages and results.
    messages: Memory,
    /// Which slots of many tokens are for experts here: U32 `[ranks][many_tokens, top_k]`.
    local: Memory,
    /// Tokens of each rank in the step, as they tell each other: U64.
    tally: Memory,
    control: Control,
    live: Option<Box<Live>>,
    /// What an epoch before needed.
    kept: Option<Kept>,
    /// Its communicator, whose end has begun.
    former: Option<Arc<Communicator>>,
}

/// An epoch.
struct Live {
    connected: Connected,
    places: Places,
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
    /// Buffers for epochs of shapes that need at most `most` ([`ExchangeShape::message_bytes`]).
    pub(crate) fn new(gpu: &Gpu, most: (usize, usize)) -> Result<NcclExchange> {
        Nccl::open()?;
        Ok(NcclExchange {
            messages: gpu.alloc(most.0, "messages of the exchange")?,
            local: gpu.alloc(most.1.max(4), "slots of the exchange")?,
            tally: gpu.alloc(MAX_RANKS * 8, "an exchange")?,
            control: Control::new(&gpu.device)?,
            live: None,
            kept: None,
            former: None,
        })
    }

    /// Whether the buffers do for epochs of shapes that need `most`.
    pub(crate) fn holds(&self, most: (usize, usize)) -> bool {
        self.messages.bytes >= most.0 && self.local.bytes >= most.1
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
        let bytes = sizes.message_bytes();
        if !self.holds(bytes) {
            return Err(shape(
                OP,
                "bytes of this rank's buffers",
                self.messages.bytes,
                bytes.0,
            ));
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
        let host = (self.control.address(), false, 1);
        let connected = Connected::new(gpu, epoch, [0; MAX_RANKS], host, self.kept.take())?;
        let places = Sizes::new(&sizes).at(self.messages.address);
        // No stamp of memory that was something else before may be taken for one.
        self.messages.clear(&gpu.device, &gpu.stream, bytes.0)?;
        gpu.stream.wait(&gpu.device)?;
        self.control.clear();
        self.control.set_communicator(Some(Arc::clone(&communicator)));
        let live = Live {
            watch: Watch::new(self.control.clone(), JOIN_WITHIN)?,
            connected,
            places,
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
        self.live = Some(Box::new(live));
        Ok(())
    }

    /// Ends the epoch here, whatever its exchanges wait for.
    pub(crate) fn leave(&mut self, gpu: &Gpu) -> Result<()> {
        let Some(live) = self.live.take() else {
            return Ok(());
        };
        self.control.abort();
        self.control.set_communicator(None);
        let Live {
            connected,
            communicator,
            ..
        } = *live;
        self.former = Some(communicator);
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
        self.kept = Some(connected.places);
        Ok(())
    }

    /// Waits, bounded, until the library has freed the communicator of the epoch before. Graphs recorded with it are gone.
    pub(crate) fn settle(&mut self) {
        if let Some(former) = self.former.take() {
            former.is_freed_within(ABORT_WAIT);
        }
    }

    fn live(&self) -> Result<&Live> {
        self.live.as_deref().ok_or_else(of_no_epoch)
    }

    pub(crate) fn set_timeout(&self, gpu: &Gpu, timeout: Duration) -> Result<()> {
        let live = self.live()?;
        live.watch.set_timeout(timeout);
        let nanoseconds = timeout.as_nanos().try_into().unwrap_or(u64::MAX);
        live.connected.places.set_timeout(gpu, nanoseconds)
    }

    /// Sends every other rank what `to` says, and takes in what `from` says: address and bytes.
    fn carry(
        &self,
        gpu: &Gpu,
        live: &Live,
        to: impl Fn(u32) -> (u64, usize),
        from: impl Fn(u32) -> (u64, usize),
    ) -> Result<()> {
        let Communicator { rank, ranks, .. } = *live.communicator;
        if ranks == 1 {
            return Ok(());
        }
        let grouped = live.communicator.group(self.until(live), |group| {
            // From the next rank on, so that not all begin with the same one.
            for distance in 1..ranks {
                let (next, last) = ((rank + distance) % ranks, (rank + ranks - distance) % ranks);
                let ((sent, bytes), (place, room)) = (to(next), from(last));
                // SAFETY: both inside the messages' memory, which the stream's kernels alone touch; it lives as long.
                unsafe {
                    group.send(sent, bytes, next, &gpu.stream)?;
                    group.recv(place, room, last, &gpu.stream)?;
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

    /// Of all ranks together.
    fn rows(&self, piece: usize) -> usize {
        (0..self.communicator.ranks)
            .map(|rank| self.tokens_of(rank, piece))
            .sum()
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

    fn pack(&self, tokens: &Tokens, normed: u64) -> Result<Option<PackBeside>> {
        let live = self.live()?;
        let (shape, few) = (&live.connected.shape, live.step.get().few);
        live.fits(tokens, few)?;
        let message = live.places.message(live.communicator.rank);
        let (ids, weights) = live.places.sizes.few_slots(few);
        Ok(Some(PackBeside {
            normed,
            rows: message + HEAD as u64,
            ids: message + ids as u64,
            weights: message + weights as u64,
            head: message,
            load: live.connected.places.rows.address,
            begun: live.connected.places.state.address,
            row_bytes: live.places.sizes.few_row as i32,
            hidden: shape.hidden as i32,
            exact: i32::from(shape.exact),
        }))
    }

    fn dispatch_few(&self, gpu: &Gpu, tokens: &Tokens, normed: u64) -> Result<FewRows> {
        let live = self.live()?;
        let (connected, few, rank) = (&live.connected, live.step.get().few, live.communicator.rank);
        live.fits(tokens, few)?;
        let (exact, messages) = (connected.shape.exact, live.places.few(few));
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
        let bytes = live.places.sizes.few_bytes(few);
        let message = |rank| (live.places.message(rank), bytes);
        self.carry(gpu, live, |_| message(rank), message)?;
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

    fn combine_few(&self, gpu: &Gpu, tokens: &Tokens, results: &FewResults) -> Result<()> {
        let live = self.live()?;
        let (connected, few) = (&live.connected, live.step.get().few);
        let (exact, messages) = (connected.shape.exact, live.places.few(few));
        live.fits(tokens, few)?;
        let back = ReturnFew {
            exchange: connected.params,
            messages,
            y: results.y,
        };
        launch::return_few(gpu, exact, &back)?;
        let bytes = live.places.sizes.few_back_bytes(few);
        let to = |rank| (live.places.results_for(rank), bytes);
        self.carry(gpu, live, to, |rank| (live.places.results_of(rank), bytes))?;
        let sum = SumFew {
            exchange: connected.params,
            messages,
            tokens: connected.tokens(tokens, few)?,
            norm: results.norm,
        };
        launch::sum_few(gpu, exact, &sum)
    }

    fn dispatch_many(&self, gpu: &Gpu, tokens: &Tokens, plane: u64, blocks: usize) -> Result<ManyRows> {
        let live = self.live()?;
        let (connected, piece, rank) = (&live.connected, tokens.piece, live.communicator.rank);
        let (shape, sizes) = (&connected.shape, &live.places.sizes);
        live.fits(tokens, live.tokens_of(rank, piece))?;
        let messages = live.places.many();
        let pack = PackMany {
            exchange: connected.params,
            messages,
            tokens: connected.tokens(tokens, shape.many_tokens)?,
            plane,
            rows: connected.places.rows.address,
            plane_blocks: blocks as i32,
            padded: padded(shape.hidden) as i32,
            fp8: i32::from(shape.wire == Wire::Fp8),
        };
        launch::pack_many(gpu, &pack)?;
        let own = (live.places.message(rank), sizes.many_bytes(tokens.count));
        let from = |rank| {
            let rows = live.tokens_of(rank, piece);
            (live.places.message(rank), sizes.many_bytes(rows))
        };
        self.carry(gpu, live, |_| own, from)?;
        let arrive = ArriveMany {
            exchange: connected.params,
            messages,
            local: self.local.address,
            layer: tokens.layer as i32,
        };
        launch::arrive_many(gpu, live.rows(piece), &arrive)?;
        Ok(ManyRows {
            rows: live.places.there + HEAD as u64,
            row_bytes: sizes.many_row,
            region_bytes: sizes.there_stride,
            wire: shape.wire,
            ids: self.local.address,
            counts: connected.places.counts.address,
            total: connected.places.rows.address,
        })
    }

    fn combine_many(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()> {
        let live = self.live()?;
        let (connected, piece) = (&live.connected, tokens.piece);
        let (messages, sizes) = (live.places.many(), &live.places.sizes);
        let back = ReturnMany {
            exchange: connected.params,
            messages,
            sorted: results.sorted,
            row_of_slot: results.row_of_slot,
        };
        launch::return_many(gpu, live.rows(piece), &back)?;
        let to = |rank| {
            let rows = live.tokens_of(rank, piece);
            (live.places.results_for(rank), sizes.many_back_bytes(rows))
        };
        let own = sizes.many_back_bytes(tokens.count);
        self.carry(gpu, live, to, |rank| (live.places.results_of(rank), own))?;
        let sum = SumMany {
            exchange: connected.params,
            messages,
            tokens: connected.tokens(tokens, connected.shape.many_tokens)?,
            sorted: results.sorted,
            row_of_slot: results.row_of_slot,
            hidden: results.hidden,
        };
        launch::sum_many(gpu, &sum)?;
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
