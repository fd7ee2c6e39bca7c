//! One worker's KV pages: which are free, which the prefix tree owns, and in what order those may be evicted.
//!
//! A page is in exactly one place: free, owned by a sequence (a [`Page`] value in its table), or cached (owned by the
//! tree). [`Page`] can be neither copied nor cloned, so giving a page back twice does not compile; references to a
//! cached page are counted explicitly, because the pool must know at once when the last one goes.
//!
//! Must stay true: `free + owned + cached == total`; the eviction list holds exactly the cached pages without
//! references; a child of the tree stands before its parent in that list (see `cache`), so that taking from the front
//! evicts leaves first.
//!
//! A freed page may be given out again in the next step that is planned, even while an earlier step that still writes
//! it is in flight: a worker runs its steps in order, so that write comes before any by the new owner.
//!
//! Keeps invariant S3 of ARCHITECTURE.md.

use crate::api::{PageId, SequenceId};
use crate::radix::NodeId;

/// A page that somebody owns.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Page(PageId);

impl Page {
    pub(crate) fn id(&self) -> PageId {
        self.0
    }
}

/// What is known of a cached page's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    /// A running sequence has yet to compute it.
    Coming(SequenceId),
    /// The step with this serial number (or an earlier one) fills it.
    By(u64),
}

const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Entry {
    /// Present if cached.
    cached: Option<Cached>,
    before: u32,
    after: u32,
}

#[derive(Debug)]
struct Cached {
    page: Page,
    node: NodeId,
    references: u32,
    fill: Fill,
}

/// The pages of one worker.
#[derive(Debug)]
pub(crate) struct Pool {
    total: u32,
    /// Given back; pages with numbers from `entries.len()` on were never used.
    free: Vec<Page>,
    entries: Vec<Entry>,
    cached: u32,
    evictable: u32,
    oldest: u32,
    newest: u32,
}

impl Pool {
    pub(crate) fn new(total: u32) -> Pool {
        Pool {
            total,
            free: Vec::new(),
            entries: Vec::new(),
            cached: 0,
            evictable: 0,
            oldest: NONE,
            newest: NONE,
        }
    }

    pub(crate) fn total(&self) -> u32 {
        self.total
    }

    pub(crate) fn free(&self) -> u32 {
        self.total - self.entries.len() as u32 + self.free.len() as u32
    }

    pub(crate) fn cached(&self) -> u32 {
        self.cached
    }

    /// Cached pages that no sequence refers to.
    pub(crate) fn evictable(&self) -> u32 {
        self.evictable
    }

    /// A free page, if there is one without evicting.
    pub(crate) fn take(&mut self) -> Option<Page> {
        if let Some(page) = self.free.pop() {
            return Some(page);
        }
        let number = self.entries.len() as u32;
        (number < self.total).then(|| {
            self.entries.push(Entry {
                cached: None,
                before: NONE,
                after: NONE,
            });
            Page(PageId(number))
        })
    }

    pub(crate) fn give_back(&mut self, page: Page) {
        assert!(
            self.entries[page.0.0 as usize].cached.is_none(),
            "an owned page is not cached"
        );
        assert!(
            (self.free.len() as u32) < self.total,
            "more pages free than there are"
        );
        self.free.push(page);
    }

    /// Hands a page to the tree, with one reference.
    pub(crate) fn cache(&mut self, page: Page, node: NodeId, fill: Fill) -> PageId {
        let id = page.id();
        let entry = &mut self.entries[id.0 as usize];
        assert!(entry.cached.is_none(), "page {} is cached already", id.0);
        entry.cached = Some(Cached {
            page,
            node,
            references: 1,
            fill,
        });
        self.cached += 1;
        id
    }

    /// Takes an unreferenced page back from the tree.
    pub(crate) fn uncache(&mut self, id: PageId) -> Page {
        assert_eq!(self.references(id), 0, "a referenced page leaves the tree");
        self.unlink(id);
        let cached = self.entries[id.0 as usize].cached.take();
        self.cached -= 1;
        cached.expect("asserted above: the page is cached").page
    }

    pub(crate) fn refer(&mut self, id: PageId) {
        if self.references(id) == 0 {
            self.unlink(id);
        }
        self.cached_mut(id).references += 1;
    }

    /// Drops one reference and says how many are left. A page without any becomes the last to be evicted.
    pub(crate) fn unrefer(&mut self, id: PageId) -> u32 {
        let cached = self.cached_mut(id);
        assert!(cached.references > 0, "page {} has no reference to drop", id.0);
        cached.references -= 1;
        let left = cached.references;
        if left == 0 {
            self.link_newest(id);
        }
        left
    }

    pub(crate) fn references(&self, id: PageId) -> u32 {
        self.cached_ref(id).references
    }

    pub(crate) fn fill(&self, id: PageId) -> Fill {
        self.cached_ref(id).fill
    }

    pub(crate) fn set_fill(&mut self, id: PageId, fill: Fill) {
        self.cached_mut(id).fill = fill;
    }

    /// The tree's node of a page; `None` if the tree does not own it.
    pub(crate) fn node(&self, id: PageId) -> Option<NodeId> {
        self.entries
            .get(id.0 as usize)?
            .cached
            .as_ref()
            .map(|cached| cached.node)
    }

    /// The page to evict next.
    pub(crate) fn oldest(&self) -> Option<PageId> {
        (self.oldest != NONE).then_some(PageId(self.oldest))
    }

    /// The eviction list from its front.
    pub(crate) fn eviction_order(&self) -> impl Iterator<Item = PageId> + '_ {
        std::iter::successors(self.oldest(), |id| {
            let after = self.entries[id.0 as usize].after;
            (after != NONE).then_some(PageId(after))
        })
    }

    /// Every cached page and its node.
    pub(crate) fn cached_pages(&self) -> impl Iterator<Item = (PageId, NodeId)> + '_ {
        (0..).zip(&self.entries).filter_map(|(number, entry)| {
            let cached = entry.cached.as_ref()?;
            Some((PageId(number), cached.node))
        })
    }

    pub(crate) fn free_pages(&self) -> impl Iterator<Item = PageId> + '_ {
        self.free.iter().map(Page::id)
    }

    fn cached_ref(&self, id: PageId) -> &Cached {
        let entry = &self.entries[id.0 as usize];
        entry.cached.as_ref().expect("the tree holds cached pages only")
    }

    fn cached_mut(&mut self, id: PageId) -> &mut Cached {
        let entry = &mut self.entries[id.0 as usize];
        entry.cached.as_mut().expect("the tree holds cached pages only")
    }

    fn link_newest(&mut self, id: PageId) {
        let before = self.newest;
        let entry = &mut self.entries[id.0 as usize];
        entry.before = before;
        entry.after = NONE;
        match before {
            NONE => self.oldest = id.0,
            _ => self.entries[before as usize].after = id.0,
        }
        self.newest = id.0;
        self.evictable += 1;
    }

    fn unlink(&mut self, id: PageId) {
        let Entry { before, after, .. } = self.entries[id.0 as usize];
        match before {
            NONE => self.oldest = after,
            _ => self.entries[before as usize].after = after,
        }
        match after {
            NONE => self.newest = before,
            _ => self.entries[after as usize].before = before,
        }
        assert!(self.evictable > 0, "page {} is not in the eviction list", id.0);
        self.evictable -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_out_every_page_once_and_takes_them_back() {
        let mut pool = Pool::new(3);
        let pages: Vec<Page> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(
            pages.iter().map(|page| page.id().0).collect::<Vec<_>>(),
            [0, 1, 2]
        );
        assert_eq!(pool.free(), 0);
        for page in pages {
            pool.give_back(page);
        }
        assert_eq!(pool.free(), 3);
    }

    #[test]
    fn evicts_in_the_order_of_the_last_reference() {
        let mut pool = Pool::new(3);
        let ids: Vec<PageId> = (0..3)
            .map(|node| {
                let page = pool.take().unwrap();
                pool.cache(page, NodeId(node), Fill::By(0))
            })
            .collect();
        for id in [ids[1], ids[0], ids[2]] {
            assert_eq!(pool.unrefer(id), 0);
        }
        assert_eq!(
            pool.eviction_order().collect::<Vec<_>>(),
            [ids[1], ids[0], ids[2]]
        );
        pool.refer(ids[0]);
        assert_eq!(pool.evictable(), 2);
        assert_eq!(pool.eviction_order().collect::<Vec<_>>(), [ids[1], ids[2]]);
        let page = pool.uncache(ids[1]);
        pool.give_back(page);
        assert_eq!((pool.free(), pool.cached(), pool.evictable()), (1, 2, 1));
    }

    #[test]
    #[should_panic(expected = "referenced page leaves the tree")]
    fn refuses_to_evict_a_referenced_page() {
        let mut pool = Pool::new(1);
        let page = pool.take().unwrap();
        let id = pool.cache(page, NodeId(0), Fill::By(0));
        pool.uncache(id);
    }

    #[test]
    #[should_panic(expected = "no reference to drop")]
    fn refuses_to_drop_a_reference_twice() {
        let mut pool = Pool::new(1);
        let page = pool.take().unwrap();
        let id = pool.cache(page, NodeId(0), Fill::By(0));
        pool.unrefer(id);
        pool.unrefer(id);
    }
}
