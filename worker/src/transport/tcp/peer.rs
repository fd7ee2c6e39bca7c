//! One connection: what is still to be sent, and what has come.
//!
//! Nothing here waits. Must stay true: at most [`MAX_FRAMES_AHEAD`] frames are held; beyond that the connection is not
//! read, so that a peer that floods is stopped by TCP and not by memory.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};

use mio::net::TcpStream;

use super::frame::{HEADER_BYTES, Header, Kind};
use crate::transport::{Capacity, TransportError};

/// A peer may be so far ahead of this rank: it has sent its dispatch and its results of a layer and, having got all
/// it waits for, the dispatch of the next one.
pub(super) const MAX_FRAMES_AHEAD: usize = 3;

#[derive(Debug)]
pub(super) struct Frame {
    pub(super) header: Header,
    pub(super) body: Vec<u8>,
}

/// How a connection ended.
#[derive(Clone, Debug)]
pub(super) enum Ended {
    Closed(String),
    Goodbye { suspect: Option<u32> },
    Broken(String),
}

#[derive(Debug)]
pub(super) struct Peer {
    rank: u32,
    pub(super) stream: TcpStream,
    /// Not known to block: set by the poll, cleared by the stream.
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// Whole frames to send; the first `sent` bytes of the first one are on their way.
    outgoing: VecDeque<Vec<u8>>,
    sent: usize,
    pub(super) inbox: VecDeque<Frame>,
    /// Nothing more will come. What came before still counts: a peer may leave after its last step.
    pub(super) ended: Option<Ended>,
    head: [u8; HEADER_BYTES],
    /// Header and body that is being read.
    partial: Option<Frame>,
    received: usize,
    /// Bodies and frames that were used up, to be filled again.
    spare: Vec<Vec<u8>>,
}

impl Peer {
    pub(super) fn new(rank: u32, stream: TcpStream) -> Peer {
        Peer {
            rank,
            stream,
            readable: true,
            writable: true,
            outgoing: VecDeque::new(),
            sent: 0,
            inbox: VecDeque::new(),
            ended: None,
            head: [0; HEADER_BYTES],
            partial: None,
            received: 0,
            spare: Vec::new(),
        }
    }

    /// An empty buffer with room from earlier use.
    pub(super) fn buffer(&mut self) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer
    }

    pub(super) fn recycle(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < 2 * MAX_FRAMES_AHEAD {
            self.spare.push(buffer);
        }
    }

    pub(super) fn send(&mut self, frame: Vec<u8>) {
        self.outgoing.push_back(frame);
    }

    pub(super) fn is_flushed(&self) -> bool {
        self.outgoing.is_empty()
    }

    /// A frame is not cut in the middle.
    pub(super) fn is_between_frames(&self) -> bool {
        self.sent == 0
    }

    /// Why nothing more comes from this peer.
    pub(super) fn error(&self) -> Option<TransportError> {
        let rank = self.rank;
        Some(match self.ended.clone()? {
            Ended::Closed(problem) => TransportError::Peer { rank, problem },
            Ended::Goodbye { suspect } => TransportError::HungUp { rank, suspect },
            Ended::Broken(problem) => TransportError::Protocol { rank, problem },
        })
    }

    /// Sends what the connection takes now. To a peer that is gone nothing is sent any more.
    pub(super) fn flush(&mut self) {
        while self.writable
            && let Some(frame) = self.outgoing.front()
        {
            match self.stream.write(&frame[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    self.ended.get_or_insert(Ended::Closed(error.to_string()));
                    self.outgoing.clear();
                    self.sent = 0;
                    return;
                }
            }
            if self.sent == self.outgoing[0].len() {
                self.sent = 0;
                if let Some(frame) = self.outgoing.pop_front() {
                    self.recycle(frame);
                }
            }
        }
    }

    /// Reads what has come, up to the bound.
    pub(super) fn fill(&mut self, capacity: &Capacity) {
        while self.readable && self.ended.is_none() && self.inbox.len() < MAX_FRAMES_AHEAD {
            if let Err(ended) = self.read_some(capacity) {
                self.ended = Some(ended);
            }
        }
    }

    fn read_some(&mut self, capacity: &Capacity) -> std::result::Result<(), Ended> {
        let into = match &mut self.partial {
            Some(frame) => &mut frame.body[self.received..],
            None => &mut self.head[self.received..],
        };
        match self.stream.read(into) {
            Ok(0) => return Err(Ended::Closed("the peer closed it".into())),
            Ok(count) => self.received += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                return Ok(());
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(Ended::Closed(error.to_string())),
        }
        if self.partial.is_none() && self.received == HEADER_BYTES {
            let header = Header::decode(&self.head, capacity).map_err(Ended::Broken)?;
            if header.kind == Kind::Goodbye {
                let suspect = header.rows.checked_sub(1);
                return Err(Ended::Goodbye { suspect });
            }
            let mut body = self.buffer();
            body.resize(header.body_bytes(capacity), 0);
            self.partial = Some(Frame { header, body });
            self.received = 0;
        }
        if let Some(frame) = self.partial.take_if(|frame| frame.body.len() == self.received) {
            self.inbox.push_back(frame);
            self.received = 0;
        }
        Ok(())
    }
}
