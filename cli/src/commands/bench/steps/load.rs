//! A group of ranks under steps of decode or prefill.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use conclave_kernels::backend::Ceilings;
use conclave_proto::cluster::v1 as wire;
use conclave_worker::device::MAX_IN_FLIGHT;
use conclave_worker::verify::{LocalGroup, Looks, greedy, run as run_of, start as start_of};

use super::super::profile;
use super::Phase;

/// Each figure is the median of at least so many steps, for at least so long.
const LEAST_STEPS: usize = 5;
const MEASURE: Duration = Duration::from_secs(3);
/// Steps that are not counted: clocks rise.
const WARM: usize = 4;
/// Tokens that are decoded at most while measuring.
pub(super) const DECODE_ROOM: usize = 192;

pub(super) struct Load {
    ranks: LocalGroup,
    workers: usize,
    pages_each: usize,
    context: usize,
    vocab: u32,
    /// Steps that the last measurement took.
    steps: usize,
}

impl Load {
    pub(super) fn new(
        ranks: LocalGroup,
        workers: usize,
        pages_each: usize,
        context: usize,
        vocab: u32,
    ) -> Load {
        Load {
            ranks,
            workers,
            pages_each,
            context,
            vocab,
            steps: 0,
        }
    }

    /// Sequence `index` lives on rank `index % workers`.
    fn start(&self, index: usize, prompt: usize) -> wire::SlotStart {
        let slot = (index / self.workers) as u32;
        let first = slot as usize * self.pages_each;
        let pages = (first..first + self.pages_each).map(|page| page as u32).collect();
        start_of(slot, pages, prompt, greedy())
    }

    fn tokens(&self, count: usize, salt: usize) -> Vec<u32> {
        (0..count)
            .map(|i| ((i * 7919 + salt * 104_729 + 13) as u32) % self.vocab)
            .collect()
    }

    fn decode_step(&self, sequences: usize, position: usize) -> Vec<wire::Step> {
        let mut steps = vec![wire::Step::default(); self.workers];
        for index in 0..sequences {
            let slot = (index / self.workers) as u32;
            steps[index % self.workers]
                .runs
                .push(run_of(slot, position, &[], true));
        }
        steps
    }

    fn prefill_step(&self, tokens: usize, again: bool, salt: usize) -> Vec<wire::Step> {
        let mut steps = vec![wire::Step::default(); self.workers];
        if again {
            steps[0].end_slots.push(0);
        }
        steps[0].start_slots.push(self.start(0, tokens));
        steps[0].runs.push(run_of(0, 0, &self.tokens(tokens, salt), true));
        steps
    }

    /// Gives each sequence its context, one on each rank at a time, then times steps of one token each: seconds of both.
    pub(super) fn decode(&mut self, sequences: usize) -> Result<(Vec<f64>, Vec<f64>)> {
        let mut first = Vec::with_capacity(sequences);
        for begin in (0..sequences).step_by(self.workers) {
            let began = Instant::now();
            let mut steps = vec![wire::Step::default(); self.workers];
            let together = begin..sequences.min(begin + self.workers);
            for index in together.clone() {
                let step = &mut steps[index % self.workers];
                step.start_slots.push(self.start(index, self.context));
                let slot = (index / self.workers) as u32;
                step.runs
                    .push(run_of(slot, 0, &self.tokens(self.context, index), true));
            }
            self.ranks.step(steps, false)?;
            first.extend(together.map(|_| began.elapsed().as_secs_f64()));
        }
        let context = self.context;
        let steps = self.timed(DECODE_ROOM, |load, step| {
            load.decode_step(sequences, context + step)
        })?;
        Ok((first, steps))
    }

    /// The same prompt again and again, each time on a fresh slot; ranks without a share take part.
    pub(super) fn prefill(&mut self, tokens: usize) -> Result<Vec<f64>> {
        self.timed(usize::MAX, |load, step| load.prefill_step(tokens, step > 0, step))
    }

    /// Seconds between the ends of steps that are sent ahead, at most `most` of them.
    fn timed(&mut self, most: usize, step: impl Fn(&Load, usize) -> Vec<wire::Step>) -> Result<Vec<f64>> {
        let mut times = Vec::new();
        let (mut sent, mut began) = (0, Instant::now());
        let mut last = began;
        for done in 0..most {
            while sent < most.min(done + MAX_IN_FLIGHT) {
                let steps = step(self, sent);
                self.ranks.submit(steps, &Looks::Nothing);
                sent += 1;
            }
            self.ranks.collect()?;
            let now = Instant::now();
            if done < WARM {
                began = now;
            } else {
                times.push((now - last).as_secs_f64());
            }
            last = now;
            if times.len() >= LEAST_STEPS && began.elapsed() > MEASURE {
                break;
            }
        }
        for _ in times.len() + WARM..sent {
            self.ranks.collect()?;
        }
        self.steps = sent;
        Ok(times)
    }

    /// The first `sequences` slots.
    pub(super) fn end(&mut self, sequences: usize) -> Result<()> {
        let mut steps = vec![wire::Step::default(); self.workers];
        for index in 0..sequences {
            steps[index % self.workers]
                .end_slots
                .push((index / self.workers) as u32);
        }
        self.ranks.step(steps, false)?;
        Ok(())
    }

    /// What the device is and what it reaches.
    pub(super) fn device_facts(&mut self) -> Result<(String, Ceilings)> {
        let (give, take) = std::sync::mpsc::channel();
        self.ranks.work(0, move |rank| {
            let about = rank.executor.describe_backend();
            let ceilings = rank.executor.backend().measure_ceilings();
            let ceilings = ceilings.map_err(|error| error.to_string())?;
            // The other end waits for it.
            let _ = give.send((about, ceilings));
            Ok(())
        })?;
        let (about, ceilings) = take.recv()?;
        Ok((
            about,
            ceilings.ok_or_else(|| anyhow!("this device measures no ceilings"))?,
        ))
    }

    /// A table of the kernels of one step more, for each rank.
    pub(super) fn profiled(&mut self, phase: Phase, batch: usize) -> Result<()> {
        let steps = match phase {
            Phase::Decode => self.decode_step(batch, self.context + self.steps),
            Phase::Prefill => self.prefill_step(batch, true, 0),
        };
        for rank in 0..self.workers {
            self.ranks.work(rank, |rank| {
                let started = rank.executor.backend().start_profile();
                started.map_err(|error| error.to_string())
            })?;
        }
        self.ranks.step(steps, false)?;
        for rank in 0..self.workers {
            let (give, take) = std::sync::mpsc::channel();
            self.ranks.work(rank, move |rank| {
                let kernels = rank.executor.backend().take_profile();
                let _ = give.send(kernels.map_err(|error| error.to_string())?);
                Ok(())
            })?;
            let whose = match self.workers {
                1 => String::new(),
                _ => format!(" on rank {rank}, waits for the others included"),
            };
            profile::print(&format!("one step of {phase:?} {batch}{whose}"), &take.recv()?);
        }
        Ok(())
    }
}
