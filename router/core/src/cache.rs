//! The prefix cache: the tree over all workers' pages, and who refers to which page.
//!
//! A sequence holds a [`Lease`]: its page table on one worker, and the tree nodes it refers to, from the root down
//! without a gap. A full page of prompt is announced in the tree when its sequence is admitted (`Fill::Coming`),
//! becomes shareable when the step that fills it is sent (`Fill::By`), and stays when the sequence ends. If the tree
//! already has a page of equal content, the sequence keeps its own page and refers to the tree's beside it, so that
//!
//! - who refers to a node refers to its ancestors: references never grow downwards, and an unreferenced page has
//!   only unreferenced descendants on its worker;
//! - leases are given back from the leaf up, so in eviction order a child comes before its parent, and the front of
//!   that order is always a leaf: eviction is O(1).
//!
//! Also true: fills never decrease downwards; a `Coming` page is referred to by its own sequence only. So pages that
//! a failed step should have filled can be withdrawn together with everything below them.
//!
//! Keeps invariant S3 of ARCHITECTURE.md.

mod lookup;

use std::collections::VecDeque;

use crate::api::{PageId, SequenceId};
use crate::pages::{Fill, Page, Pool};
use crate::planted::{Bug, planted};
use crate::radix::{NodeId, PoolId, Salt, Tree};
pub(crate) use lookup::{Lookup, Match};

/// One page of a sequence's table.
#[derive(Debug)]
pub(crate) enum Held {
    /// Nobody else's.
    Own(Page),
    /// The tree's, through the node at the same index of `Lease::path`.
    Shared,
}

/// What a running sequence holds on its worker.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    pub(crate) table: Vec<Held>,
    pub(crate) path: Vec<NodeId>,
}

#[derive(Debug)]
struct Worker {
    pool: Pool,
    /// Pages filled by steps whose results are out, oldest first.
    unproven: VecDeque<(u64, PageId)>,
    /// Steps with serial numbers below this have come back.
    proven: u64,
}

#[derive(Debug)]
pub(crate) struct Cache {
    page_tokens: u32,
    tree: Tree,
    workers: Vec<Option<Worker>>,
}

impl Cache {
    pub(crate) fn new(page_tokens: u32) -> Cache {
        Cache {
            page_tokens,
            tree: Tree::new(page_tokens),
            workers: Vec::new(),
        }
    }

    pub(crate) fn add_pool(&mut self, pages: u32) -> PoolId {
        let worker = Worker {
            pool: Pool::new(pages),
            unproven: VecDeque::new(),
            proven: 0,
        };
        let unused = self.workers.iter().position(Option::is_none);
        let index = unused.unwrap_or(self.workers.len());
        if index == self.workers.len() {
            self.workers.push(None);
        }
        self.workers[index] = Some(worker);
        PoolId(index as u32)
    }

    /// Forgets a worker's pages. No lease on it may be left.
    pub(crate) fn drop_pool(&mut self, pool: PoolId) {
        let worker = self.workers[pool.0 as usize]
            .take()
            .expect("a pool is dropped once");
        assert_eq!(
            worker.pool.cached(),
            worker.pool.evictable(),
            "a sequence still holds pages of a lost worker"
        );
        // From the leaves up, so that every node still has a resident parent.
        for page in worker.pool.eviction_order() {
            let node = worker.pool.node(page).expect("what may be evicted is cached");
            self.tree.remove_resident(node, pool);
        }
    }

    pub(crate) fn pool(&self, pool: PoolId) -> &Pool {
        &self.worker(pool).pool
    }

    pub(crate) fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Pages that can be had now.
    pub(crate) fn available(&self, pool: PoolId) -> u32 {
        let pool = self.pool(pool);
        pool.free() + pool.evictable()
    }

    /// Takes a page, evicting the least recently used leaf if need be.
    pub(crate) fn allocate(&mut self, pool: PoolId) -> Option<Page> {
        if let Some(page) = self.pool_mut(pool).take() {
            return Some(page);
        }
        let page = self.pool(pool).oldest()?;
        Some(self.evict(pool, page))
    }

    fn evict(&mut self, pool: PoolId, page: PageId) -> Page {
        let node = self.pool(pool).node(page).expect("what may be evicted is cached");
        self.tree.remove_resident(node, pool);
        self.pool_mut(pool).uncache(page)
    }

    /// Appends a page to a lease, and announces it in the tree if `tokens` are the full page it will hold and nobody
    /// else has or is about to compute the same.
    pub(crate) fn append(&mut self, lease: &mut Lease, page: Page, pool: PoolId, coming: Coming<'_>) {
        let contiguous = lease.path.len() == lease.table.len();
        let Some((salt, tokens, filler)) = coming.filter(|_| contiguous) else {
            lease.table.push(Held::Own(page));
            return;
        };
        let parent = self.parent_of(lease, salt);
        let child = self.tree.child(parent, tokens);
        let child = match child {
            Some(child) if self.tree.resident(child, pool).is_some() => {
                lease.table.push(Held::Own(page));
                return;
            }
            Some(child) => child,
            None => self.tree.add_child(parent, tokens),
        };
        self.put(child, page, pool, Fill::Coming(filler));
        lease.path.push(child);
        lease.table.push(Held::Shared);
    }

    /// Makes the page at `index` of a lease shareable: the step `serial` fills it with `tokens`. False if another
    /// sequence has announced the same page and not filled it yet: try again later.
    pub(crate) fn share(
        &mut self,
        lease: &mut Lease,
        index: usize,
        pool: PoolId,
        salt: Salt,
        tokens: &[u32],
        serial: u64,
    ) -> bool {
        // Never before its parent: a step that fails takes the parent along.
        let above = index
            .checked_sub(1)
            .map(|above| self.fill_of(lease.path[above], pool));
        let serial = match above {
            Some(Fill::By(parent)) => serial.max(parent),
            Some(Fill::Coming(_)) => unreachable!("pages are filled in order"),
            None => serial,
        };
        if let Some(&node) = lease.path.get(index) {
            let page = self
                .tree
                .resident(node, pool)
                .expect("a lease holds resident pages");
            if matches!(self.pool(pool).fill(page), Fill::Coming(_)) {
                self.filled(pool, page, serial);
            }
            return true;
        }
        assert_eq!(index, lease.path.len(), "pages are shared in order");
        let parent = self.parent_of(lease, salt);
        let child = match self.tree.child(parent, tokens) {
            Some(child) => child,
            None => self.tree.add_child(parent, tokens),
        };
        match self.tree.resident(child, pool) {
            Some(page) if matches!(self.pool(pool).fill(page), Fill::Coming(_)) => return false,
            Some(page) => self.pool_mut(pool).refer(page),
            None => {
                let held = std::mem::replace(&mut lease.table[index], Held::Shared);
                let Held::Own(page) = held else {
                    unreachable!("a page beyond the path is the sequence's own");
                };
                let id = self.put(child, page, pool, Fill::By(serial));
                self.filled(pool, id, serial);
            }
        }
        lease.path.push(child);
        true
    }

    /// Gives everything back. Pages that were announced and never filled leave the tree.
    pub(crate) fn release(&mut self, mut lease: Lease, pool: PoolId) {
        while let Some(held) = lease.table.pop() {
            let index = lease.table.len();
            if lease.path.len() > index {
                let node = lease.path.pop().expect("just compared");
                let page = self
                    .tree
                    .resident(node, pool)
                    .expect("a lease holds resident pages");
                let coming = matches!(self.pool(pool).fill(page), Fill::Coming(_));
                let left = self.pool_mut(pool).unrefer(page);
                if coming {
                    assert_eq!(left, 0, "a page in the making is referred to by its maker only");
                    let page = self.evict(pool, page);
                    self.pool_mut(pool).give_back(page);
                }
            }
            if let Held::Own(page) = held {
                self.pool_mut(pool).give_back(page);
            }
        }
        assert!(
            lease.path.is_empty(),
            "a lease refers to no more pages than its table has"
        );
    }

    /// Drops what nobody will look for again: of the path of a lease just released, from the leaf up, what nobody else
    /// refers to or has built upon.
    pub(crate) fn forget(&mut self, path: &[NodeId], pool: PoolId) {
        for &node in path.iter().rev() {
            // Announced and never filled: it went with the lease.
            let Some(page) = self.tree.resident(node, pool) else {
                continue;
            };
            if self.pool(pool).references(page) > 0 || self.tree.children(node) > 0 {
                return;
            }
            let page = self.evict(pool, page);
            self.pool_mut(pool).give_back(page);
        }
    }

    /// Steps with serial numbers below `proven` have come back from this worker.
    pub(crate) fn prove(&mut self, pool: PoolId, proven: u64) {
        let worker = self.worker_mut(pool);
        worker.proven = worker.proven.max(proven);
        while worker
            .unproven
            .front()
            .is_some_and(|&(serial, _)| serial < proven)
        {
            worker.unproven.pop_front();
        }
    }

    /// Withdraws every page that a step which has not come back should have filled.
    pub(crate) fn withdraw_unproven(&mut self, pool: PoolId) {
        let unproven = std::mem::take(&mut self.worker_mut(pool).unproven);
        let proven = self.worker(pool).proven;
        if planted(Bug::TrustUnprovenPages) {
            return;
        }
        // Parents were noted before their children.
        for (serial, page) in unproven.into_iter().rev() {
            let cached = self.pool(pool).node(page).is_some();
            if cached && serial >= proven && self.pool(pool).fill(page) == Fill::By(serial) {
                let page = self.evict(pool, page);
                self.pool_mut(pool).give_back(page);
            }
        }
    }

    fn parent_of(&mut self, lease: &Lease, salt: Salt) -> NodeId {
        match lease.path.last() {
            Some(&node) => node,
            None => self.tree.root_or_new(salt),
        }
    }

    fn fill_of(&self, node: NodeId, pool: PoolId) -> Fill {
        let page = self
            .tree
            .resident(node, pool)
            .expect("a lease holds resident pages");
        self.pool(pool).fill(page)
    }

    fn put(&mut self, node: NodeId, page: Page, pool: PoolId, fill: Fill) -> PageId {
        let id = self.pool_mut(pool).cache(page, node, fill);
        self.tree.add_resident(node, pool, id);
        id
    }

    fn filled(&mut self, pool: PoolId, page: PageId, serial: u64) {
        let worker = self.worker_mut(pool);
        worker.pool.set_fill(page, Fill::By(serial));
        if serial >= worker.proven {
            worker.unproven.push_back((serial, page));
        }
    }

    fn worker(&self, pool: PoolId) -> &Worker {
        self.workers[pool.0 as usize].as_ref().expect("a pool in use")
    }

    fn worker_mut(&mut self, pool: PoolId) -> &mut Worker {
        self.workers[pool.0 as usize].as_mut().expect("a pool in use")
    }

    fn pool_mut(&mut self, pool: PoolId) -> &mut Pool {
        &mut self.worker_mut(pool).pool
    }
}

/// The tokens that a page will hold, under which salt, and who computes them; `None`: not announced.
pub(crate) type Coming<'a> = Option<(Salt, &'a [u32], SequenceId)>;
