//! Membership: the changes of epoch.
//!
//! ```text
//!              enough attached                  all ready
//!   Starting ─────────────────► Forming(e) ───────────────────► Serving(e) ──┐ join, notice: no more steps,
//!                                 ▲  ▲ │                          │ │        │ until those in flight are back
//!                                 │  │ │ loss, failure, time-out  │ │◄───────┘
//!                                 │  └─┴──────── abort(e) ────────┘ │
//!                                 │               e := e + 1        │ survivors cannot hold the experts
//!                                 │                                 ▼
//!                                 └──────── enough again ──────── Parked
//! ```
//!
//! | event | Starting | Forming | Serving | Parked |
//! |---|---|---|---|---|
//! | attach | form if enough | joins after Serving | switch (at most every `JOIN_SPACING_US`) | form if enough |
//! | ready, all of this epoch | - | Serving | - | - |
//! | lost, of the group | - | abort, form | abort, form | - |
//! | step failed | - | abort, form; suspect counted | abort, form; suspect counted, or a sequence ended | - |
//! | notice | not counted on | switches after Serving | switch | not counted on |
//! | tick | - | dismiss who is not ready in time | dismiss who does not answer | - |
//!
//! Every change is one mechanism: running sequences give back slots and pages and wait again in their old turns; pages
//! that completed steps filled stay in the tree, those of steps that did not come back are withdrawn; the next epoch
//! admits the sequences again, prefix and all. What was in flight is dropped with its epoch number, so nothing is
//! delivered twice.
//!
//! Keeps invariant S5 of ARCHITECTURE.md.

mod group;

use std::sync::Arc;

use conclave_plan::placement::Placement;

use crate::api::{
    Command, Epoch, EpochPlan, FinishReason, Micros, Rank, Slot, StepId, StepPlan, WorkerId, WorkerInfo,
};
use crate::limits::{DEADLINE_US_MAX, FORMING_LIMIT_US, PATIENCE_PER_SUSPICION, SUSPICIONS_MAX};
use crate::member::{Attached, Member, Slots};
use crate::ranks::assign_ranks;
use crate::sequence::Key;
use crate::sequencer::{Core, Phase};

impl Core {
    pub(crate) fn attach(&mut self, worker: WorkerId, info: WorkerInfo) {
        let useless = [
            ("kv_pages", info.kv_pages),
            ("max_slots", info.max_slots),
            ("max_batched_tokens", info.max_batched_tokens),
        ];
        if let Some((name, _)) = useless.iter().find(|(_, value)| *value == 0) {
            let reason = format!("{name} is 0: give the worker more memory");
            self.out.push(Command::Dismiss { worker, reason });
            return;
        }
        let attached = Attached {
            pool: self.cache.add_pool(info.kv_pages),
            info,
            leaving: None,
            member: None,
            last_rank: None,
            experts: Vec::new(),
            suspicions: 0,
            busy_us: 0,
            idle_us: 0,
        };
        let before = self.attached.insert(worker, attached);
        assert!(before.is_none(), "the shell never uses a worker number twice");
    }

    pub(crate) fn ready(&mut self, worker: WorkerId, epoch: Epoch) {
        let Some(rank) = self.rank_of(worker).filter(|_| epoch == self.epoch) else {
            return;
        };
        let Phase::Forming { ready, .. } = &mut self.phase else {
            return;
        };
        ready[rank] = true;
        if ready.iter().all(|ready| *ready) {
            self.phase = Phase::Serving { since: self.now };
        }
    }

    pub(crate) fn lost(&mut self, worker: WorkerId) {
        if self.rank_of(worker).is_some() {
            self.abort_epoch("a worker of the group is gone", &[worker]);
            self.detach(worker);
            self.form_epoch();
        } else if self.attached.contains_key(&worker) {
            self.detach(worker);
        }
    }

    pub(crate) fn notice(&mut self, worker: WorkerId, deadline: Micros) {
        if let Some(attached) = self.attached.get_mut(&worker) {
            attached.leaving = Some(deadline);
        }
    }

    pub(crate) fn step_failed(
        &mut self,
        worker: WorkerId,
        epoch: Epoch,
        step: StepId,
        suspect: Option<Rank>,
        slot: Option<Slot>,
    ) {
        let Some(rank) = self.rank_of(worker).filter(|_| epoch == self.epoch) else {
            return;
        };
        if let Some(key) = slot.and_then(|slot| self.ran_in(step, rank, slot)) {
            // One sequence that a worker cannot run must end: it would break every epoch to come.
            let reason = "a worker could not make sense of this request; its log says why";
            self.finish(key, FinishReason::Error(reason.into()));
            self.abort_epoch("a step made no sense to a worker", &[]);
            self.form_epoch();
            return;
        }
        let named = suspect.map(|suspect| suspect.0 as usize);
        // Who fails without naming another is the one to suspect.
        let culprit = named.filter(|&named| named < self.members.len()).unwrap_or(rank);
        let culprit = self.members[culprit].worker;
        self.fail_epoch("a step failed", &[culprit]);
    }

    /// The sequence that a step in flight runs in a slot of this rank, if it still lives.
    fn ran_in(&self, step: StepId, rank: usize, slot: Slot) -> Option<Key> {
        let serial = self.first_serial.checked_add(step.0)?;
        let step = self.in_flight.iter().find(|step| step.serial == serial)?;
        let run = step.runs[rank].iter().find(|run| run.slot == slot)?;
        self.sequences.get(run.key, run.id).map(|_| run.key)
    }

    /// Looks at the clock.
    pub(crate) fn watch(&mut self) {
        match &self.phase {
            Phase::Forming { ready, since } if self.now.0 - since.0 > FORMING_LIMIT_US => {
                let members = self.members.iter().zip(ready);
                let late: Vec<WorkerId> = members
                    .filter(|(_, ready)| !**ready)
                    .map(|(member, _)| member.worker)
                    .collect();
                self.abort_epoch("the epoch was not ready in time", &[]);
                for worker in late {
                    self.dismiss(worker, "it was not ready for its epoch in time");
                }
                self.form_epoch();
            }
            Phase::Serving { .. } => {
                let Some(oldest) = self.in_flight.front() else {
                    return;
                };
                if self.now.0 - oldest.since.0 > oldest.stall.0 {
                    let done = oldest.serial - self.first_serial;
                    let silent = self.members.iter().filter(|member| member.done <= done);
                    let silent: Vec<WorkerId> = silent.map(|member| member.worker).collect();
                    self.fail_epoch("a step did not come back", &silent);
                }
            }
            _ => {}
        }
    }

    /// A worker broke the protocol.
    pub(crate) fn breach(&mut self, worker: WorkerId, problem: String) {
        self.abort_epoch("a worker broke the protocol", &[worker]);
        self.dismiss(worker, &problem);
        self.form_epoch();
    }

    fn rank_of(&self, worker: WorkerId) -> Option<usize> {
        self.attached.get(&worker)?.member
    }

    /// Aborts an epoch that somebody spoilt; who spoils too many is dismissed.
    fn fail_epoch(&mut self, reason: &str, culprits: &[WorkerId]) {
        self.abort_epoch(reason, &[]);
        for culprit in culprits {
            let Some(attached) = self.attached.get_mut(culprit) else {
                continue;
            };
            attached.suspicions += 1;
            if attached.suspicions >= SUSPICIONS_MAX {
                self.dismiss(*culprit, "steps failed because of it, again and again");
            }
        }
        self.form_epoch();
    }

    /// Ends the epoch at once. Workers in `except` are past being told.
    fn abort_epoch(&mut self, reason: &str, except: &[WorkerId]) {
        self.counters.failed_epochs += 1;
        for member in &self.members {
            if !except.contains(&member.worker) {
                self.out.push(Command::AbortEpoch {
                    worker: member.worker,
                    epoch: self.epoch,
                    reason: reason.into(),
                });
            }
        }
        self.in_flight.clear();
        self.leave_epoch();
    }

    /// Takes everything off the workers. What steps in flight should have brought is lost.
    fn leave_epoch(&mut self) {
        assert!(self.in_flight.is_empty(), "an epoch ends with no step in flight");
        for index in 0..self.members.len() {
            while let Some(&(_, key)) = self.members[index].running.last() {
                self.requeue(key);
            }
            assert_eq!(self.members[index].load, 0, "no sequence, no load");
        }
        self.sequences.forget_samples_in_flight();
        for member in self.members.drain(..) {
            self.cache.withdraw_unproven(member.pool);
            if let Some(attached) = self.attached.get_mut(&member.worker) {
                attached.member = None;
            }
        }
    }

    /// A rank that was waited for in vain may only be slow: each suspicion gives it more time in the next epoch.
    fn collective_deadline(&self, ranks: &[WorkerId]) -> Micros {
        let floor = self.config.collective_deadline_floor;
        let suspicions = ranks.iter().map(|worker| self.attached[worker].suspicions).max();
        let patience = PATIENCE_PER_SUSPICION.saturating_pow(suspicions.unwrap_or(0));
        let usual = self.step_times.deadline(floor);
        Micros(usual.0.saturating_mul(patience).min(floor.0.max(DEADLINE_US_MAX)))
    }

    /// Begins the next epoch with the workers that are there, or parks.
    fn form_epoch(&mut self) {
        let chosen = self.chosen();
        self.leave_epoch();
        self.switching = false;
        let left: Vec<WorkerId> = self
            .attached
            .keys()
            .copied()
            .filter(|worker| !chosen.contains(worker))
            .collect();
        for worker in left {
            if self.attached[&worker].leaving.is_some() {
                self.dismiss(worker, "the group goes on without it, as it asked");
            }
        }
        let ranks = assign_ranks(&chosen, &self.attached);
        let capacities: Vec<u32> = ranks.iter().map(|worker| self.expert_capacity(*worker)).collect();
        let held: Vec<Vec<u32>> = ranks
            .iter()
            .map(|worker| self.attached[worker].experts.clone())
            .collect();
        let placement = Placement::refit(self.config.experts, &capacities, &held);
        let Some(placement) = placement.ok().filter(|_| !ranks.is_empty()) else {
            self.phase = Phase::Parked;
            return;
        };
        self.epoch.0 += 1;
        self.first_serial = self.next_serial;
        self.deadline = self.collective_deadline(&ranks);
        self.phase = Phase::Forming {
            ready: vec![false; ranks.len()],
            since: self.now,
        };
        let placement = Arc::new(placement);
        for (rank, &worker) in (0..).zip(&ranks) {
            self.enter_epoch(rank, worker, &ranks, &placement);
        }
    }

    fn enter_epoch(&mut self, rank: u32, worker: WorkerId, workers: &[WorkerId], placement: &Arc<Placement>) {
        let Some(attached) = self.attached.get_mut(&worker) else {
            return;
        };
        let plan = EpochPlan {
            epoch: self.epoch,
            rank: Rank(rank),
            workers: workers.to_vec(),
            placement: Arc::clone(placement),
            keep_kv: attached.last_rank.is_some(),
            collective_deadline: self.deadline,
        };
        attached.member = Some(rank as usize);
        attached.last_rank = Some(rank);
        attached.experts = placement.experts_of(0, rank);
        self.members.push(Member {
            worker,
            pool: attached.pool,
            tokens_max: self
                .config
                .max_num_batched_tokens
                .min(attached.info.max_batched_tokens),
            running: Vec::new(),
            slots: Slots::new(self.config.max_num_seqs.min(attached.info.max_slots)),
            pending: StepPlan::default(),
            load: 0,
            done: 0,
        });
        self.out.push(Command::StartEpoch { worker, plan });
    }

    /// Tells a worker outside the epoch to go.
    fn dismiss(&mut self, worker: WorkerId, reason: &str) {
        self.out.push(Command::Dismiss {
            worker,
            reason: reason.into(),
        });
        self.detach(worker);
    }

    fn detach(&mut self, worker: WorkerId) {
        let attached = self.attached.remove(&worker).expect("an attached worker");
        assert!(
            attached.member.is_none(),
            "a worker leaves its epoch before it is detached"
        );
        self.cache.drop_pool(attached.pool);
    }
}
