//! The exchange over NCCL: this rank writes one message for all others, the library carries it, and kernels make of all
//! ranks' messages what is to be done here; results go back the same way, one piece to each rank.
//!
//! low_latency (few tokens): every message has room for as many tokens as the largest rank has, rounded up, so that sizes
//! are the same for all and are recorded with the graph. high_throughput (many tokens): the ranks
//! tell each other how many tokens they have, once a step, and carry just those. Must stay true: all ranks carry the
//! same sizes in the same order; what a rank is told by a peer is checked against the capacity before it is used.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::epoch::{Live, Step, TOLD, Tally, of_the_epoch};
use super::many::Beside;
use super::messages::{Sizes, second_shape};
use super::reach::{OwnMessages, reach};
use super::watch::Watch;
use super::{ABORT_WAIT, Communicator, Nccl, UniqueId, Until};
use crate::backend::Result;
use crate::cuda::exchange::connected::{Connected, of_no_epoch};
use crate::cuda::exchange::control::Control;
use crate::cuda::exchange::ipc::Epoch;
use crate::cuda::exchange::peer::{PeerArea, process_id};
use crate::cuda::exchange::places::Places as Kept;
use crate::cuda::exchange::{
    Choice, Exchange, ExchangeShape, Fault, FewResults, FewRows, Halves, MAX_RANKS, ManyResults, ManyRows,
    StepSizes, Tokens,
};
use crate::cuda::{Gpu, Memory, as_bytes, shape};

/// Joining: the library may have to be loaded and the network looked at, and peers come when they come.
const JOIN_WITHIN: Duration = Duration::from_secs(10);
/// How long its owner's end waits for what the library still frees. That waits for all peers to have ended it, too, and of several
/// ranks of one process the last frees for all: longer than [`ABORT_WAIT`] with four.
const END_WAIT: Duration = Duration::from_secs(5);
/// How long the device may take to leave an exchange that was ended.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);

const OP: &str = "exchange";

pub(crate) struct NcclExchange {
    messages: OwnMessages,
    /// Where this rank's message begins at each rank whose memory is mapped here: `MAX_RANKS` addresses.
    at_peers: Memory,
    /// Which slots of many tokens are for experts here, of pieces of even number, then of odd.
    local: Memory,
    /// Tokens of each rank in the step, as they tell each other: U64.
    tally: Memory,
    control: Control,
    beside: Beside,
    /// Messages of other ranks of this host, mapped here.
    peers: Vec<PeerArea>,
    live: Option<Box<Live>>,
    /// What an epoch before needed, the second for its second pieces.
    kept: [Option<Kept>; 2],
    /// Its communicator, whose end has begun.
    former: Option<Arc<Communicator>>,
}

impl NcclExchange {
    /// Buffers for epochs of shapes that need at most `most` ([`ExchangeShape::message_bytes`]).
    pub(crate) fn new(gpu: &Gpu, most: (usize, usize)) -> Result<NcclExchange> {
        Nccl::open()?;
        Ok(NcclExchange {
            messages: OwnMessages::new(gpu, most.0)?,
            local: gpu.alloc(most.1.max(4), "slots of the exchange")?,
            tally: gpu.alloc(MAX_RANKS * TOLD, "an exchange")?,
            at_peers: gpu.alloc(MAX_RANKS * 8, "an exchange")?,
            control: Control::new(&gpu.device)?,
            beside: Beside::new(gpu)?,
            peers: Vec::new(),
            live: None,
            kept: [None, None],
            former: None,
        })
    }

    /// Whether the buffers do for epochs of shapes that need `most`.
    pub(crate) fn holds(&self, most: (usize, usize)) -> bool {
        self.messages.memory.bytes >= most.0 && self.local.bytes >= most.1
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
                self.messages.memory.bytes,
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
        self.start(gpu, epoch, communicator, until)
    }

    /// The next epoch of the same ranks, who are all well, with the communicator of the one before: for checks that make many.
    pub(crate) fn renew(&mut self, gpu: &Gpu, epoch: &Epoch<'_>) -> Result<()> {
        gpu.device.enter()?;
        gpu.stream.wait(&gpu.device)?;
        let live = self.live.take().ok_or_else(of_no_epoch)?;
        let communicator = Arc::clone(&live.communicator);
        let place = (communicator.rank as usize, communicator.ranks as usize);
        let bytes = epoch.shape.message_bytes();
        if place != (epoch.rank, epoch.shape.ranks) || !self.holds(bytes) {
            let wanted = format!(
                "rank {} of {}, {} bytes",
                place.0, place.1, self.messages.memory.bytes
            );
            return Err(shape(OP, "of the next epoch, rank", epoch.rank, wanted));
        }
        let Live {
            connected, second, ..
        } = *live;
        let second = second.map(|(connected, _)| connected.places);
        self.kept = [Some(connected.places), second];
        let until = Until {
            deadline: Instant::now() + JOIN_WITHIN,
            cancelled: &|| false,
        };
        self.start(gpu, epoch, communicator, until)
    }

    /// With a communicator of the epoch's ranks.
    fn start(
        &mut self,
        gpu: &Gpu,
        epoch: &Epoch<'_>,
        communicator: Arc<Communicator>,
        until: Until<'_>,
    ) -> Result<()> {
        let sizes = epoch.shape;
        let bytes = sizes.message_bytes();
        let host = (self.control.address(), false, 1);
        let [kept, kept_second] = &mut self.kept;
        let connected = Connected::new(gpu, epoch, [0; MAX_RANKS], host, kept.take())?;
        let first = Sizes::new(&sizes);
        let places = first.at(self.messages.memory.address);
        let second = match second_shape(&sizes) {
            None => None,
            Some(shape) => {
                let epoch = Epoch {
                    shape,
                    ..epoch.clone()
                };
                let connected = Connected::new(gpu, &epoch, [0; MAX_RANKS], host, kept_second.take())?;
                let behind = self.messages.memory.address + first.bytes() as u64;
                Some((connected, Sizes::new(&shape).at(behind)))
            }
        };
        self.control.clear();
        self.control.set_communicator(Some(Arc::clone(&communicator)));
        let mut live = Live {
            straight: 0,
            at_peers: self.at_peers.address,
            watch: Watch::new(self.control.clone(), JOIN_WITHIN)?,
            connected,
            places,
            second,
            communicator,
            timeout: epoch.timeout,
            step: Cell::new(Step {
                few: sizes.few_tokens,
                each: sizes.many_tokens,
            }),
            counts: RefCell::new(vec![sizes.many_tokens; sizes.ranks]),
        };
        // The first operation connects the pairs; it must not happen while a step is recorded.
        let processes = live.agree(gpu, &self.tally(), process_id(), until)?;
        if self.messages.renew(gpu, &processes)? {
            live.move_to(self.messages.memory.address);
        }
        // No stamp of memory that was something else before may be taken for one.
        self.messages.memory.clear(&gpu.device, &gpu.stream, bytes.0)?;
        gpu.stream.wait(&gpu.device)?;
        let tally = Tally {
            words: &self.tally,
            control: &self.control,
        };
        if sizes.ranks > 1 {
            reach(
                gpu,
                &tally,
                (&mut live, &mut self.peers),
                (&mut self.messages, bytes.0),
                &processes,
                until,
            )?;
            let message = |area: u64| area + epoch.rank as u64 * first.there_stride as u64;
            gpu.write(
                &self.at_peers,
                0,
                as_bytes(&live.connected.params.area.map(message)),
            )?;
        }
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
            second,
            communicator,
            ..
        } = *live;
        self.former = Some(communicator);
        let deadline = Instant::now() + LEAVE_WITHIN;
        while !gpu.stream.is_idle(&gpu.device)? || !self.beside.is_idle(gpu)? {
            if Instant::now() > deadline {
                return Err(gpu.device.error(format!(
                    "the exchange was ended, but its kernels were still running {} s later",
                    LEAVE_WITHIN.as_secs()
                )));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        self.peers.clear();
        let second = second.map(|(connected, _)| connected.places);
        self.kept = [Some(connected.places), second];
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
        if let Some((second, _)) = &live.second {
            second.places.set_timeout(gpu, nanoseconds)?;
        }
        live.connected.places.set_timeout(gpu, nanoseconds)
    }

    fn tally(&self) -> Tally<'_> {
        Tally {
            words: &self.tally,
            control: &self.control,
        }
    }
}

impl Drop for NcclExchange {
    /// Waits, bounded, for the library: what its thread still frees while the process ends, it frees in ruins.
    fn drop(&mut self) {
        self.control.set_communicator(None);
        let live = self.live.take().map(|live| Arc::clone(&live.communicator));
        for communicator in live.into_iter().chain(self.former.take()) {
            communicator.end();
            communicator.is_freed_within(END_WAIT);
        }
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
        self.live()?.begin(gpu, &self.tally(), sizes)
    }

    fn recorded(&self) -> usize {
        self.live.as_ref().map_or(0, |live| live.step.get().few)
    }

    fn queued(&self, gpu: &Gpu) -> Result<()> {
        self.live()?.watch.mark(gpu).map(|_| ())
    }

    fn recordings(&self, tokens: usize) -> Vec<StepSizes> {
        self.live
            .as_ref()
            .map_or(Vec::new(), |live| live.recordings(tokens))
    }

    fn chooses(&self) -> bool {
        true
    }

    fn choose_and_dispatch(&self, gpu: &Gpu, tokens: &Tokens, choice: &Choice) -> Result<FewRows> {
        self.live()?.choose_and_dispatch(gpu, tokens, choice)
    }

    fn dispatch_few(&self, gpu: &Gpu, tokens: &Tokens, normed: u64) -> Result<FewRows> {
        self.live()?.dispatch_few(gpu, tokens, normed)
    }

    fn combine_few(&self, gpu: &Gpu, tokens: &Tokens, results: &FewResults) -> Result<()> {
        self.live()?.combine_few(gpu, tokens, results)
    }

    fn plane(&self, piece: usize, count: usize) -> Option<(u64, usize)> {
        self.live.as_ref()?.plane(&self.local, piece, count)
    }

    fn dispatch_many(&self, gpu: &Gpu, tokens: &Tokens, plane: u64, blocks: usize) -> Result<ManyRows> {
        self.live()?
            .dispatch_many(gpu, &self.local, tokens, (plane, blocks))
    }

    fn combine_many(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()> {
        self.live()?
            .combine_many(gpu, (&self.beside, &self.local), tokens, results)
    }

    fn halves(&self) -> Option<&dyn Halves> {
        let second = &self.live.as_ref()?.second;
        second.is_some().then_some(self as &dyn Halves)
    }

    fn fault(&self) -> Option<Fault> {
        self.control.fault()
    }
}

impl Halves for NcclExchange {
    fn start_dispatch(&self, gpu: &Gpu, tokens: &Tokens, plane: (u64, usize)) -> Result<()> {
        self.live()?
            .start_dispatch_of(gpu, (&self.beside, &self.local), tokens, plane)
    }

    fn finish_dispatch(&self, gpu: &Gpu, tokens: &Tokens) -> Result<ManyRows> {
        self.live()?
            .finish_dispatch_of(gpu, (&self.beside, &self.local), tokens)
    }

    fn start_combine(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()> {
        self.live()?
            .start_combine_of(gpu, (&self.beside, &self.local), (tokens, results))
    }

    fn finish_combine(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()> {
        self.live()?
            .finish_combine_of(gpu, (&self.beside, &self.local), (tokens, results))
    }
}
