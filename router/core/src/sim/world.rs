//! The simulated cluster: the core, model workers, clients, and messages on their way, in virtual time. The streams
//! between router and workers keep their order, as TCP does; everything else is up to the [`Network`] drawn per run.
//!
//! Proves invariant S1 of ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use crate::Core;
use crate::api::{
    Command, CoreConfig, EndReason, Epoch, EpochPlan, Event, Micros, SequenceId, StepId, StepPlan, Submit,
    WorkerId, WorkerInfo,
};
use crate::sim::clients::Clients;
use crate::sim::group::{Group, Node};
use crate::sim::random::{Random, mix};
use crate::sim::worker::ModelWorker;

/// Delays and chances of a run.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    /// Usual delay of a message, at most.
    pub(crate) delay_us: u64,
    /// Chance that a message is held up, in per cent, and for how long at most.
    pub(crate) clog: u64,
    pub(crate) clog_us: u64,
    /// Chance that a worker's message comes twice.
    pub(crate) duplicate: u64,
    pub(crate) step_us: u64,
    pub(crate) load_us: u64,
    /// Chance that a step fails, in per thousand.
    pub(crate) step_fails: u64,
}

impl Network {
    pub(crate) fn calm() -> Network {
        Network {
            delay_us: 300,
            clog: 0,
            clog_us: 0,
            duplicate: 0,
            step_us: 2_000,
            load_us: 50_000,
            step_fails: 0,
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Message {
    Start(EpochPlan),
    Step(StepPlan),
    Abort(Epoch),
    Dismiss,
}

#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// The core hears of something.
    Core(Event),
    /// The core hears from a worker, if its stream is still open.
    FromWorker(WorkerId, Event),
    ToWorker(WorkerId, Message),
    Loaded(WorkerId, Epoch),
    /// All ranks are at this step, and it is over.
    Collective(Epoch, StepId),
    /// A rank has waited for the others until its deadline.
    TimeOut(WorkerId, Epoch),
    Submit(Box<Submit>),
    End(SequenceId, EndReason),
    Attach(WorkerInfo),
    Crash(Victim),
    /// The victim learns that it will be gone.
    Notice(Victim, Micros),
    Calm,
    Tick,
}

impl Action {
    fn is_from_outside(&self) -> bool {
        matches!(
            self,
            Action::Submit(_) | Action::Attach(_) | Action::Crash(_) | Action::Notice(..) | Action::Calm
        )
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Victim {
    This(WorkerId),
    /// The worker at this place among those alive, counted round.
    Nth(u64),
}

pub(crate) struct World {
    pub(crate) core: Core,
    pub(crate) now: u64,
    pub(crate) clients: Clients,
    pub(crate) nodes: BTreeMap<WorkerId, Node>,
    pub(crate) groups: BTreeMap<Epoch, Group>,
    pub(crate) network: Network,
    pub(crate) random: Random,
    page_tokens: u32,
    agenda: BTreeMap<(u64, u64), Action>,
    scheduled: u64,
    /// Requests and faults that are still to come.
    to_come: u64,
    workers: u64,
    /// Streams that the router holds open.
    open: BTreeSet<WorkerId>,
    /// Ends of the two directions of each stream: no message passes an earlier one.
    last_sent: BTreeMap<(WorkerId, bool), u64>,
    /// Events the core has handled.
    pub(crate) events: u64,
    pub(crate) crash_at: Vec<(u64, u64)>,
    /// What changes hands between core and wire, for tests of the checks themselves.
    pub(crate) tamper: Option<fn(&mut Random, &mut Vec<Command>)>,
    pub(crate) trace: Trace,
}

/// A running hash of everything the core was told and said.
#[derive(Debug, Default)]
pub(crate) struct Trace(pub(crate) u64);

impl Write for Trace {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for chunk in text.as_bytes().chunks(8) {
            let word = chunk.iter().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
            self.0 = mix(self.0 ^ word);
        }
        Ok(())
    }
}

impl World {
    pub(crate) fn new(config: CoreConfig, network: Network, random: Random) -> World {
        World {
            page_tokens: config.page_tokens,
            core: Core::new(config),
            now: 0,
            clients: Clients::default(),
            nodes: BTreeMap::new(),
            groups: BTreeMap::new(),
            network,
            random,
            agenda: BTreeMap::new(),
            scheduled: 0,
            to_come: 0,
            workers: 0,
            open: BTreeSet::new(),
            last_sent: BTreeMap::new(),
            events: 0,
            crash_at: Vec::new(),
            tamper: None,
            trace: Trace::default(),
        }
    }

    pub(crate) fn at(&mut self, time: u64, action: Action) {
        self.scheduled += 1;
        self.to_come += u64::from(action.is_from_outside());
        self.agenda.insert((time.max(self.now), self.scheduled), action);
    }

    /// Runs until every client has its outcome and a second more; fails if that takes until `limit`.
    pub(crate) fn run(&mut self, limit: u64) -> Result<(), String> {
        self.at(self.now, Action::Tick);
        let mut quiet_ticks = 0;
        while let Some(((time, _), action)) = self.agenda.pop_first() {
            self.now = time;
            if time > limit {
                let snapshot = self.core.snapshot();
                return Err(format!(
                    "{} sequences are not done in time: {snapshot:?}",
                    self.clients.open()
                ));
            }
            if matches!(action, Action::Tick) {
                let core_is_idle = self.core.snapshot().steps_in_flight == 0;
                let quiet = self.to_come == 0 && self.clients.open() == 0 && core_is_idle;
                quiet_ticks = if quiet { quiet_ticks + 1 } else { 0 };
                if quiet_ticks > 20 {
                    return Ok(());
                }
                self.at(self.now + 50_000, Action::Tick);
            }
            self.to_come -= u64::from(action.is_from_outside());
            self.act(action)?;
        }
        Ok(())
    }

    fn act(&mut self, action: Action) -> Result<(), String> {
        match action {
            Action::Tick => self.tell(Event::Tick)?,
            Action::Core(event) => self.tell(event)?,
            Action::FromWorker(worker, event) => {
                if self.open.contains(&worker) {
                    if matches!(event, Event::WorkerLost { .. }) {
                        self.open.remove(&worker);
                    }
                    self.tell(event)?;
                }
            }
            Action::ToWorker(worker, message) => self.worker_takes(worker, message),
            Action::Loaded(worker, epoch) => self.loaded(worker, epoch),
            Action::Collective(epoch, step) => self.collective(epoch, step),
            Action::TimeOut(worker, epoch) => self.time_out(worker, epoch),
            Action::Submit(submit) => {
                for event in self.clients.submit(*submit) {
                    self.tell(event)?;
                }
            }
            Action::End(id, reason) => {
                if let Some(event) = self.clients.end(id, reason) {
                    self.tell(event)?;
                }
            }
            Action::Attach(info) => self.attach(info)?,
            Action::Crash(victim) => self.crash(victim),
            Action::Notice(victim, within) => {
                let Some(worker) = self.find(victim) else {
                    return Ok(());
                };
                let deadline = Micros(self.now + within.0);
                self.hear_worker(worker, Event::Notice { worker, deadline });
                self.at(deadline.0, Action::Crash(Victim::This(worker)));
            }
            Action::Calm => self.network = Network::calm(),
        }
        Ok(())
    }

    /// The core handles an event; its commands are checked and sent.
    pub(crate) fn tell(&mut self, event: Event) -> Result<(), String> {
        self.events += 1;
        let _ = write!(self.trace, "{} {event:?}", self.now);
        let mut commands = self.core.handle(Micros(self.now), event);
        let _ = write!(self.trace, "{commands:?}");
        self.core.audit()?;
        if let Some(tamper) = self.tamper {
            tamper(&mut self.random, &mut commands);
        }
        for command in commands {
            self.carry_out(command)?;
        }
        for (_, nth) in self
            .crash_at
            .extract_if(.., |(event, _)| *event == self.events)
            .collect::<Vec<_>>()
        {
            self.crash(Victim::Nth(nth));
        }
        Ok(())
    }

    fn carry_out(&mut self, command: Command) -> Result<(), String> {
        if let Some(answer) = self.clients.take(&command)? {
            let delay = self.delay();
            self.at(self.now + delay, Action::Core(answer));
        }
        let (worker, message) = match command {
            Command::Step { worker, plan } => (worker, Message::Step(plan)),
            Command::StartEpoch { worker, plan } => (worker, Message::Start(plan)),
            Command::AbortEpoch { worker, epoch, .. } => (worker, Message::Abort(epoch)),
            Command::Dismiss { worker, .. } => (worker, Message::Dismiss),
            _ => return Ok(()),
        };
        if !self.open.contains(&worker) {
            return Err(format!(
                "a command to worker {}, which is gone: {message:?}",
                worker.0
            ));
        }
        if matches!(message, Message::Dismiss) {
            self.open.remove(&worker);
        }
        let time = self.in_order(worker, true);
        self.at(time, Action::ToWorker(worker, message));
        Ok(())
    }

    pub(crate) fn hear_worker(&mut self, worker: WorkerId, event: Event) {
        let time = self.in_order(worker, false);
        let repeats = !matches!(event, Event::WorkerLost { .. } | Event::WorkerAttached { .. });
        if repeats && self.random.chance(self.network.duplicate) {
            // The copy may come long after, in another epoch.
            let late = self.random.below(2_000_000);
            self.at(time + late, Action::FromWorker(worker, event.clone()));
        }
        self.at(time, Action::FromWorker(worker, event));
    }

    /// When a message sent now arrives.
    fn in_order(&mut self, worker: WorkerId, to_worker: bool) -> u64 {
        let time = self.now + self.delay();
        let last = self.last_sent.entry((worker, to_worker)).or_default();
        *last = time.max(*last);
        *last
    }

    fn delay(&mut self) -> u64 {
        let clogged = self.random.chance(self.network.clog);
        let most = if clogged {
            self.network.clog_us
        } else {
            self.network.delay_us
        };
        self.random.below(most + 1)
    }

    fn attach(&mut self, info: WorkerInfo) -> Result<(), String> {
        self.workers += 1;
        let worker = WorkerId(self.workers);
        let model = ModelWorker::new(
            worker,
            self.page_tokens,
            info.kv_pages,
            info.max_slots,
            info.max_batched_tokens,
        );
        self.nodes.insert(worker, Node::new(model, info.clone()));
        self.open.insert(worker);
        self.tell(Event::WorkerAttached { worker, info })
    }

    pub(crate) fn crash(&mut self, victim: Victim) {
        let Some(worker) = self.find(victim) else { return };
        self.remove_node(worker);
        // What it sent before still arrives; then its stream breaks.
        self.hear_worker(worker, Event::WorkerLost { worker });
    }

    fn find(&self, victim: Victim) -> Option<WorkerId> {
        match victim {
            Victim::This(worker) => self.nodes.contains_key(&worker).then_some(worker),
            Victim::Nth(_) if self.nodes.is_empty() => None,
            Victim::Nth(nth) => self
                .nodes
                .keys()
                .nth((nth % self.nodes.len() as u64) as usize)
                .copied(),
        }
    }
}
