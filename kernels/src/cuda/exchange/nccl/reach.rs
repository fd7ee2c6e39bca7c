//! Which ranks' messages are mapped here: those of this host, as far as the driver maps them and they map this rank's.
//!
//! The handles go through the communicator, which only ranks have joined that proved themselves. Must stay true: both of a pair
//! come to the same answer, or one would wait for rows that the other has written elsewhere; a peer that cannot be mapped is
//! no failure: the library carries all; an epoch's messages lie where nobody may still write who was left behind in one before: it
//! may have been paused before its stores, and nobody can take its mapping away.

use super::Until;
use super::epoch::{Live, TOLD, Tally};
use super::messages::Places;
use crate::backend::Result;
use crate::cuda::exchange::MAX_RANKS;
use crate::cuda::exchange::peer::{OWN_BLOCK, PeerArea, PeerHandle, handle_of, host, process_id};
use crate::cuda::{Gpu, Memory};

const CARD: usize = PeerHandle::BYTES + 8;
const _: () = assert!(CARD <= TOLD);

/// What a rank says of itself: its handle and its host; without one it is of none.
fn card(handle: Option<&PeerHandle>) -> [u8; CARD] {
    let mut card = [0; CARD];
    if let Some(handle) = handle {
        card[..PeerHandle::BYTES].copy_from_slice(&handle.to_bytes());
        card[PeerHandle::BYTES..].copy_from_slice(&host().to_le_bytes());
    }
    card
}

/// The handle, if it can be one of this host, of at least `bytes` bytes.
fn here(card: &[u8], bytes: usize) -> Option<PeerHandle> {
    let (handle, theirs) = card.split_at(PeerHandle::BYTES);
    let handle = PeerHandle::from_bytes(handle)?;
    let known = host() != 0 && theirs == host().to_le_bytes();
    (known && handle.area_bytes >= bytes as u64).then_some(handle)
}

/// Ranks that say they have mapped `rank`, of `reached`, which it has mapped itself; `said`: a mask of each.
fn both(said: &[u8], rank: u32, reached: u64) -> u64 {
    let masks = said
        .as_chunks::<8>()
        .0
        .iter()
        .map(|mask| u64::from_le_bytes(*mask));
    let theirs = (0..).zip(masks).filter(|(_, mask)| mask >> rank & 1 == 1);
    theirs.fold(0, |all, (peer, _): (u32, u64)| all | 1 << peer) & reached
}

/// This rank's messages and results.
pub(super) struct OwnMessages {
    pub(super) memory: Memory,
    /// For ranks of this host; none: the driver gives none.
    handle: Option<PeerHandle>,
    /// Processes that wrote into them in their last epoch.
    writers: Vec<u64>,
}

impl OwnMessages {
    pub(super) fn new(gpu: &Gpu, bytes: usize) -> Result<OwnMessages> {
        let memory = gpu.alloc(bytes.next_multiple_of(OWN_BLOCK), "messages of the exchange")?;
        Ok(OwnMessages {
            handle: handle_of(gpu, &memory).ok(),
            memory,
            writers: Vec::new(),
        })
    }

    /// For an epoch of ranks of `processes`, each of which has left those before. False: they are where they were.
    pub(super) fn renew(&mut self, gpu: &Gpu, processes: &[u64]) -> Result<bool> {
        if self.writers.iter().all(|writer| processes.contains(writer)) {
            return Ok(false);
        }
        *self = OwnMessages::new(gpu, self.memory.bytes)?;
        Ok(true)
    }

    /// Who writes into them in the epoch, `straight` of ranks of `processes`. A thread of this one is not paused alone.
    fn written_by(&mut self, straight: u64, processes: &[u64]) {
        let ranks = processes.iter().enumerate();
        let others = ranks.filter(|(rank, process)| straight >> rank & 1 == 1 && **process != process_id());
        self.writers = others.map(|(_, process)| *process).collect();
    }
}

/// Maps them into `peers`, and tells the epoch, whose ranks are of `processes`. Of `own` so many bytes are in use.
pub(super) fn reach(
    gpu: &Gpu,
    tally: &Tally<'_>,
    (live, peers): (&mut Live, &mut Vec<PeerArea>),
    (own, bytes): (&mut OwnMessages, usize),
    processes: &[u64],
    until: Until<'_>,
) -> Result<()> {
    let rank = live.communicator.rank;
    let said = live.tell(gpu, tally, &card(own.handle.as_ref()), until)?;
    let handles: Vec<_> = said.chunks_exact(CARD).map(|card| here(card, bytes)).collect();
    // Who is gone keeps its memory while it is mapped.
    peers.retain(|known| handles.contains(&Some(known.handle)));
    let (mut area, mut reached) = ([0; MAX_RANKS], 0);
    for (peer, handle) in handles.into_iter().enumerate() {
        let Some(handle) = handle.filter(|_| peer != rank as usize) else {
            continue;
        };
        if !peers.iter().any(|known| known.handle == handle) {
            peers.extend(PeerArea::open(gpu, &handle));
        }
        if let Some(known) = peers.iter().find(|known| known.handle == handle) {
            (area[peer], reached) = (known.address + Places::THERE, reached | 1 << peer);
        }
    }
    let said = live.tell(gpu, tally, &u64::to_le_bytes(reached), until)?;
    live.straight = both(&said, rank, reached);
    live.connected.params.area = area;
    own.written_by(live.straight, processes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_straight_only_if_both_say_so() {
        // Rank 1 mapped 0 and 2; 0 mapped 1 and 2, 2 only 0, 3 says so of 1 without being mapped.
        let said: Vec<u8> = [0b0110u64, 0b0101, 0b0001, 0b0010]
            .iter()
            .flat_map(|mask| mask.to_le_bytes())
            .collect();
        assert_eq!(both(&said, 1, 0b0101), 0b0001);
        assert_eq!(both(&said, 0, 0b0110), 0b0110);
    }

    #[test]
    fn only_a_large_enough_handle_of_this_host_is_taken() {
        let mut bytes = [7; PeerHandle::BYTES];
        bytes[88..96].copy_from_slice(&4096u64.to_le_bytes());
        let handle = PeerHandle::from_bytes(&bytes).unwrap();
        let mut card = card(Some(&handle));
        assert_eq!(here(&card, 4096), (host() != 0).then_some(handle));
        assert_eq!(here(&card, 4097), None);
        card[PeerHandle::BYTES] ^= 1;
        assert_eq!(here(&card, 1), None);
        assert_eq!(here(&super::card(None), 0), None);
    }
}
