//! Ranks connected by TCP, one connection per pair. For CPU workers, and between hosts that lack something better.
//!
//! The device thread reads and writes all connections itself, without blocking on any one of them, so that large
//! payloads cannot lock up and no other thread has to be woken in the path of a token. May touch: its connections.
//! Must stay true: the contract in `transport`; a frame out of turn ends the epoch here.

mod exchange;
mod frame;
mod handshake;
mod patience;
mod peer;
mod work;

use std::time::{Duration, Instant};

use mio::{Events, Interest, Poll, Token, Waker};

use super::abort::Abort;
use super::routing::{Routes, SendPlan};
use super::{Capacity, Result, TransportError};
use frame::{Header, Kind};
pub use handshake::{ConnectError, Group, PeerAddress, connect};
use patience::Patience;
use peer::{Frame, Peer};
use work::Intake;

/// A [`super::Transport`] over TCP.
pub struct TcpTransport {
    routes: Routes,
    capacity: Capacity,
    /// Of the epoch, and of the present step.
    least_deadline: Duration,
    deadline: Duration,
    abort: Abort,
    poll: Poll,
    events: Events,
    /// By rank; `None`: this one.
    peers: Vec<Option<Peer>>,
    step: u64,
    layer: usize,
    top_k: usize,
    plan: SendPlan,
    ids: Vec<u8>,
    rows: Vec<u8>,
    intake: Intake,
    /// By source of the intake: results so far; for a peer, behind the header of the frame.
    results: Vec<Vec<u8>>,
    /// Ranks waited for, kept to be filled again.
    wanted: Vec<bool>,
    /// Suspect to name to the peers when this rank leaves.
    suspect: Option<u32>,
}

impl TcpTransport {
    /// Takes over the connections that [`connect`] gave, by rank. `deadline` bounds every wait
    /// of a step that asks for no longer one.
    pub fn new(
        routes: Routes,
        capacity: Capacity,
        streams: Vec<Option<std::net::TcpStream>>,
        deadline: Duration,
        abort: Abort,
    ) -> std::io::Result<TcpTransport> {
        let poll = Poll::new()?;
        let mut peers = Vec::with_capacity(streams.len());
        for (rank, stream) in streams.into_iter().enumerate() {
            let Some(stream) = stream else {
                peers.push(None);
                continue;
            };
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            let mut stream = mio::net::TcpStream::from_std(stream);
            let interest = Interest::READABLE | Interest::WRITABLE;
            poll.registry().register(&mut stream, Token(rank), interest)?;
            peers.push(Some(Peer::new(rank as u32, stream)));
        }
        abort.set_waker(Waker::new(poll.registry(), Token(peers.len()))?);
        Ok(TcpTransport {
            events: Events::with_capacity(peers.len() + 1),
            routes,
            capacity,
            least_deadline: deadline,
            deadline,
            abort,
            poll,
            peers,
            step: 0,
            layer: 0,
            top_k: 0,
            plan: SendPlan::default(),
            ids: Vec::new(),
            rows: Vec::new(),
            intake: Intake::default(),
            results: Vec::new(),
            wanted: Vec::new(),
            suspect: None,
        })
    }

    /// Moves bytes until each of the `wanted` ranks has sent a frame of `kind` for this step and layer and, if
    /// `flushed`, all of this rank's have left; or the deadline passes, or the epoch is aborted.
    fn wait(&mut self, kind: Kind, wanted: &[bool], flushed: bool) -> Result<()> {
        let mut patience = Patience::new(self.deadline, Instant::now());
        loop {
            if self.abort.is_aborted() {
                return Err(TransportError::Aborted);
            }
            for peer in self.peers.iter_mut().flatten() {
                peer.flush();
                peer.fill(&self.capacity);
            }
            let Some(suspect) = self.first_missing(kind, wanted, flushed)? else {
                return Ok(());
            };
            let Some(left) = patience.left(Instant::now()) else {
                return Err(TransportError::Deadline {
                    suspect,
                    phase: kind.phase(),
                    layer: self.layer,
                    milliseconds: self.deadline.as_millis() as u64,
                });
            };
            self.poll(left, suspect)?;
        }
    }

    fn poll(&mut self, timeout: Duration, suspect: u32) -> Result<()> {
        match self.poll.poll(&mut self.events, Some(timeout)) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                return Err(TransportError::Peer {
                    rank: suspect,
                    problem: format!("poll: {error}"),
                });
            }
            _ => {}
        }
        for event in &self.events {
            if let Some(Some(peer)) = self.peers.get_mut(event.token().0) {
                peer.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
                peer.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
            }
        }
        Ok(())
    }

    /// The first rank that [`TcpTransport::wait`] still waits for. An error if one of them will never send what is
    /// wanted, or has sent something else.
    fn first_missing(&self, kind: Kind, wanted: &[bool], flushed: bool) -> Result<Option<u32>> {
        let mut missing = None;
        for (rank, peer) in (0u32..).zip(&self.peers) {
            let Some(peer) = peer else { continue };
            if flushed && !peer.is_flushed() {
                missing = missing.or(Some(rank));
            }
            if !wanted[rank as usize] {
                continue;
            }
            match peer.inbox.front() {
                Some(frame) => self.check_turn(rank, kind, &frame.header)?,
                None => match peer.error() {
                    Some(error) => return Err(error),
                    None => missing = missing.or(Some(rank)),
                },
            }
        }
        Ok(missing)
    }

    fn check_turn(&self, rank: u32, kind: Kind, header: &Header) -> Result<()> {
        let (step, layer) = (self.step, self.layer);
        if header.kind == kind && header.step == step && usize::from(header.layer) == layer {
            return Ok(());
        }
        Err(TransportError::Protocol {
            rank,
            problem: format!(
                "{:?} of step {}, layer {}; this rank is at {kind:?} of step {step}, layer {layer}",
                header.kind, header.step, header.layer
            ),
        })
    }

    /// The frame that [`TcpTransport::wait`] has waited for.
    fn take(&mut self, rank: usize) -> Result<Frame> {
        let peer = self.peers[rank].as_mut();
        let frame = peer.and_then(|peer| peer.inbox.pop_front());
        frame.ok_or_else(|| TransportError::Protocol {
            rank: rank as u32,
            problem: "nothing, though a frame was waited for".into(),
        })
    }

    /// Remembers whom to blame when this rank leaves.
    fn note<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.suspect = error.suspect();
        }
        result
    }
}

impl Drop for TcpTransport {
    /// Says goodbye, so that no peer waits for this rank until its deadline. Never waits itself.
    fn drop(&mut self) {
        let goodbye = Header {
            kind: Kind::Goodbye,
            layer: 0,
            step: self.step,
            rows: self.suspect.map_or(0, |suspect| suspect + 1),
            pairs: 0,
        };
        for peer in self.peers.iter_mut().flatten() {
            if peer.is_between_frames() && peer.is_flushed() {
                peer.send(goodbye.encode().to_vec());
                peer.flush();
            }
        }
    }
}
