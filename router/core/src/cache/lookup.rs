//! What the workers have of a token sequence, and a lease on it.

use crate::api::{PageId, SequenceId};
use crate::cache::{Cache, Held, Lease};
use crate::pages::Fill;
use crate::planted::{Bug, planted};
use crate::radix::{NodeId, PoolId, Salt};

/// How much of a token sequence one worker has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Match {
    /// Pages whose content is there, or will be when the steps that were sent have run.
    pub(crate) filled: u32,
    /// As many of those as nobody refers to now.
    pub(crate) unreferenced: u32,
    /// Pages that are there or that running sequences are about to fill, at least `filled`.
    pub(crate) coming: u32,
    /// Who fills the last of them.
    pub(crate) filler: Option<SequenceId>,
}

/// The result of looking a token sequence up; reused between look-ups.
#[derive(Debug, Default)]
pub(crate) struct Lookup {
    path: Vec<NodeId>,
    by_pool: Vec<Match>,
}

impl Lookup {
    pub(crate) fn on(&self, pool: PoolId) -> Match {
        self.by_pool[pool.0 as usize]
    }
}

impl Cache {
    /// Looks up the first `pages` full pages of `tokens` on all workers at once.
    pub(crate) fn look_up(&self, salt: Salt, tokens: &[u32], pages: u32, found: &mut Lookup) {
        found.path.clear();
        found.by_pool.clear();
        found.by_pool.resize(self.workers.len(), Match::default());
        let Some(mut node) = self.tree.root(salt) else {
            return;
        };
        let chunks = tokens.chunks_exact(self.page_tokens as usize);
        for (chunk, depth) in chunks.zip(0..pages) {
            let Some(child) = self.tree.child(node, chunk) else {
                return;
            };
            for &(at, page) in self.tree.residents(child) {
                let pool = self.pool(at);
                let matched = &mut found.by_pool[at.0 as usize];
                assert_eq!(matched.coming, depth, "a resident page has a resident parent");
                matched.coming += 1;
                match pool.fill(page) {
                    Fill::Coming(filler) => matched.filler = Some(filler),
                    Fill::By(_) => {
                        matched.filled += 1;
                        matched.unreferenced += u32::from(pool.references(page) == 0);
                    }
                }
            }
            found.path.push(child);
            node = child;
        }
    }

    /// Takes a lease on the filled pages that `found` says `pool` has. Returns it with the numbers of its pages, and
    /// the serial number of the last step that fills one of them.
    pub(crate) fn lease(&mut self, found: &Lookup, pool: PoolId) -> (Lease, Vec<PageId>, Option<u64>) {
        let filled = found.on(pool).filled as usize;
        let mut pages = Vec::with_capacity(filled);
        let mut newest = None;
        for &node in &found.path[..filled] {
            let page = self
                .tree
                .resident(node, pool)
                .expect("the look-up found it there");
            let Fill::By(serial) = self.pool(pool).fill(page) else {
                unreachable!("filled pages come before those that are coming");
            };
            if !planted(Bug::ForgetReference) {
                self.pool_mut(pool).refer(page);
            }
            newest = newest.max(Some(serial));
            pages.push(page);
        }
        let lease = Lease {
            table: pages.iter().map(|_| Held::Shared).collect(),
            path: found.path[..filled].to_vec(),
        };
        (lease, pages, newest)
    }
}
