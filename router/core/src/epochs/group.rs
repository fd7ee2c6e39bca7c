//! Who is in the next epoch: which of the attached workers, whether they can hold the experts, and when it is time.

use crate::api::WorkerId;
use crate::limits::JOIN_SPACING_US;
use crate::sequencer::{Core, Phase};

impl Core {
    /// Starts or changes the group if the attached workers ask for it.
    pub(crate) fn reconsider_group(&mut self) {
        match self.phase {
            Phase::Starting => {
                let expected = self.config.expected_workers.min(self.config.experts) as usize;
                if self.staying().len() >= expected {
                    self.form_epoch();
                }
            }
            Phase::Parked if !self.chosen().is_empty() => self.form_epoch(),
            Phase::Parked | Phase::Forming { .. } => {}
            Phase::Serving { since } => {
                let chosen = self.chosen();
                let kept = self
                    .members
                    .iter()
                    .filter(|member| chosen.contains(&member.worker))
                    .count();
                let leaves = kept < self.members.len();
                let joins = kept < chosen.len() && self.now.0 - since.0 >= JOIN_SPACING_US;
                self.switching = leaves || joins;
                if self.switching && self.in_flight.is_empty() {
                    self.form_epoch();
                } else if chosen.is_empty() {
                    self.abort_epoch("the remaining workers cannot hold the experts", &[]);
                    self.form_epoch();
                }
            }
        }
    }

    /// The workers of the next epoch, none if they cannot hold the experts. Those that leave are counted on only if
    /// it does not go without them, and until their time is up.
    pub(crate) fn chosen(&self) -> Vec<WorkerId> {
        let staying = self.limited(self.staying());
        if self.can_hold(&staying) {
            return staying;
        }
        let here = self
            .attached
            .iter()
            .filter(|(_, attached)| attached.leaving.is_none_or(|by| by > self.now));
        let all = self.limited(here.map(|(&worker, _)| worker).collect());
        if self.can_hold(&all) { all } else { Vec::new() }
    }

    fn staying(&self) -> Vec<WorkerId> {
        let staying = self
            .attached
            .iter()
            .filter(|(_, attached)| attached.leaving.is_none());
        staying.map(|(&worker, _)| worker).collect()
    }

    /// At most one rank per expert: beyond that, workers stand by, those outside the group first.
    fn limited(&self, mut workers: Vec<WorkerId>) -> Vec<WorkerId> {
        workers.sort_by_key(|worker| (self.attached[worker].member.is_none(), *worker));
        workers.truncate(self.config.experts as usize);
        workers
    }

    fn can_hold(&self, workers: &[WorkerId]) -> bool {
        let room: u64 = workers
            .iter()
            .map(|worker| u64::from(self.expert_capacity(*worker)))
            .sum();
        !workers.is_empty() && room >= u64::from(self.config.experts)
    }

    pub(super) fn expert_capacity(&self, worker: WorkerId) -> u32 {
        let experts = self.config.experts;
        self.attached[&worker]
            .info
            .expert_capacity
            .unwrap_or(experts)
            .min(experts)
    }
}
