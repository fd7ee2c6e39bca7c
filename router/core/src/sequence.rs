//! One sequence and where it stands.
//!
//! ```text
//!              submit                admit                   stop token, length, End, error
//!   (nothing) ────────► Waiting ───────────────► Running ───────────────────────────────────► gone
//!                        ▲   │                      │
//!                        │   └── End, result of a   │ preempted, epoch ended
//!                        │       step in flight     │
//!                        │       that finishes it   │
//!                        │       ─────────► gone    │
//!                        └──────────────────────────┘
//! ```
//!
//! | state | slot | lease | steps in flight may sample it | next run |
//! |---|---|---|---|---|
//! | Waiting | no | no | only right after a preemption; not admitted before they are back | - |
//! | Running, prefill (`!decoding`) | yes | all known tokens | no | the next chunk of known tokens, from `ready` on |
//! | Running, decode | yes | grows by the page | yes | the token its slot sampled last |
//! | Running, length reached in flight | yes | yes | yes | none |
//! | Running, masked | yes | yes | at most one | none before the mask of the next position |
//!
//! Must stay true: `tokens` are the prompt and exactly what was delivered; `sent` positions have been given to steps,
//! and the next run starts there; what is sampled goes to position `tokens.len()`.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::api::{Sampling, SequenceId, Slot, Submit, Usage};
use crate::cache::Lease;
use crate::planted::{Bug, planted};
use crate::queue::Turn;
use crate::radix::Salt;

/// Index of a sequence in [`Sequences`]; used again after the sequence has ended, so whoever keeps one over time
/// keeps the id beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key(pub(crate) u32);

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) turn: Turn,
    /// Prompt, then generated.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_tokens: u32,
    pub(crate) sampling: Arc<Sampling>,
    pub(crate) stop_tokens: Arc<[u32]>,
    pub(crate) max_new_tokens: u32,
    pub(crate) min_new_tokens: u32,
    pub(crate) salt: Salt,
    pub(crate) prompt_logprobs: Option<u32>,
    /// Position of the next prompt token whose log-probability is to be delivered.
    pub(crate) next_prompt_logprob: u32,
    pub(crate) masked: bool,
    /// The mask for position `tokens.len()`, kept until the token is there: a failed step needs it again.
    pub(crate) mask: Option<Arc<[u8]>>,
    /// Prompt tokens taken from the cache when it was first admitted.
    pub(crate) cached_tokens: Option<u32>,
    /// Samples that steps in flight will bring.
    pub(crate) in_flight: u32,
    pub(crate) state: State,
}

#[derive(Debug)]
pub(crate) enum State {
    Waiting {
        /// This sequence is computing the prefix that is wanted.
        for_prefix_of: Option<SequenceId>,
    },
    Running(Running),
}

#[derive(Debug)]
pub(crate) struct Running {
    /// Index of its worker in the epoch.
    pub(crate) member: usize,
    pub(crate) slot: Slot,
    pub(crate) lease: Lease,
    /// Positions computed, or given to a step that will.
    pub(crate) sent: u32,
    /// Its slot has been told to sample.
    pub(crate) decoding: bool,
    /// First step (serial number) that may run it: the one after the last that fills its cached pages.
    pub(crate) ready: u64,
    /// Last step (serial number) that ran it.
    pub(crate) last_step: u64,
    /// What it adds to the load of its worker, beside `prefill_left`.
    pub(crate) load: u64,
    pub(crate) prefill_left: u64,
    /// Pages of its lease that others may use. Further ones in the lease's path are announced.
    pub(crate) shared: u32,
}

impl Sequence {
    pub(crate) fn new(submit: Submit, turn: Turn, salt: Salt) -> Sequence {
        let mut tokens = Vec::with_capacity(submit.prompt.len() + submit.generated.len());
        tokens.extend_from_slice(&submit.prompt);
        tokens.extend_from_slice(&submit.generated);
        Sequence {
            id: submit.id,
            turn,
            tokens,
            prompt_tokens: submit.prompt.len() as u32,
            sampling: submit.sampling,
            stop_tokens: submit.stop_tokens,
            max_new_tokens: submit.max_new_tokens,
            min_new_tokens: submit.min_new_tokens,
            salt,
            prompt_logprobs: submit.prompt_logprobs,
            next_prompt_logprob: 1,
            masked: submit.masked,
            mask: submit.first_mask.filter(|_| submit.masked),
            cached_tokens: None,
            in_flight: 0,
            state: State::Waiting { for_prefix_of: None },
        }
    }

    pub(crate) fn len(&self) -> u32 {
        self.tokens.len() as u32
    }

    pub(crate) fn generated(&self) -> u32 {
        self.len() - self.prompt_tokens
    }

    /// All tokens that may be sampled have been, or will be by steps in flight.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.generated() + self.in_flight >= self.max_new_tokens
    }

    /// The stop token that ends the sequence as it is now.
    pub(crate) fn stopped_by(&self) -> Option<u32> {
        let last = *self.tokens.last()?;
        (self.generated() > self.min_new_tokens && self.stop_tokens.contains(&last)).then_some(last)
    }

    /// The next position may be sampled now.
    pub(crate) fn may_sample(&self) -> bool {
        !self.masked || (self.in_flight == 0 && self.mask.is_some())
    }

    /// A prompt token's log-probability is still to be delivered.
    pub(crate) fn wants_prompt_logprobs(&self) -> bool {
        self.prompt_logprobs.is_some() && self.next_prompt_logprob < self.prompt_tokens
    }

    /// Tokens that may come from the cache: at least one is computed, for its logits, and so is every one before a
    /// prompt token whose log-probability is wanted.
    pub(crate) fn cacheable_tokens(&self) -> u32 {
        let all_but_one = self.len() - u32::from(!planted(Bug::CacheWholePrompt));
        match self.wants_prompt_logprobs() {
            true => all_but_one.min(self.next_prompt_logprob - 1),
            false => all_but_one,
        }
    }

    /// Positions whose KV it may ever need: all but the last token's.
    pub(crate) fn positions_max(&self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.max_new_tokens) - 1
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens.unwrap_or(0),
            generated_tokens: self.generated(),
        }
    }

    pub(crate) fn running(&self) -> Option<&Running> {
        match &self.state {
            State::Running(running) => Some(running),
            State::Waiting { .. } => None,
        }
    }

    /// Still computing pages that it has announced.
    pub(crate) fn is_filling(&self) -> bool {
        let unfilled = |running: &Running| (running.shared as usize) < running.lease.path.len();
        self.running().is_some_and(unfilled)
    }
}

/// All sequences that have not ended.
#[derive(Debug, Default)]
pub(crate) struct Sequences {
    all: Vec<Option<Sequence>>,
    unused: Vec<Key>,
    by_id: BTreeMap<SequenceId, Key>,
}

impl Sequences {
    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(crate) fn insert(&mut self, sequence: Sequence) -> Key {
        let key = self.unused.pop().unwrap_or(Key(self.all.len() as u32));
        let before = self.by_id.insert(sequence.id, key);
        assert!(before.is_none(), "the shell never uses a sequence number twice");
        match self.all.get_mut(key.0 as usize) {
            Some(place) => *place = Some(sequence),
            None => self.all.push(Some(sequence)),
        }
        key
    }

    pub(crate) fn remove(&mut self, key: Key) -> Sequence {
        let sequence = self.all[key.0 as usize].take().expect("a live sequence");
        self.by_id.remove(&sequence.id);
        self.unused.push(key);
        sequence
    }

    /// Steps in flight are gone: nothing comes back from them.
    pub(crate) fn forget_samples_in_flight(&mut self) {
        for sequence in self.all.iter_mut().flatten() {
            sequence.in_flight = 0;
        }
    }

    pub(crate) fn find(&self, id: SequenceId) -> Option<Key> {
        self.by_id.get(&id).copied()
    }

    /// The sequence behind a key kept over time, if it still lives.
    pub(crate) fn get(&self, key: Key, id: SequenceId) -> Option<&Sequence> {
        self.all
            .get(key.0 as usize)?
            .as_ref()
            .filter(|sequence| sequence.id == id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.all.iter().flatten()
    }
}

impl std::ops::Index<Key> for Sequences {
    type Output = Sequence;

    fn index(&self, key: Key) -> &Sequence {
        self.all[key.0 as usize].as_ref().expect("a live sequence")
    }
}

impl std::ops::IndexMut<Key> for Sequences {
    fn index_mut(&mut self, key: Key) -> &mut Sequence {
        self.all[key.0 as usize].as_mut().expect("a live sequence")
    }
}
