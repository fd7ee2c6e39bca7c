//! The workers' side of the simulated cluster: what each has received, and the collectives that only happen when every
//! rank is at the same step.

use std::collections::VecDeque;

use crate::api::{Epoch, Event, Rank, StepId, StepPlan, WorkerId, WorkerInfo};
use crate::sim::worker::ModelWorker;
use crate::sim::world::{Action, Message, World};

pub(crate) struct Node {
    pub(crate) model: ModelWorker,
    pub(crate) info: WorkerInfo,
    /// Steps received and not yet run.
    inbox: VecDeque<StepPlan>,
    /// It takes part in its epoch: not aborted, not failed.
    sound: bool,
}

impl Node {
    pub(crate) fn new(model: ModelWorker, info: WorkerInfo) -> Node {
        Node {
            model,
            info,
            inbox: VecDeque::new(),
            sound: false,
        }
    }

    /// Stops all work of its epoch; a step it had begun is left half done.
    fn stop(&mut self) {
        if self.sound
            && let Some(begun) = self.inbox.front()
        {
            self.model.break_off(begun);
        }
        self.sound = false;
        self.inbox.clear();
    }
}

pub(crate) struct Group {
    workers: Vec<WorkerId>,
    deadline_us: u64,
    /// The step that all ranks are in.
    begun: Option<StepId>,
}

impl World {
    pub(crate) fn worker_takes(&mut self, worker: WorkerId, message: Message) {
        let Some(node) = self.nodes.get_mut(&worker) else {
            return;
        };
        match message {
            Message::Start(plan) => {
                node.stop();
                node.model.start_epoch(&plan);
                node.sound = true;
                self.groups.entry(plan.epoch).or_insert(Group {
                    workers: plan.workers.clone(),
                    deadline_us: plan.collective_deadline.0,
                    begun: None,
                });
                let load = self.random.below(self.network.load_us + 1);
                self.at(self.now + load, Action::Loaded(worker, plan.epoch));
            }
            Message::Step(plan) => {
                if node.sound && node.model.epoch == plan.epoch {
                    let epoch = plan.epoch;
                    node.inbox.push_back(plan);
                    self.advance(epoch);
                }
            }
            Message::Abort(epoch) => {
                if node.model.epoch == epoch {
                    node.stop();
                }
            }
            Message::Dismiss => {
                let info = node.info.clone();
                self.remove_node(worker);
                // Its process is started again.
                self.at(self.now + 1_000_000, Action::Attach(info));
            }
        }
    }

    pub(crate) fn loaded(&mut self, worker: WorkerId, epoch: Epoch) {
        let there = |node: &Node| node.sound && node.model.epoch == epoch;
        if !self.nodes.get(&worker).is_some_and(there) {
            return;
        }
        // Connecting takes all peers: one that is gone keeps the others from getting ready.
        let group = &self.groups[&epoch];
        if group.workers.iter().all(|peer| self.nodes.contains_key(peer)) {
            self.hear_worker(worker, Event::WorkerReady { worker, epoch });
        }
    }

    /// Begins the next step of a group if every rank has it; whoever waits in vain times out.
    fn advance(&mut self, epoch: Epoch) {
        let Some(group) = self.groups.get_mut(&epoch) else {
            return;
        };
        if group.begun.is_some() {
            return;
        }
        let ready = |worker: &WorkerId| {
            let node = self
                .nodes
                .get(worker)
                .filter(|node| node.sound && node.model.epoch == epoch);
            node.and_then(|node| node.inbox.front().map(|plan| plan.step))
        };
        let steps: Vec<Option<StepId>> = group.workers.iter().map(ready).collect();
        let waiting = group
            .workers
            .iter()
            .zip(&steps)
            .filter(|(_, step)| step.is_some());
        let waiting: Vec<WorkerId> = waiting.map(|(worker, _)| *worker).collect();
        match steps.iter().min() {
            Some(Some(step)) => {
                assert!(
                    steps.iter().all(|other| *other == Some(*step)),
                    "ranks are at different steps"
                );
                group.begun = Some(*step);
                let takes = 1 + self.random.below(self.network.step_us);
                self.at(self.now + takes, Action::Collective(epoch, *step));
            }
            _ => {
                let of_epoch = group.deadline_us;
                for worker in waiting {
                    let step = self.nodes[&worker].inbox.front();
                    let of_step = step.map_or(0, |plan| plan.collective_deadline.0);
                    let deadline = self.now + of_epoch.max(of_step);
                    self.at(deadline, Action::TimeOut(worker, epoch));
                }
            }
        }
    }

    /// The step is over. If a rank is gone or fails, some of the others may have got through it and some not.
    pub(crate) fn collective(&mut self, epoch: Epoch, step: StepId) {
        let Some(group) = self.groups.get_mut(&epoch) else {
            return;
        };
        group.begun = None;
        let workers = group.workers.clone();
        let takes_part = |node: &&mut Node| {
            let front = node.inbox.front().is_some_and(|plan| plan.step == step);
            node.sound && node.model.epoch == epoch && front
        };
        let whole = workers
            .iter()
            .all(|worker| self.nodes.get_mut(worker).filter(takes_part).is_some());
        let fails = !whole || self.random.below(1_000) < self.network.step_fails;
        for &worker in &workers {
            let succeeds = !fails || self.random.chance(50);
            let Some(node) = self.nodes.get_mut(&worker).filter(takes_part) else {
                continue;
            };
            if succeeds {
                let Some(plan) = node.inbox.pop_front() else {
                    continue;
                };
                let mut result = node.model.run(&plan);
                result.busy_us = 1;
                self.hear_worker(
                    worker,
                    Event::StepDone {
                        worker,
                        epoch,
                        step,
                        result,
                    },
                );
            } else {
                node.stop();
                self.fails(worker, epoch, step, workers.len());
            }
        }
        self.advance(epoch);
    }

    pub(crate) fn time_out(&mut self, worker: WorkerId, epoch: Epoch) {
        let Some(group) = self.groups.get(&epoch) else {
            return;
        };
        let ranks = group.workers.len();
        let begun = group.begun.is_some();
        let Some(node) = self.nodes.get_mut(&worker) else {
            return;
        };
        if !node.sound || node.model.epoch != epoch || begun {
            return;
        }
        let Some(step) = node.inbox.front().map(|plan| plan.step) else {
            return;
        };
        node.stop();
        self.fails(worker, epoch, step, ranks);
    }

    fn fails(&mut self, worker: WorkerId, epoch: Epoch, step: StepId, ranks: usize) {
        let named = self.random.chance(70);
        let suspect = named.then(|| Rank(self.random.below(ranks as u64 + 1) as u32));
        let failed = Event::StepFailed {
            worker,
            epoch,
            step,
            suspect,
            slot: None,
        };
        self.hear_worker(worker, failed);
    }

    pub(crate) fn remove_node(&mut self, worker: WorkerId) {
        let Some(node) = self.nodes.remove(&worker) else {
            return;
        };
        self.advance(node.model.epoch);
    }
}
