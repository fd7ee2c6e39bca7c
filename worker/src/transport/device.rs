//! Ranks on GPUs: the device exchanges by itself, over `ipc` or `nccl`. What is left to the host: the ranks tell each other
//! over their proven connections what they are about to open, before anything is mapped or joined, and each watches that
//! the others are there.
//!
//! Must stay true: nothing of a peer is used before its connection was proved (`tcp::connect`) and its sizes were found to
//! be this rank's own; a peer that is gone, or an epoch that is aborted, ends every wait of the device at once.

use std::io::{ErrorKind, Read as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use conclave_kernels::backend::{Backend, Buffer, KernelError};
use conclave_kernels::cuda::CudaBackend;
use conclave_kernels::cuda::exchange::control::Control;
use conclave_kernels::cuda::exchange::ipc::Epoch;
use conclave_kernels::cuda::exchange::nccl::UniqueId;
use conclave_kernels::cuda::exchange::peer::PeerHandle;
use conclave_kernels::cuda::exchange::{ExchangeShape, Wire};
use mio::{Events, Interest, Poll, Token, Waker};

use super::greeting::{self, Greeting, HANDLE_BYTES};
use super::group::Group;
use super::{Abort, Capacity, Result, Tokens, Transport, TransportError, TransportKind, Work};

/// Peers say their sizes as soon as they have loaded.
const GREET_WITHIN: Duration = Duration::from_secs(30);
/// Buffers are made once, for groups of any size up to this; a larger one makes its own.
const USUAL_RANKS: usize = 16;
const NOBODY: u32 = u32::MAX;

/// A [`Transport`] whose exchange is the device's: the host only begins steps.
pub struct DeviceTransport {
    name: String,
    abort: Abort,
    watch: Watch,
}

/// Connects the device of `backend` with the other ranks'. Waits for them, each wait bounded.
pub fn connect(backend: &mut dyn Backend, group: Group<'_>) -> Result<Box<dyn Transport>> {
    let backend = backend.as_cuda().ok_or_else(|| {
        KernelError::Unsupported(format!(
            "{} is between GPUs; this rank runs on none",
            group.kind.name()
        ))
    })?;
    let shape = |ranks: usize| {
        let Capacity {
            max_tokens,
            max_top_k,
            hidden,
        } = group.capacity;
        ExchangeShape::new(ranks, hidden, max_top_k, max_tokens, group.deterministic)
    };
    let sizes = shape(group.ranks as usize);
    let handle = open(backend, group.kind, &shape, sizes.ranks)?;
    let greeting = greeting(&sizes, handle.as_ref());
    let heard = greeting::meet(&group.streams, &greeting, GREET_WITHIN, &group.abort)?;
    let epoch = Epoch {
        number: group.epoch as u32,
        rank: group.rank as usize,
        shape: sizes,
        placement: group.placement,
        layers: group.layers,
        timeout: group.deadline,
    };
    let cancelled = || group.abort.is_aborted();
    match (handle, group.communicator) {
        (Some(_), _) => {
            let handles = heard.iter().map(|bytes| PeerHandle::from_bytes(bytes));
            let handles: Option<Vec<PeerHandle>> = handles.collect();
            let handles =
                handles.ok_or_else(|| KernelError::Unsupported("a handle of another length".into()))?;
            backend.connect_ipc(&epoch, &handles)?;
        }
        (None, Some(id)) => backend.connect_nccl(&epoch, UniqueId(id.0), &cancelled)?,
        (None, None) => {
            return Err(KernelError::Unsupported("nccl without the id of a communicator".into()).into());
        }
    }
    // No kernel of a peer may write here before this rank has emptied its buffers: all have said so when this returns.
    greeting::meet(&group.streams, &greeting, GREET_WITHIN, &group.abort)?;
    let name = backend.describe_exchange().unwrap_or_default();
    let name = format!("{name}, {}", backend.describe_links()?);
    let control = backend
        .exchange_control()
        .ok_or_else(|| KernelError::Unsupported("the exchange has no control".into()))?;
    let watch = Watch::new(group.streams, control, group.abort.clone())
        .map_err(|error| KernelError::Unsupported(format!("watching the peers: {error}")))?;
    Ok(Box::new(DeviceTransport {
        name,
        abort: group.abort,
        watch,
    }))
}

/// Out of every group: steps need all experts here from now on.
pub fn leave(backend: &mut dyn Backend) -> Result<()> {
    match backend.as_cuda() {
        Some(backend) => Ok(backend.leave_exchange()?),
        None => Ok(()),
    }
}

/// Buffers; the handle if peers map them.
fn open(
    backend: &mut CudaBackend,
    kind: TransportKind,
    shape: &dyn Fn(usize) -> ExchangeShape,
    ranks: usize,
) -> Result<Option<PeerHandle>> {
    let shapes: Vec<ExchangeShape> = (1..=ranks.max(USUAL_RANKS)).map(shape).collect();
    if kind != TransportKind::Ipc {
        if !backend.nccl_holds(&shapes) {
            backend.open_nccl(&shapes)?;
        }
        return Ok(None);
    }
    let most = shapes.iter().max_by_key(|shape| shape.area_bytes());
    let most = most.copied().unwrap_or_else(|| shape(ranks));
    Ok(Some(backend.offer_ipc(&most)?))
}

/// What this rank tells its peers: sizes that must be theirs, and the handle of its buffers.
fn greeting(sizes: &ExchangeShape, handle: Option<&PeerHandle>) -> Greeting {
    Greeting {
        sizes: [
            ("ranks", sizes.ranks as u32),
            ("hidden", sizes.hidden as u32),
            ("experts of a token", sizes.top_k as u32),
            ("tokens of a short step", sizes.few_tokens as u32),
            ("tokens of a piece of a long step", sizes.many_tokens as u32),
            ("exact", u32::from(sizes.exact)),
            ("deterministic", u32::from(sizes.deterministic)),
            ("wire", u32::from(sizes.wire == Wire::Fp8)),
        ],
        handle: handle.map_or([0; HANDLE_BYTES], PeerHandle::to_bytes),
    }
}

impl Transport for DeviceTransport {
    fn describe(&self) -> String {
        self.name.clone()
    }

    fn begin_step(&mut self, _: u64) -> Result<()> {
        if self.abort.is_aborted() {
            return Err(TransportError::Aborted);
        }
        match self.watch.lost() {
            Some(rank) => Err(TransportError::HungUp {
                rank,
                suspect: Some(rank),
            }),
            None => Ok(()),
        }
    }

    fn dispatch(&mut self, _: &mut dyn Backend, _: Tokens<'_>) -> Result<()> {
        Err(by_itself())
    }

    fn next<'a>(&'a mut self, _: &mut dyn Backend, _: &Buffer) -> Result<Option<Work<'a>>> {
        Err(by_itself())
    }

    fn give(&mut self, _: &mut dyn Backend, _: &Buffer) -> Result<()> {
        Err(by_itself())
    }

    fn combine(&mut self, _: &mut dyn Backend, _: &Buffer) -> Result<()> {
        Err(by_itself())
    }
}

fn by_itself() -> TransportError {
    let what = "this step cannot run whole on the device, and between GPUs there is no other way";
    KernelError::Unsupported(what.into()).into()
}

/// A thread that notices when a peer is gone or the epoch is over, and ends the device's waits.
struct Watch {
    lost: Arc<AtomicU32>,
    closing: Arc<AtomicBool>,
    control: Control,
    abort: Abort,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn new(streams: Vec<Option<TcpStream>>, control: Control, abort: Abort) -> std::io::Result<Watch> {
        let poll = Poll::new()?;
        let mut peers = Vec::new();
        for (rank, stream) in streams.into_iter().enumerate() {
            let Some(stream) = stream else { continue };
            stream.set_nonblocking(true)?;
            let mut stream = mio::net::TcpStream::from_std(stream);
            poll.registry()
                .register(&mut stream, Token(rank), Interest::READABLE)?;
            peers.push((rank as u32, stream));
        }
        abort.set_waker(Waker::new(poll.registry(), Token(usize::MAX))?);
        let (lost, closing) = (Arc::new(AtomicU32::new(NOBODY)), Arc::new(AtomicBool::new(false)));
        let seen = (
            Arc::clone(&lost),
            Arc::clone(&closing),
            control.clone(),
            abort.clone(),
        );
        let thread = std::thread::Builder::new().name("peers".into()).spawn(move || {
            let (lost, closing, control, abort) = seen;
            watch(poll, peers, &lost, &|| {
                closing.load(Ordering::SeqCst) || abort.is_aborted()
            });
            control.abort();
        })?;
        Ok(Watch {
            lost,
            closing,
            control,
            abort,
            thread: Some(thread),
        })
    }

    fn lost(&self) -> Option<u32> {
        Some(self.lost.load(Ordering::SeqCst)).filter(|&rank| rank != NOBODY)
    }
}

/// Until a peer is gone or `over`.
fn watch(
    mut poll: Poll,
    mut peers: Vec<(u32, mio::net::TcpStream)>,
    lost: &AtomicU32,
    over: &dyn Fn() -> bool,
) {
    /// The flag is looked at again even if the waker fails.
    const LOOK_EVERY: Duration = Duration::from_millis(50);
    let mut events = Events::with_capacity(peers.len() + 1);
    while !over() {
        // A failed poll is tried again after the pause that it did not take.
        if poll.poll(&mut events, Some(LOOK_EVERY)).is_err() {
            std::thread::sleep(LOOK_EVERY);
        }
        for (rank, stream) in &mut peers {
            // Nothing more is said once the exchange stands: whatever comes, the peer has broken off.
            match stream.read(&mut [0; 1]) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                _ => {
                    lost.store(*rank, Ordering::SeqCst);
                    return;
                }
            }
        }
    }
}

impl Drop for Watch {
    /// Ends this rank's waits, and by closing the connections those of the peers.
    fn drop(&mut self) {
        self.closing.store(true, Ordering::SeqCst);
        self.control.abort();
        self.abort.wake();
        if let Some(thread) = self.thread.take() {
            // What it had to do is done above.
            let _ = thread.join();
        }
    }
}
