//! Sampling without waiting: results of several steps on their way to the host.

use std::collections::VecDeque;

use super::workspace::Slot;
use super::{CudaBackend, Event, Gpu, Pinned, shape};
use crate::backend::{Buffer, Limits, Result, SampleRow, Sampled};
use crate::ops::sample::cuda as sample;

/// Steps whose samples may be on their way at a time: one running, one queued, one being fetched.
const PENDING: usize = 3;

pub(super) struct Sampling {
    slots: Vec<(Pinned, Event)>,
    pending: VecDeque<(usize, usize)>,
    next: usize,
    /// The specs that the device has.
    pub(super) sent: Vec<sample::SampleSpec>,
}

impl Sampling {
    pub(super) fn new(gpu: &Gpu, limits: &Limits) -> Result<Sampling> {
        let slot = || {
            Ok((
                Pinned::new(&gpu.device, limits.max_logit_rows.max(1) * 4)?,
                Event::new(&gpu.device)?,
            ))
        };
        let slots = (0..PENDING).map(|_| slot()).collect::<Result<_>>()?;
        Ok(Sampling {
            slots,
            pending: VecDeque::with_capacity(PENDING),
            next: 0,
            sent: Vec::new(),
        })
    }
}

impl CudaBackend {
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
        if !rows.iter().all(sample::on_device) {
            return Ok(false);
        }
        if rows.len() > self.limits.max_logit_rows {
            return Err(shape(
                OP,
                "rows",
                rows.len(),
                format!("at most {}", self.limits.max_logit_rows),
            ));
        }
        if self.sampling.pending.len() == PENDING {
            return Err(shape(
                OP,
                "steps not fetched",
                PENDING,
                format!("fewer than {PENDING}"),
            ));
        }
        if rows.is_empty() {
            // Nothing to draw; the step's end is waited for all the same.
            return self.leave_mark(0);
        }
        let address = self.memory_of(OP, "logits", logits, rows.len() * vocab * 4)?;
        let mut params = sample::params(&self.gpu, &mut self.workspace, self.limits.max_logit_rows, vocab)?;
        // The device knows the positions: specs change only when the rows do.
        let spec = |(i, row): (usize, &SampleRow<'_>)| sample::spec(row, 0, i);
        let specs: Vec<_> = rows.iter().enumerate().map(spec).collect();
        if specs != self.sampling.sent {
            sample::send_specs(&self.gpu, &self.workspace, &specs)?;
            self.sampling.sent = specs;
        }
        (params.positions, params.token_of) = (self.step.positions(), self.step.logit_rows());
        (params.logits, params.rows) = (address, rows.len() as i32);
        sample::sample(
            &self.gpu,
            &params,
            rows.iter().any(|row| row.params.temperature != 0.0),
        )?;
        if self.exchange().is_some_and(|exchange| !exchange.recordable()) {
            // As in `Memory::read`: threads that share a context share its queue of copies.
            self.gpu.stream.wait(&self.gpu.device)?;
        }
        let slot = self.sampling.next;
        let host = &mut self.sampling.slots[slot].0;
        if let Some(memory) = self.workspace.memory(Slot::Tokens) {
            memory.start_read(
                &self.gpu.device,
                &self.gpu.stream,
                &mut host.slice_mut()[..rows.len() * 4],
            )?;
        }
        self.leave_mark(rows.len())
    }

    /// What is fetched next has `rows` tokens and has happened when everything queued so far has.
    fn leave_mark(&mut self, rows: usize) -> Result<bool> {
        let slot = self.sampling.next;
        self.sampling.slots[slot]
            .1
            .record(&self.gpu.device, &self.gpu.stream)?;
        self.sampling.pending.push_back((slot, rows));
        self.sampling.next = (slot + 1) % PENDING;
        Ok(true)
    }

    /// Whether the oldest sampling has ended.
    pub(super) fn sampling_ended(&mut self) -> Result<bool> {
        self.gpu.device.enter()?;
        match self.sampling.pending.front() {
            Some((slot, _)) => self.sampling.slots[*slot].1.happened(&self.gpu.device),
            None => Ok(true),
        }
    }

    pub(super) fn finish_sampling(&mut self) -> Result<Vec<Sampled>> {
        let pending = self.sampling.pending.pop_front();
        let (slot, rows) = pending.ok_or_else(|| shape("sampled", "queued steps", 0, "1 or more"))?;
        let (host, event) = &self.sampling.slots[slot];
        event.wait(&self.gpu.device)?;
        self.check_exchange()?;
        let words = host.slice()[..rows * 4].as_chunks::<4>().0;
        Ok(words
            .iter()
            .map(|word| sample::result(u32::from_le_bytes(*word)))
            .collect())
    }
}
