//! What the shell shows of the core: gauges and totals for metrics, health and the bench.

use crate::api::{ClusterState, Epoch, WorkerId};
use crate::sequencer::Core;

/// The core at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub state: ClusterState,
    /// The latest epoch, 0 before the first.
    pub epoch: Epoch,
    pub running: usize,
    pub waiting: usize,
    /// Of those waiting, sequences that were never admitted: what `max_waiting` bounds.
    pub waiting_new: usize,
    pub steps_in_flight: usize,
    /// Attached workers, in the epoch or not, by id.
    pub workers: Vec<WorkerSnapshot>,
    /// Nodes of the prefix tree.
    pub tree_nodes: usize,
    /// Steps that all ranks have completed.
    pub steps: u64,
    /// Tokens given to steps as chunks of known tokens.
    pub prompt_tokens: u64,
    /// Tokens delivered.
    pub generated_tokens: u64,
    /// Tokens looked up in the prefix cache, at each admission.
    pub prefix_queries: u64,
    /// Tokens of those that were found.
    pub prefix_hits: u64,
    pub preemptions: u64,
    pub rejections: u64,
    pub finished: u64,
    /// Epochs that ended by a loss or a failure.
    pub failed_epochs: u64,
}

/// One attached worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSnapshot {
    pub worker: WorkerId,
    /// In the current epoch.
    pub rank: Option<u32>,
    pub running: usize,
    pub slots: u32,
    /// Work admitted and not yet sent, in prompt tokens.
    pub load: u64,
    pub pages_total: u32,
    pub pages_free: u32,
    /// In the prefix tree, held by running sequences or not.
    pub pages_cached: u32,
    /// Held by no running sequence: can be had at once.
    pub pages_evictable: u32,
    /// Time its device ran steps, and stood still between them.
    pub busy_us: u64,
    pub idle_us: u64,
}

impl WorkerSnapshot {
    /// Pages that running sequences hold.
    pub fn pages_used(&self) -> u32 {
        self.pages_total - self.pages_free - self.pages_evictable
    }
}

impl Core {
    /// The core at this moment. Takes time in proportion to the number of workers.
    pub fn snapshot(&self) -> Snapshot {
        let workers = self.attached.iter().map(|(&worker, attached)| {
            let pool = self.cache.pool(attached.pool);
            let member = attached.member.map(|index| &self.members[index]);
            WorkerSnapshot {
                worker,
                rank: attached.member.map(|index| index as u32),
                running: member.map_or(0, |member| member.running.len()),
                slots: member.map_or(0, |member| member.slots.max()),
                load: member.map_or(0, |member| member.load),
                pages_total: pool.total(),
                pages_free: pool.free(),
                pages_cached: pool.cached(),
                pages_evictable: pool.evictable(),
                busy_us: attached.busy_us,
                idle_us: attached.idle_us,
            }
        });
        Snapshot {
            state: self.state(),
            epoch: self.epoch,
            running: self.members.iter().map(|member| member.running.len()).sum(),
            waiting: self.queue.len(),
            waiting_new: self.queue.new_len(),
            steps_in_flight: self.in_flight.len(),
            workers: workers.collect(),
            tree_nodes: self.cache.tree().len(),
            steps: self.counters.steps,
            prompt_tokens: self.counters.prompt_tokens,
            generated_tokens: self.counters.generated_tokens,
            prefix_queries: self.counters.prefix_queries,
            prefix_hits: self.counters.prefix_hits,
            preemptions: self.counters.preemptions,
            rejections: self.counters.rejections,
            finished: self.counters.finished,
            failed_epochs: self.counters.failed_epochs,
        }
    }
}
