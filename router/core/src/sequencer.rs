//! The state of the sequencer, and the one way in: an event changes it and yields commands.
//!
//! The parts: `requests` (clients' events), `epochs` (workers' coming and going), `results` (what steps bring),
//! `admission` and `schedule` (the next step). After every event the core looks whether the group must change and
//! sends steps as long as there is something to run and fewer than `steps_in_flight` are out.

use std::collections::{BTreeMap, VecDeque};

use crate::api::{ClusterState, Command, CoreConfig, Epoch, Event, Micros, SequenceId, Slot, WorkerId};
use crate::cache::{Cache, Lookup};
use crate::member::{Attached, Member};
use crate::queue::Queue;
use crate::rates::{ServiceRate, StepTimes};
use crate::sequence::{Key, Sequences};

/// The sequencer of one group.
#[derive(Debug)]
pub struct Core {
    pub(crate) config: CoreConfig,
    pub(crate) now: Micros,
    pub(crate) out: Vec<Command>,
    pub(crate) sequences: Sequences,
    pub(crate) queue: Queue,
    pub(crate) cache: Cache,
    pub(crate) attached: BTreeMap<WorkerId, Attached>,
    pub(crate) phase: Phase,
    pub(crate) epoch: Epoch,
    /// Of the current epoch, in order of rank; empty without one.
    pub(crate) members: Vec<Member>,
    pub(crate) deadline: Micros,
    pub(crate) in_flight: VecDeque<StepInFlight>,
    /// Steps have serial numbers that go on over epochs; the epoch's step 0 has `first_serial`.
    pub(crate) next_serial: u64,
    pub(crate) first_serial: u64,
    /// No more steps in this epoch: it ends when those in flight are back.
    pub(crate) switching: bool,
    pub(crate) draining: Draining,
    pub(crate) submissions: u64,
    pub(crate) rate: ServiceRate,
    pub(crate) step_times: StepTimes,
    pub(crate) counters: Counters,
    pub(crate) lookup: Lookup,
    pub(crate) announced_state: ClusterState,
}

/// Where the group stands; see `epochs` for the transitions.
#[derive(Debug)]
pub(crate) enum Phase {
    Starting,
    Forming { ready: Vec<bool>, since: Micros },
    Serving { since: Micros },
    Parked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Draining {
    No,
    Asked,
    Done,
}

/// A step that was sent and has not come back from all ranks.
#[derive(Debug)]
pub(crate) struct StepInFlight {
    pub(crate) serial: u64,
    /// When it was sent, or became the oldest in flight if that was later.
    pub(crate) since: Micros,
    /// The most tokens that a rank has in it.
    pub(crate) tokens: u32,
    /// How long it may be the oldest in flight.
    pub(crate) stall: Micros,
    /// By rank; taken when the rank reports.
    pub(crate) runs: Vec<Vec<RunInFlight>>,
    pub(crate) reported: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct RunInFlight {
    pub(crate) slot: Slot,
    pub(crate) key: Key,
    pub(crate) id: SequenceId,
    pub(crate) sample: bool,
    /// Position after the run's last token: what is sampled goes there.
    pub(crate) end: u32,
}

/// Totals since the start.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) steps: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) generated_tokens: u64,
    pub(crate) prefix_queries: u64,
    pub(crate) prefix_hits: u64,
    pub(crate) preemptions: u64,
    pub(crate) rejections: u64,
    pub(crate) finished: u64,
    pub(crate) failed_epochs: u64,
}

impl Core {
    /// A group without workers.
    ///
    /// # Panics
    /// If a limit in `config` is 0 (the shell checks its flags), except `max_waiting`.
    pub fn new(config: CoreConfig) -> Core {
        let limits = [
            ("page_tokens", config.page_tokens),
            ("experts", config.experts),
            ("expected_workers", config.expected_workers),
            ("max_num_seqs", config.max_num_seqs),
            ("max_num_batched_tokens", config.max_num_batched_tokens),
            ("max_model_len", config.max_model_len),
            ("steps_in_flight", config.steps_in_flight),
        ];
        for (name, limit) in limits {
            assert!(limit > 0, "{name} must be at least 1");
        }
        Core {
            now: Micros(0),
            out: Vec::new(),
            sequences: Sequences::default(),
            queue: Queue::new(config.max_waiting),
            cache: Cache::new(config.page_tokens),
            attached: BTreeMap::new(),
            phase: Phase::Starting,
            epoch: Epoch(0),
            members: Vec::new(),
            deadline: config.collective_deadline_floor,
            in_flight: VecDeque::new(),
            next_serial: 1,
            first_serial: 1,
            switching: false,
            draining: Draining::No,
            submissions: 0,
            rate: ServiceRate::default(),
            step_times: StepTimes::default(),
            counters: Counters::default(),
            lookup: Lookup::default(),
            announced_state: ClusterState::Starting,
            config,
        }
    }

    /// Takes in one event at time `now` and returns what is to be done about it, in order.
    pub fn handle(&mut self, now: Micros, event: Event) -> Vec<Command> {
        let mut commands = Vec::new();
        self.handle_into(now, event, &mut commands);
        commands
    }

    /// Like [`Core::handle`], appending to `commands`.
    pub fn handle_into(&mut self, now: Micros, event: Event, commands: &mut Vec<Command>) {
        self.now = self.now.max(now);
        std::mem::swap(&mut self.out, commands);
        match event {
            Event::Submit(submit) => self.submit(submit),
            Event::End { id, reason } => self.end(id, reason),
            Event::Mask { id, position, mask } => self.mask(id, position, mask),
            Event::WorkerAttached { worker, info } => self.attach(worker, info),
            Event::WorkerReady { worker, epoch } => self.ready(worker, epoch),
            Event::StepDone {
                worker,
                epoch,
                step,
                result,
            } => self.step_done(worker, epoch, step, result),
            Event::StepFailed {
                worker,
                epoch,
                step,
                suspect,
                slot,
            } => self.step_failed(worker, epoch, step, suspect, slot),
            Event::WorkerLost { worker } => self.lost(worker),
            Event::Notice { worker, deadline } => self.notice(worker, deadline),
            Event::Drain => self.drain(),
            Event::Tick => self.watch(),
        }
        self.reconsider_group();
        self.send_steps();
        self.announce_state();
        self.announce_drained();
        std::mem::swap(&mut self.out, commands);
    }

    fn send_steps(&mut self) {
        while matches!(self.phase, Phase::Serving { .. })
            && !self.switching
            && self.in_flight.len() < self.config.steps_in_flight as usize
        {
            if !self.send_step() {
                return;
            }
        }
    }

    pub(crate) fn state(&self) -> ClusterState {
        match self.phase {
            Phase::Starting => ClusterState::Starting,
            Phase::Forming { .. } => ClusterState::Forming { epoch: self.epoch },
            Phase::Serving { .. } => ClusterState::Serving {
                epoch: self.epoch,
                ranks: self.members.len() as u32,
            },
            Phase::Parked => ClusterState::Parked,
        }
    }

    fn announce_state(&mut self) {
        let state = self.state();
        if state != self.announced_state {
            self.announced_state = state;
            self.out.push(Command::State(state));
        }
    }

    fn announce_drained(&mut self) {
        if self.draining == Draining::Asked && self.sequences.len() == 0 {
            self.draining = Draining::Done;
            self.out.push(Command::Drained);
        }
    }

    /// Pages that hold `tokens` tokens.
    pub(crate) fn pages_for(&self, tokens: u64) -> u64 {
        tokens.div_ceil(u64::from(self.config.page_tokens))
    }
}
