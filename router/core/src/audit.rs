//! The integrity check: walks everything and compares it with what each module promises. Slow (the whole tree); for
//! the simulator after every event, and for a shell that is idle.
//!
//! Proves invariant S3 of ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};

use crate::api::PageId;
use crate::cache::{Cache, Held};
use crate::pages::Fill;
use crate::radix::{NodeId, PoolId};
use crate::sequence::{Running, Sequence};
use crate::sequencer::Core;

type Audit = Result<(), String>;

macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}

impl Core {
    /// Checks every invariant of the core; the error says which is broken.
    pub fn audit(&self) -> Result<(), String> {
        self.audit_queue()?;
        self.audit_members()?;
        for attached in self.attached.values() {
            self.audit_pool(attached.pool)?;
        }
        self.audit_steps()
    }

    fn audit_queue(&self) -> Audit {
        let waiting = self
            .sequences
            .iter()
            .filter(|sequence| sequence.running().is_none())
            .count();
        ensure!(
            waiting == self.queue.len(),
            "{waiting} sequences wait, {} are queued",
            self.queue.len()
        );
        let (new, limit) = (self.queue.new_len(), self.queue.limit());
        ensure!(new <= limit, "{new} new sequences wait, {limit} may");
        Ok(())
    }

    fn audit_members(&self) -> Audit {
        let mut running = 0;
        for (index, member) in self.members.iter().enumerate() {
            running += member.running.len();
            ensure!(
                member.running.is_sorted(),
                "worker {} does not run in turn",
                member.worker.0
            );
            let count = member.running.len() as u32;
            ensure!(
                count <= member.slots.max(),
                "worker {} runs {count}",
                member.worker.0
            );
            let mut slots = BTreeSet::new();
            let mut load = 0;
            for &(turn, key) in &member.running {
                let sequence = &self.sequences[key];
                ensure!(sequence.turn == turn, "sequence {} has two turns", sequence.id.0);
                let Some(running) = sequence.running() else {
                    return Err(format!("sequence {} waits and runs", sequence.id.0));
                };
                ensure!(
                    running.member == index,
                    "sequence {} runs elsewhere",
                    sequence.id.0
                );
                ensure!(
                    slots.insert(running.slot),
                    "slot {} is taken twice",
                    running.slot.0
                );
                load += running.load + running.prefill_left;
                self.audit_running(sequence, running)?;
            }
            ensure!(
                load == member.load,
                "worker {} has load {load}, counted {}",
                member.worker.0,
                member.load
            );
            let attached = self
                .attached
                .get(&member.worker)
                .and_then(|attached| attached.member);
            ensure!(
                attached == Some(index),
                "worker {} is not at its rank",
                member.worker.0
            );
        }
        let all = self
            .sequences
            .iter()
            .filter(|sequence| sequence.running().is_some())
            .count();
        ensure!(all == running, "{all} sequences run, {running} are listed");
        Ok(())
    }

    fn audit_running(&self, sequence: &Sequence, running: &Running) -> Audit {
        let id = sequence.id.0;
        let room = running.lease.table.len() as u64 * u64::from(self.config.page_tokens);
        ensure!(
            u64::from(running.sent) <= room,
            "sequence {id} runs beyond its pages"
        );
        let known = sequence.len() + sequence.in_flight;
        ensure!(
            running.sent < known,
            "sequence {id} has run {} of {known} tokens",
            running.sent
        );
        ensure!(
            sequence.generated() + sequence.in_flight <= sequence.max_new_tokens,
            "sequence {id} samples beyond its limit"
        );
        ensure!(
            !sequence.masked || sequence.in_flight <= 1,
            "sequence {id} runs ahead of its mask"
        );
        Ok(())
    }

    /// Pages are free, cached or owned, each in one place; references are those of the leases.
    fn audit_pool(&self, pool: PoolId) -> Audit {
        let pages = self.cache.pool(pool);
        let mut seen: BTreeSet<PageId> = BTreeSet::new();
        let mut claim = |page: PageId, by: &str| {
            let new = page.0 < pages.total() && seen.insert(page);
            if new {
                Ok(())
            } else {
                Err(format!("page {} is claimed twice, last by {by}", page.0))
            }
        };
        pages
            .free_pages()
            .try_for_each(|page| claim(page, "the free list"))?;
        pages
            .cached_pages()
            .try_for_each(|(page, _)| claim(page, "the tree"))?;
        let mut references: BTreeMap<NodeId, u32> = BTreeMap::new();
        let mut owned = 0;
        for running in self.running_on(pool) {
            for held in &running.lease.table {
                if let Held::Own(page) = held {
                    owned += 1;
                    claim(page.id(), "a sequence")?;
                }
            }
            for &node in &running.lease.path {
                *references.entry(node).or_default() += 1;
            }
        }
        let sum = pages.free() + pages.cached() + owned;
        ensure!(
            sum == pages.total(),
            "{sum} pages of {} are accounted for",
            pages.total()
        );
        audit_tree(&self.cache, pool, &references)
    }

    fn running_on(&self, pool: PoolId) -> impl Iterator<Item = &Running> {
        let running = self.sequences.iter().filter_map(Sequence::running);
        running.filter(move |running| self.members[running.member].pool == pool)
    }

    fn audit_steps(&self) -> Audit {
        let limit = self.config.steps_in_flight as usize;
        ensure!(
            self.in_flight.len() <= limit,
            "{} steps are in flight",
            self.in_flight.len()
        );
        let last = self.in_flight.back().map(|step| step.serial + 1);
        ensure!(
            last.is_none_or(|next| next == self.next_serial),
            "the latest step is not the latest"
        );
        let mut samples: BTreeMap<_, u32> = BTreeMap::new();
        for run in self.in_flight.iter().flat_map(|step| step.runs.iter().flatten()) {
            *samples.entry(run.id).or_default() += u32::from(run.sample);
        }
        for sequence in self.sequences.iter() {
            let expected = samples.get(&sequence.id).copied().unwrap_or(0);
            ensure!(
                sequence.in_flight == expected,
                "sequence {} expects {} samples, {expected} are in flight",
                sequence.id.0,
                sequence.in_flight
            );
        }
        Ok(())
    }
}

fn audit_tree(cache: &Cache, pool: PoolId, references: &BTreeMap<NodeId, u32>) -> Audit {
    let (tree, pages) = (cache.tree(), cache.pool(pool));
    let mut unreferenced = BTreeSet::new();
    for (page, node) in pages.cached_pages() {
        ensure!(
            tree.resident(node, pool) == Some(page),
            "page {} is not at its node",
            page.0
        );
        let counted = references.get(&node).copied().unwrap_or(0);
        let kept = pages.references(page);
        ensure!(
            counted == kept,
            "page {} has {kept} references, {counted} are held",
            page.0
        );
        if kept == 0 {
            unreferenced.insert(page);
        }
        let Some(parent) = tree.parent(node).filter(|&parent| !tree.is_root(parent)) else {
            continue;
        };
        let Some(above) = tree.resident(parent, pool) else {
            return Err(format!("page {} has no resident parent", page.0));
        };
        ensure!(
            pages.references(above) >= kept,
            "page {} is referred to more than its parent",
            page.0
        );
        let in_order = match (pages.fill(above), pages.fill(page)) {
            (Fill::By(above), Fill::By(below)) => above <= below,
            (Fill::Coming(_), Fill::By(_)) => false,
            (_, Fill::Coming(_)) => true,
        };
        ensure!(in_order, "page {} is filled before its parent", page.0);
    }
    // Leaves first: whatever comes later in the order is no child of what came before.
    let mut evicted = BTreeSet::new();
    for page in pages.eviction_order() {
        ensure!(
            unreferenced.contains(&page),
            "page {} may be evicted and is in use",
            page.0
        );
        let parent = pages.node(page).and_then(|node| tree.parent(node));
        let parent = parent.and_then(|parent| tree.resident(parent, pool));
        ensure!(
            !parent.is_some_and(|above| evicted.contains(&above)),
            "page {} is evicted late",
            page.0
        );
        evicted.insert(page);
    }
    ensure!(
        evicted.len() == unreferenced.len(),
        "unreferenced pages are missing from the eviction order"
    );
    ensure!(
        evicted.len() == pages.evictable() as usize,
        "evictable pages are miscounted"
    );
    Ok(())
}
