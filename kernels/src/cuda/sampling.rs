//! Sampling on the device, with and without waiting: what rows list goes there and results come back by page-locked memory,
//! those of several steps at a time.

use std::collections::VecDeque;

use super::workspace::Slot;
use super::{CudaBackend, Event, Gpu, Pinned, as_bytes, shape};
use crate::backend::{Buffer, Limits, Result, SampleRow, Sampled};
use crate::ops::sample::cuda::histories::{HISTORY_WORDS, Histories};
use crate::ops::sample::cuda::lists::{self, Packed};
use crate::ops::sample::cuda::{self as sample, SampleLogprobs, SampleSpec};

/// Steps whose samples may be on their way at a time: one running, one queued, one being fetched.
const PENDING: usize = 3;

pub(super) struct Sampling {
    places: Vec<Place>,
    /// Places of what is on its way, the oldest first.
    pending: VecDeque<usize>,
    next: usize,
    /// The specs that the device has.
    sent: Vec<SampleSpec>,
    /// The tokens that it keeps.
    histories: Histories,
}

/// What belongs to the samples of one step while they are on their way.
struct Place {
    /// What rows list, on its way to the device.
    lists: Pinned,
    /// Tokens, then log-probabilities.
    results: Pinned,
    end: Event,
    /// Of each row, whether it has log-probabilities.
    wanted: Vec<bool>,
}

impl Sampling {
    pub(super) fn new(gpu: &Gpu, limits: &Limits) -> Result<Sampling> {
        let rows = limits.max_logit_rows.max(1);
        let place = || {
            Ok(Place {
                lists: Pinned::new(&gpu.device, 16)?,
                results: Pinned::new(&gpu.device, rows * (4 + SampleLogprobs::BYTES))?,
                end: Event::new(&gpu.device)?,
                wanted: Vec::with_capacity(rows),
            })
        };
        Ok(Sampling {
            places: (0..PENDING).map(|_| place()).collect::<Result<_>>()?,
            pending: VecDeque::with_capacity(PENDING),
            next: 0,
            sent: Vec::new(),
            histories: Histories::new(HISTORY_WORDS),
        })
    }
}

impl CudaBackend {
    /// Allocates what sampling from such a vocabulary needs.
    pub(super) fn reserve_sampling(&mut self, vocab: usize) -> Result<sample::SampleTokens> {
        let rows = self.limits.max_logit_rows.max(1);
        let bytes = lists::bytes(rows, vocab);
        if self.sampling.places[0].lists.bytes() < bytes {
            self.gpu.stream.wait(&self.gpu.device)?;
            for place in &mut self.sampling.places {
                place.lists = Pinned::new(&self.gpu.device, bytes)?;
            }
        }
        sample::params(&self.gpu, &mut self.workspace, rows, vocab)
    }

    /// Where the tokens of the last sampling are on the device; 0: nothing was sampled yet.
    pub(super) fn sampled_tokens(&self) -> u64 {
        self.workspace
            .memory(Slot::Tokens)
            .map_or(0, |memory| memory.address)
    }

    pub(super) fn start_sampling(
        &mut self,
        logits: &Buffer,
        vocab: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<bool> {
        const OP: &str = "queue_sample";
        self.check_rows(OP, rows.len())?;
        if rows.is_empty() {
            // Nothing to draw; the step's end is waited for all the same.
            self.sampling.places[self.sampling.next].wanted.clear();
            self.leave_mark()?;
            return Ok(true);
        }
        let address = self.memory_of(OP, "logits", logits, rows.len() * vocab * 4)?;
        let mut params = self.reserve_sampling(vocab)?;
        let Sampling {
            places,
            next,
            histories,
            ..
        } = &mut self.sampling;
        let packed = lists::pack(rows, vocab, Some(histories), places[*next].lists.words_mut());
        if !packed.on_host.is_empty() {
            self.sampling.histories.forget_step();
            return Ok(false);
        }
        (params.positions, params.token_of) = (self.step.positions(), self.step.logit_rows());
        params.logits = address;
        self.queue_rows(params, &packed)?;
        self.leave_mark()?;
        Ok(true)
    }

    /// Samples rows `first`.. of `logits` and waits; those that the device does not take, on the host.
    pub(super) fn sample_now(
        &mut self,
        logits: &Buffer,
        vocab: usize,
        first: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<Sampled>> {
        const OP: &str = "sample";
        self.check_rows(OP, rows.len())?;
        let end = first
            .saturating_add(rows.len())
            .saturating_mul(vocab)
            .saturating_mul(4);
        let mut params = self.reserve_sampling(vocab)?;
        params.logits = self.memory_of(OP, "logits", logits, end)? + (first * vocab * 4) as u64;
        let area = self.sampling.places[self.sampling.next].lists.words_mut();
        let packed = lists::pack(rows, vocab, None, area);
        self.queue_rows(params, &packed)?;
        let place = self.sampling.next;
        self.leave_mark()?;
        self.sampling.pending.pop_back();
        let mut sampled = self.results(place)?;
        for row in packed.on_host {
            let mut bytes = vec![0; vocab * 4];
            let memory = &self.buffers[&logits.handle];
            self.gpu.read(memory, (first + row) * vocab * 4, &mut bytes)?;
            let values = bytes.as_chunks::<4>().0;
            let values: Vec<f32> = values.iter().map(|x| f32::from_le_bytes(*x)).collect();
            sampled[row] = sample::on_host(&values, &rows[row]);
        }
        Ok(sampled)
    }

    fn check_rows(&self, op: &'static str, rows: usize) -> Result<()> {
        if rows > self.limits.max_logit_rows.max(1) {
            let most = format!("at most {}", self.limits.max_logit_rows);
            return Err(shape(op, "rows", rows, most));
        }
        if self.sampling.pending.len() == PENDING {
            let fewer = format!("fewer than {PENDING}");
            return Err(shape(op, "steps not fetched", PENDING, fewer));
        }
        Ok(())
    }

    /// Queues what was packed into the next place, and the copies around it.
    fn queue_rows(&mut self, params: sample::SampleTokens, packed: &Packed) -> Result<()> {
        let (device, stream) = (&self.gpu.device, &self.gpu.stream);
        // As in `Memory::read`: threads that share a context share its queue of copies.
        let in_turns = self.exchange().is_some_and(|exchange| !exchange.recordable());
        let place = &mut self.sampling.places[self.sampling.next];
        if packed.specs != self.sampling.sent {
            if let Some(memory) = self.workspace.memory(Slot::Specs) {
                self.gpu.write(memory, 0, as_bytes(&packed.specs))?;
            }
            self.sampling.sent.clone_from(&packed.specs);
        }
        if packed.words > 0
            && let Some(memory) = self.workspace.memory(Slot::SampleLists)
        {
            if in_turns {
                stream.wait(device)?;
            }
            memory.start_write(device, stream, &place.lists.slice()[..packed.words * 4])?;
        }
        sample::sample(&self.gpu, &params, &packed.specs)?;
        if in_turns {
            stream.wait(device)?;
        }
        place.wanted.clear();
        place
            .wanted
            .extend(packed.specs.iter().map(SampleSpec::wants_logprobs));
        let (tokens, logprobs) = place
            .results
            .slice_mut()
            .split_at_mut(self.limits.max_logit_rows.max(1) * 4);
        let rows = packed.specs.len();
        if let Some(memory) = self.workspace.memory(Slot::Tokens) {
            memory.start_read(device, stream, &mut tokens[..rows * 4])?;
        }
        let last = place.wanted.iter().rposition(|wanted| *wanted);
        if let (Some(last), Some(memory)) = (last, self.workspace.memory(Slot::SampleLogprobs)) {
            memory.start_read(
                device,
                stream,
                &mut logprobs[..(last + 1) * SampleLogprobs::BYTES],
            )?;
        }
        Ok(())
    }

    /// What is fetched next has happened when everything queued so far has.
    fn leave_mark(&mut self) -> Result<()> {
        let next = self.sampling.next;
        self.sampling.places[next]
            .end
            .record(&self.gpu.device, &self.gpu.stream)?;
        self.sampling.pending.push_back(next);
        self.sampling.next = (next + 1) % PENDING;
        Ok(())
    }

    /// Whether the oldest sampling has ended.
    pub(super) fn sampling_ended(&mut self) -> Result<bool> {
        self.gpu.device.enter()?;
        match self.sampling.pending.front() {
            Some(place) => self.sampling.places[*place].end.happened(&self.gpu.device),
            None => Ok(true),
        }
    }

    pub(super) fn finish_sampling(&mut self) -> Result<Vec<Sampled>> {
        let place = self.sampling.pending.pop_front();
        self.results(place.ok_or_else(|| shape("sampled", "queued steps", 0, "1 or more"))?)
    }

    /// Waits for the place's results.
    fn results(&mut self, place: usize) -> Result<Vec<Sampled>> {
        let place = &self.sampling.places[place];
        place.end.wait(&self.gpu.device)?;
        self.check_exchange()?;
        let (tokens, logprobs) = place
            .results
            .slice()
            .split_at(self.limits.max_logit_rows.max(1) * 4);
        let rows = tokens
            .as_chunks::<4>()
            .0
            .iter()
            .zip(logprobs.as_chunks::<{ SampleLogprobs::BYTES }>().0);
        Ok(rows
            .zip(&place.wanted)
            .map(|((token, logprobs), wanted)| {
                let logprobs = wanted.then(|| SampleLogprobs::read(logprobs));
                sample::result(u32::from_le_bytes(*token), logprobs)
            })
            .collect())
    }
}
