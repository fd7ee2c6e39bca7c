//! Dispatch and combine over TCP.

use std::time::Duration;

use conclave_kernels::backend::{Backend, Buffer, KernelError};

use super::frame::{HEADER_BYTES, Header, Kind};
use super::work::Source;
use super::{Frame, TcpTransport};
use crate::transport::routing::Destination;
use crate::transport::{Capacity, Input, Result, Tokens, Transport, TransportError, Work};

impl Transport for TcpTransport {
    fn describe(&self) -> String {
        format!("tcp ({} ranks)", self.peers.len())
    }

    fn set_patience(&mut self, least: Duration) {
        self.deadline = self.least_deadline.max(least);
    }

    fn begin_step(&mut self, step: u64) -> Result<()> {
        self.step = step;
        if self.abort.is_aborted() {
            return Err(TransportError::Aborted);
        }
        Ok(())
    }

    fn dispatch(&mut self, backend: &mut dyn Backend, tokens: Tokens<'_>) -> Result<()> {
        let result = self.try_dispatch(backend, tokens);
        self.note(result)
    }

    fn next<'a>(&'a mut self, backend: &mut dyn Backend, staging: &Buffer) -> Result<Option<Work<'a>>> {
        let staged = self.intake.stage(backend, staging, &self.capacity);
        let staged = self.note(staged)?;
        Ok(staged.then_some(Work {
            rows: &self.intake.rows,
            input: Input::Staged,
        }))
    }

    fn give(&mut self, backend: &mut dyn Backend, out: &Buffer) -> Result<()> {
        let result = self.try_give(backend, out);
        self.note(result)
    }

    fn combine(&mut self, backend: &mut dyn Backend, y: &Buffer) -> Result<()> {
        let result = self.try_combine(backend, y);
        self.note(result)
    }
}

impl TcpTransport {
    fn try_dispatch(&mut self, backend: &mut dyn Backend, tokens: Tokens<'_>) -> Result<()> {
        (self.layer, self.top_k) = (tokens.layer, tokens.top_k);
        self.ids.resize(tokens.count * tokens.top_k * 4, 0);
        backend.read(tokens.experts, 0, &mut self.ids)?;
        self.rows.resize(tokens.count * self.capacity.row_bytes(), 0);
        backend.read(tokens.rows, 0, &mut self.rows)?;
        let experts: Vec<u32> = self
            .ids
            .as_chunks()
            .0
            .iter()
            .map(|&id| u32::from_le_bytes(id))
            .collect();
        let planned = self.plan.fill(&self.routes, tokens.layer, &experts, tokens.top_k);
        planned.map_err(|expert| KernelError::Shape {
            op: "dispatch",
            what: "expert",
            found: expert.to_string(),
            expected: format!("one of the layer's {}", self.routes.layer(tokens.layer).experts()),
        })?;
        for (rank, peer) in self.peers.iter_mut().enumerate() {
            let Some(peer) = peer else { continue };
            let destination = &self.plan.destinations[rank];
            let header = Header {
                kind: Kind::Dispatch,
                layer: self.layer as u16,
                step: self.step,
                rows: destination.tokens.len() as u32,
                pairs: destination.pairs.len() as u32,
            };
            let mut frame = peer.buffer();
            frame.extend_from_slice(&header.encode());
            write_body(&mut frame, destination, &self.rows, &self.capacity);
            peer.send(frame);
            peer.flush();
        }
        let mut wanted = std::mem::take(&mut self.wanted);
        wanted.clear();
        wanted.extend(self.peers.iter().map(Option::is_some));
        let waited = self.wait(Kind::Dispatch, &wanted, false);
        self.wanted = wanted;
        waited?;
        self.take_in()
    }

    /// Turns the dispatches of all ranks, this one's own included, into work.
    fn take_in(&mut self) -> Result<()> {
        let mut sources = Vec::with_capacity(self.peers.len());
        for rank in 0..self.peers.len() {
            let (body, rows, pairs) = if self.peers[rank].is_some() {
                let Frame { header, body } = self.take(rank)?;
                (body, header.rows as usize, header.pairs as usize)
            } else {
                let destination = &self.plan.destinations[rank];
                let mut body = Vec::new();
                write_body(&mut body, destination, &self.rows, &self.capacity);
                (body, destination.tokens.len(), destination.pairs.len())
            };
            let routes = self.routes.layer(self.layer);
            sources.push(Source::new(rank as u32, body, (rows, pairs), routes, self.top_k)?);
        }
        self.results.clear();
        for source in &sources {
            let header = Header {
                kind: Kind::Results,
                layer: self.layer as u16,
                step: self.step,
                rows: 0,
                pairs: source.pairs.len() as u32,
            };
            let mut results = Vec::new();
            if let Some(peer) = &mut self.peers[source.rank as usize] {
                results = peer.buffer();
                results.extend_from_slice(&header.encode());
            }
            self.results.push(results);
        }
        for used in self.intake.begin(sources) {
            if let Some(Some(peer)) = self.peers.get_mut(used.rank as usize) {
                peer.recycle(used.body);
            }
        }
        Ok(())
    }

    /// Adds a piece's results to their sources' answers and sends those that are whole.
    fn try_give(&mut self, backend: &mut dyn Backend, out: &Buffer) -> Result<()> {
        let row_bytes = self.capacity.row_bytes();
        let mut offset = 0;
        for span in &self.intake.spans {
            let results = &mut self.results[span.source];
            let (begin, bytes) = (results.len(), span.count * row_bytes);
            results.resize(begin + bytes, 0);
            backend.read(out, offset, &mut results[begin..])?;
            offset += bytes;
            let source = &self.intake.sources[span.source];
            if let Some(peer) = &mut self.peers[source.rank as usize]
                && results.len() == HEADER_BYTES + source.pairs.len() * row_bytes
            {
                peer.send(std::mem::take(results));
                peer.flush();
            }
        }
        Ok(())
    }

    /// Takes the answers of the ranks that were given something, and puts each result where its token and slot say.
    fn try_combine(&mut self, backend: &mut dyn Backend, y: &Buffer) -> Result<()> {
        let mut wanted = std::mem::take(&mut self.wanted);
        wanted.clear();
        wanted.extend(
            self.plan
                .destinations
                .iter()
                .map(|destination| !destination.pairs.is_empty()),
        );
        let waited = self.wait(Kind::Results, &wanted, true);
        self.wanted = wanted;
        waited?;
        for rank in 0..self.peers.len() {
            let pairs = self.plan.destinations[rank].pairs.len();
            if pairs == 0 {
                continue;
            }
            if self.peers[rank].is_none() {
                self.place(backend, y, rank, &self.results[rank])?;
                continue;
            }
            let Frame { header, body } = self.take(rank)?;
            if header.pairs as usize != pairs {
                return Err(TransportError::Protocol {
                    rank: rank as u32,
                    problem: format!("{} results for {pairs} pairs", header.pairs),
                });
            }
            self.place(backend, y, rank, &body)?;
            if let Some(peer) = &mut self.peers[rank] {
                peer.recycle(body);
            }
        }
        Ok(())
    }

    /// Writes results of `rank` to their rows of `y`, neighbouring rows at once.
    fn place(&self, backend: &mut dyn Backend, y: &Buffer, rank: usize, results: &[u8]) -> Result<()> {
        let row_bytes = self.capacity.row_bytes();
        let mut begin = 0;
        for stretch in self.plan.destinations[rank].origins.chunk_by(|a, b| a + 1 == *b) {
            let bytes = stretch.len() * row_bytes;
            backend.write(y, stretch[0] as usize * row_bytes, &results[begin..begin + bytes])?;
            begin += bytes;
        }
        Ok(())
    }
}

/// Pairs, then rows.
fn write_body(frame: &mut Vec<u8>, destination: &Destination, rows: &[u8], capacity: &Capacity) {
    for (row, expert) in &destination.pairs {
        frame.extend_from_slice(&row.to_le_bytes());
        frame.extend_from_slice(&expert.to_le_bytes());
    }
    let bytes = capacity.row_bytes();
    for &token in &destination.tokens {
        let start = token as usize * bytes;
        frame.extend_from_slice(&rows[start..start + bytes]);
    }
}
