//! An epoch over NCCL: who is in it, what a step fixes, and what the library carries between its ranks.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::communicator::Group;
use super::messages::Places;
use super::watch::Watch;
use super::{Communicator, Until};
use crate::backend::{KernelError, Result};
use crate::cuda::exchange::connected::Connected;
use crate::cuda::exchange::control::Control;
use crate::cuda::exchange::{StepSizes, Tokens};
use crate::cuda::{Gpu, Memory, Stream, as_bytes, shape};

/// From so many rows on messages grow by as many, below by doubling.
const STRIDE: usize = 16;

pub(super) struct Live {
    pub(super) connected: Connected,
    pub(super) places: Places,
    /// Of a second piece that is under way at once; few tokens have none.
    pub(super) second: Option<(Connected, Places)>,
    pub(super) communicator: Arc<Communicator>,
    /// Ranks whose memory is mapped here, and this rank's there: a bit each.
    pub(super) straight: u64,
    /// Where this rank's message begins at each of them: a list of `MAX_RANKS` addresses in device memory.
    pub(super) at_peers: u64,
    pub(super) watch: Watch,
    pub(super) timeout: Duration,
    pub(super) step: Cell<Step>,
    /// Tokens of each rank in a step of many tokens.
    pub(super) counts: RefCell<Vec<usize>>,
}

/// What is fixed for a step.
#[derive(Clone, Copy)]
pub(super) struct Step {
    /// Tokens that each pair of ranks carries in an exchange of few.
    pub(super) few: usize,
    /// Tokens of a piece of many.
    pub(super) each: usize,
}

impl Live {
    /// The messages lie at `address`, and those of second pieces behind them.
    pub(super) fn move_to(&mut self, address: u64) {
        let first = self.places.sizes;
        self.places = first.at(address);
        if let Some((_, places)) = &mut self.second {
            *places = places.sizes.at(address + first.bytes() as u64);
        }
    }

    pub(super) fn begin(&self, gpu: &Gpu, tally: &Tally<'_>, sizes: &StepSizes) -> Result<()> {
        let sized = &self.connected.shape;
        let few = carried(sizes.largest, sized.few_tokens);
        let each = sizes.many.unwrap_or(sized.many_tokens);
        self.step.set(Step { few, each });
        if sizes.many.is_none() {
            return Ok(());
        }
        let counts = self.bounded(|until| self.agree(gpu, tally, sizes.tokens as u64, until))?;
        let mut kept = self.counts.borrow_mut();
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

    /// What steps in which this rank has `tokens` tokens may be, as far as their recordings differ.
    pub(super) fn recordings(&self, tokens: usize) -> Vec<StepSizes> {
        let sizes = |largest| StepSizes {
            largest,
            tokens,
            many: None,
        };
        let largest = largest_of(tokens, self.connected.shape.few_tokens);
        largest.into_iter().map(sizes).collect()
    }

    /// Tokens of `rank` in the piece.
    pub(super) fn tokens_of(&self, rank: u32, piece: usize) -> usize {
        let each = self.step.get().each;
        let counts = self.counts.borrow();
        let total = counts.get(rank as usize).copied().unwrap_or(0);
        total.saturating_sub(piece * each).min(each)
    }

    /// Of all ranks together.
    pub(super) fn rows(&self, piece: usize) -> usize {
        (0..self.communicator.ranks)
            .map(|rank| self.tokens_of(rank, piece))
            .sum()
    }

    pub(super) fn fits(&self, tokens: &Tokens, most: usize) -> Result<()> {
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

    /// Sends every other rank what `to` says, and takes in what `from` says, on `stream`: address and bytes.
    pub(super) fn carry(
        &self,
        stream: &Stream,
        to: impl Fn(u32) -> (u64, usize),
        from: impl Fn(u32) -> (u64, usize),
    ) -> Result<()> {
        let Communicator { rank, ranks, .. } = *self.communicator;
        if ranks == 1 {
            return Ok(());
        }
        let queue = |group: &Group<'_>| {
            // From the next rank on, so that not all begin with the same one.
            for distance in 1..ranks {
                let (next, last) = ((rank + distance) % ranks, (rank + ranks - distance) % ranks);
                let ((sent, bytes), (place, room)) = (to(next), from(last));
                // SAFETY: both inside the messages' memory, which the stream's kernels alone touch; it lives as long.
                unsafe {
                    group.send(sent, bytes, next, stream)?;
                    group.recv(place, room, last, stream)?;
                }
            }
            Ok(())
        };
        let grouped = self.bounded(|until| self.communicator.group(until, queue));
        grouped.map_err(|error| of_the_epoch((rank, ranks), error))
    }

    /// What the host waits for in a step ends with the epoch, or after its timeout.
    fn bounded<T>(&self, work: impl FnOnce(Until<'_>) -> T) -> T {
        work(Until {
            deadline: Instant::now() + self.timeout,
            cancelled: &|| self.watch.is_over(),
        })
    }

    /// Every rank's `word`.
    pub(super) fn agree(
        &self,
        gpu: &Gpu,
        tally: &Tally<'_>,
        word: u64,
        until: Until<'_>,
    ) -> Result<Vec<u64>> {
        let said = self.tell(gpu, tally, as_bytes(&[word]), until)?;
        let words = said.as_chunks::<8>().0.iter();
        Ok(words.map(|word| u64::from_le_bytes(*word)).collect())
    }

    /// What every rank says, one after the other: `own` is this one's, at most [`TOLD`] bytes and of all as many.
    pub(super) fn tell(&self, gpu: &Gpu, tally: &Tally<'_>, own: &[u8], until: Until<'_>) -> Result<Vec<u8>> {
        let Communicator { rank, ranks, .. } = *self.communicator;
        let each = own.len();
        let at = |rank: u32| tally.words.address + u64::from(rank) * each as u64;
        gpu.write(tally.words, rank as usize * each, own)?;
        if ranks > 1 {
            let grouped = self.communicator.group(until, |group| {
                for peer in (0..ranks).filter(|peer| *peer != rank) {
                    // SAFETY: a place of the tally each; the stream is waited for below.
                    unsafe {
                        group.send(at(rank), each, peer, &gpu.stream)?;
                        group.recv(at(peer), each, peer, &gpu.stream)?;
                    }
                }
                Ok(())
            });
            grouped.map_err(|error| of_the_epoch((rank, ranks), error))?;
        }
        let mark = self.watch.mark(gpu)?;
        while tally.control.done() < mark {
            if tally.control.is_aborted() {
                return Err(self.ended());
            }
            if (until.cancelled)() || Instant::now() > until.deadline {
                tally.control.expire();
                return Err(self.ended());
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        let mut said = vec![0; ranks as usize * each];
        gpu.read(tally.words, 0, &mut said)?;
        Ok(said)
    }

    /// Why a wait of the host for all ranks ended early.
    fn ended(&self) -> KernelError {
        let Communicator { rank, ranks, .. } = *self.communicator;
        KernelError::Exchange {
            peer: other((rank, ranks)),
            what: "not all ranks met in time before a step".into(),
        }
    }
}

/// Rows that an exchange of few carries for each rank, if the largest has `largest`: few sizes, so that few are recorded.
fn carried(largest: usize, most: usize) -> usize {
    let rows = match largest {
        ..=STRIDE => largest.max(1).next_power_of_two(),
        _ => largest.next_multiple_of(STRIDE),
    };
    rows.min(most)
}

/// For which largest ranks the steps of a rank with `tokens` tokens are recorded beforehand: one that has about as many, or the
/// next size. Ranks differ by little; what is rarer is recorded when it comes.
fn largest_of(tokens: usize, most: usize) -> Vec<usize> {
    let first = carried(tokens, most);
    let mut largest = vec![first, carried(first + 1, most)];
    largest.dedup();
    largest
}

/// Who is to blame when the library does not say: with one peer it was that, else nobody knows.
fn other((rank, ranks): (u32, u32)) -> u32 {
    if ranks == 2 { 1 - rank } else { u32::MAX }
}

/// The library's errors end the epoch; the device is well, or its next call says otherwise.
pub(super) fn of_the_epoch(place: (u32, u32), error: KernelError) -> KernelError {
    match error {
        KernelError::Device { what, .. } => KernelError::Exchange {
            peer: other(place),
            what,
        },
        error => error,
    }
}

/// Most bytes that a rank tells the others at once.
pub(super) const TOLD: usize = 144;

/// Where the ranks tell each other how many tokens they have, and how the host learns that they did.
pub(super) struct Tally<'a> {
    /// [`TOLD`] bytes of each of `MAX_RANKS`.
    pub(super) words: &'a Memory,
    pub(super) control: &'a Control,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_recorded_for_the_sizes_that_the_largest_rank_may_give_it() {
        for (tokens, most, expected) in [
            (0, 128, vec![1, 2]),
            (1, 128, vec![1, 2]),
            (2, 128, vec![2, 4]),
            (5, 128, vec![8, 16]),
            (16, 128, vec![16, 32]),
            (33, 128, vec![48, 64]),
            (112, 128, vec![112, 128]),
            (113, 128, vec![128]),
            (20, 25, vec![25]),
        ] {
            let largest = largest_of(tokens, most);
            assert_eq!(largest, expected, "{tokens} of {most}");
            // Each is the size of its own steps.
            assert!(largest.iter().all(|largest| carried(*largest, most) == *largest));
        }
    }
}
