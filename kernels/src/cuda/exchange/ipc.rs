//! The exchange of ranks of one host: kernels write straight into peers' memory, over NVLink or within one device.
//!
//! Life: [`IpcExchange::new`] allocates the receive buffers once; for each epoch the ranks exchange what [`IpcExchange::offer`]
//! gives and each calls [`IpcExchange::connect`]; the first exchange may start when all ranks have connected. Peers that are no longer
//! named are unmapped when new ones come (the memory of a dead process goes back to its device then), or when there are
//! many: survivors go on without asking the driver for anything, which may take long while it clears a process away.

use std::time::Duration;

use conclave_plan::placement::Placement;

use super::connected::{Connected, of_no_epoch};
use super::control::Control;
use super::halves::{CHANNELS, TwoHalves, channel_bytes};
use super::launch;
use super::peer::{OwnArea, PeerArea, PeerHandle, multi_process};
use super::{
    Choice, Exchange, ExchangeShape, Fault, FewResults, FewRows, Halves, MAX_RANKS, ManyResults, ManyRows,
    StepSizes, Tokens,
};
use crate::backend::Result;
use crate::cuda::{Gpu, shape};

/// What an epoch fixes.
#[derive(Clone, Debug)]
pub struct Epoch<'a> {
    /// Never used before by any of the ranks.
    pub number: u32,
    pub rank: usize,
    pub shape: ExchangeShape,
    pub placement: &'a Placement,
    pub layers: usize,
    /// How long a rank waits for another within one exchange.
    pub timeout: Duration,
}

pub(crate) struct IpcExchange {
    own: OwnArea,
    control: Control,
    peers: Vec<PeerArea>,
    connected: Option<Connected>,
    halves: Option<TwoHalves>,
    /// How the ranks of this device run beside each other.
    beside: &'static str,
    shares_context: bool,
}

/// Mapped areas of former peers that may wait for being unmapped.
const FORMER_PEERS: usize = 4;

impl IpcExchange {
    /// Buffers for epochs of any of `shapes`.
    pub(crate) fn new(gpu: &Gpu, shapes: &[ExchangeShape]) -> Result<IpcExchange> {
        let most = |bytes: fn(&ExchangeShape) -> usize| shapes.iter().map(bytes).max().unwrap_or(0);
        Ok(IpcExchange {
            own: OwnArea::new(gpu, most(ExchangeShape::area_bytes))?,
            halves: match most(channel_bytes) {
                0 => None,
                bytes => Some(TwoHalves::new(gpu, bytes)?),
            },
            control: Control::new(&gpu.device)?,
            peers: Vec::new(),
            connected: None,
            beside: "",
            shares_context: false,
        })
    }

    /// Whether the buffers do for epochs of shapes no larger than `most`.
    pub(crate) fn holds(&self, most: &ExchangeShape) -> bool {
        self.own.handle.area_bytes >= most.area_bytes() as u64
    }

    /// For the ranks of the next epoch, which takes the other side: a rank that was left behind in the one before may have been paused
    /// before its stores, and nobody can take its mapping away.
    pub(crate) fn offer(&mut self) -> PeerHandle {
        self.own.turn();
        self.own.handle
    }

    pub(crate) fn control(&self) -> Control {
        self.control.clone()
    }

    /// Waits for this device to leave the epoch before, maps the peers (`peers[rank]`, this rank included) and starts
    /// anew.
    pub(crate) fn connect(&mut self, gpu: &Gpu, epoch: &Epoch<'_>, peers: &[PeerHandle]) -> Result<()> {
        const OP: &str = "exchange";
        let sizes = epoch.shape;
        sizes.check()?;
        if peers.len() != sizes.ranks || epoch.placement.ranks as usize != sizes.ranks {
            return Err(shape(OP, "peers", peers.len(), sizes.ranks));
        }
        if peers.get(epoch.rank) != Some(&self.own.handle) {
            return Err(shape(
                OP,
                "own rank",
                epoch.rank,
                "the index of this rank's handle",
            ));
        }
        let bytes = sizes.area_bytes();
        if let Some(small) = peers.iter().find(|peer| peer.area_bytes < bytes as u64) {
            return Err(shape(OP, "bytes of a rank's buffers", small.area_bytes, bytes));
        }
        if let Some(rank) = peers.iter().position(|peer| !peer.names_a_side()) {
            return Err(shape(
                OP,
                "side of a rank's buffers",
                format!("none, of rank {rank}"),
                "one of two",
            ));
        }
        gpu.device.enter()?;
        gpu.stream.wait(&gpu.device)?;
        if let Some(halves) = &mut self.halves {
            halves.leave(gpu)?;
        }
        let kept = self.connected.take().map(|connected| connected.places);
        let own = self.own.handle;
        let named = |peer: &PeerArea| peers.iter().any(|named| named.same_memory(&peer.handle));
        let known = self.peers.iter().filter(|peer| named(peer)).count();
        if known + 1 < peers.len() || self.peers.len() > known + FORMER_PEERS {
            self.peers.retain(named);
        }
        let mut area = [0; MAX_RANKS];
        for (place, handle) in area.iter_mut().zip(peers) {
            if *handle == own {
                *place = self.own.address();
                continue;
            }
            let known = self.peers.iter().find(|peer| peer.handle.same_memory(handle));
            let mapped = match known {
                Some(peer) => peer.address,
                None => {
                    self.peers.push(PeerArea::open(gpu, handle)?);
                    self.peers.last().map_or(0, |peer| peer.address)
                }
            };
            *place = handle.side_at(mapped);
        }
        let own = &own;
        let here: Vec<_> = peers.iter().filter(|peer| peer.shares_device(own)).collect();
        self.beside = if here.len() == 1 {
            "alone on its device"
        } else if here.iter().all(|peer| peer.shares_process(own)) {
            "as threads of one process"
        } else if multi_process(&gpu.device)? {
            "under MPS"
        } else {
            "time-sliced, milliseconds an exchange: start nvidia-cuda-mps-control"
        };
        self.shares_context = here.iter().any(|peer| *peer != own && peer.shares_process(own));
        let host = self.control.address();
        let connected = Connected::new(gpu, epoch, area, (host, false, here.len()), kept)?;
        if let (Some(halves), true) = (&mut self.halves, channel_bytes(&sizes) > 0) {
            let first = bytes - CHANNELS * channel_bytes(&sizes);
            halves.connect(gpu, epoch, (&area, first), (host, here.len()))?;
        }
        self.own.clear(gpu, bytes)?;
        self.control.clear();
        gpu.stream.wait(&gpu.device)?;
        self.connected = Some(connected);
        Ok(())
    }

    /// Leaves the epoch; waits for this device.
    pub(crate) fn leave(&mut self, gpu: &Gpu) -> Result<()> {
        gpu.stream.wait(&gpu.device)?;
        if let Some(halves) = &mut self.halves {
            halves.leave(gpu)?;
        }
        self.connected = None;
        self.peers.clear();
        Ok(())
    }

    pub(crate) fn set_timeout(&self, gpu: &Gpu, timeout: Duration) -> Result<()> {
        let nanoseconds = timeout.as_nanos().try_into().unwrap_or(u64::MAX);
        if let Some(halves) = &self.halves {
            halves.set_timeout(gpu, nanoseconds)?;
        }
        self.connected()?.places.set_timeout(gpu, nanoseconds)
    }

    /// Experts of a layer that this rank holds, at most.
    pub(crate) fn local_experts(&self) -> Result<usize> {
        Ok(self.connected()?.places.local_experts)
    }

    /// Where the area of `peer` is mapped.
    pub(crate) fn area(&self, peer: usize) -> Result<u64> {
        let connected = self.connected()?;
        let areas = &connected.params.area[..connected.shape.ranks];
        areas
            .get(peer)
            .copied()
            .ok_or_else(|| shape("exchange", "peer", peer, format!("below {}", areas.len())))
    }

    /// Where `peer` reads how many tokens of this rank's it gets in the few-token family.
    pub(crate) fn header_at(&self, peer: usize) -> Result<u64> {
        let connected = self.connected()?;
        Ok(self.area(peer)? + connected.at.few_header + connected.params.rank as u64 * 16)
    }

    /// Blocks of the exchanges that are queued or recorded from now on write their times to `address`, where there are
    /// [`trace::BYTES`](super::trace::BYTES) bytes; 0: not any more.
    pub(crate) fn set_trace(&mut self, address: u64) -> Result<()> {
        self.connected.as_mut().ok_or_else(of_no_epoch)?.params.trace = address;
        Ok(())
    }

    fn connected(&self) -> Result<&Connected> {
        self.connected.as_ref().ok_or_else(of_no_epoch)
    }
}

impl Exchange for IpcExchange {
    fn describe(&self) -> String {
        match &self.connected {
            None => "ipc (not connected)".into(),
            Some(connected) => format!(
                "ipc (rank {} of {}, {} on this device {})",
                connected.params.rank, connected.shape.ranks, connected.sharing, self.beside
            ),
        }
    }

    fn shape(&self) -> Result<&ExchangeShape> {
        Ok(&self.connected()?.shape)
    }

    fn local_experts(&self) -> Result<usize> {
        IpcExchange::local_experts(self)
    }

    /// Not while threads share a context: there the driver may wait for a peer's kernels, and those wait for this rank.
    fn recordable(&self) -> bool {
        !self.shares_context
    }

    fn begin(&self, _: &Gpu, sizes: &StepSizes) -> Result<()> {
        if let Some(halves) = &self.halves {
            halves.begin(sizes);
        }
        self.connected()?.begin(sizes.largest);
        Ok(())
    }

    fn recorded(&self) -> usize {
        let connected = self.connected.as_ref();
        connected.map_or(0, |connected| connected.part_bits.get() as usize)
    }

    fn recordings(&self, tokens: usize) -> Vec<StepSizes> {
        let Some(connected) = self.connected.as_ref().filter(|_| self.recordable()) else {
            return Vec::new();
        };
        let shape = &connected.shape;
        let sizes = |largest| StepSizes {
            largest,
            tokens,
            many: None,
        };
        launch::few_cases(shape.ranks, tokens, shape.few_tokens)
            .into_iter()
            .map(sizes)
            .collect()
    }

    fn halves(&self) -> Option<&dyn Halves> {
        let connected = self.connected.as_ref()?;
        // Where ranks share a device, a copy may stand in the queue of another rank's kernel that waits for it.
        let useful = connected.sharing == 1 && connected.shape.ranks > 1 && connected.shape.many_tokens > 0;
        self.halves
            .as_ref()
            .filter(|_| useful)
            .map(|halves| halves as &dyn Halves)
    }

    fn chooses(&self) -> bool {
        true
    }

    fn choose_and_dispatch(&self, gpu: &Gpu, tokens: &Tokens, choice: &Choice) -> Result<FewRows> {
        self.connected()?.dispatch_few(gpu, tokens, choice)
    }

    fn dispatch_few(&self, gpu: &Gpu, tokens: &Tokens, normed: u64) -> Result<FewRows> {
        let choice = Choice {
            normed,
            ..Choice::default()
        };
        self.connected()?.dispatch_few(gpu, tokens, &choice)
    }

    fn combine_few(&self, gpu: &Gpu, tokens: &Tokens, results: &FewResults) -> Result<()> {
        self.connected()?.combine_few(gpu, tokens, results)
    }

    fn dispatch_many(&self, gpu: &Gpu, tokens: &Tokens, plane: u64, blocks: usize) -> Result<ManyRows> {
        self.connected()?.dispatch_many(gpu, tokens, (plane, blocks))
    }

    fn combine_many(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()> {
        self.connected()?.combine_many(gpu, tokens, results)
    }

    fn fault(&self) -> Option<Fault> {
        self.control.fault()
    }
}
