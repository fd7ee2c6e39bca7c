//! The prefix tree: one node per full token page, keyed by the pages before it. Knows nodes, tokens and on which
//! workers a node's page is resident; knows nothing of references, eviction or sequences.
//!
//! Roots are keyed by salt: sequences with different salts share no node. Children are found through one hash table
//! over (parent, tokens), which compares the tokens in full, so that equal hashes never mean equal prefixes. The table
//! is never iterated: nothing depends on its order.
//!
//! Must stay true: a node that is resident on a worker has a parent that is resident there; a node without residents
//! and children is gone.

use std::collections::BTreeMap;

use crate::api::{PageId, SequenceId};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct NodeId(pub(crate) u32);

/// Index of a worker's page pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PoolId(pub(crate) u32);

/// Who may share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Salt {
    Shared(u64),
    /// The prefix cache is off: the sequence finds its own pages again after a preemption, and nobody else's.
    Private(SequenceId),
}

const NONE: NodeId = NodeId(u32::MAX);

#[derive(Debug)]
struct Node {
    parent: NodeId,
    hash: u64,
    /// The next node in the same bucket.
    next: NodeId,
    children: u32,
    residents: Vec<(PoolId, PageId)>,
}

#[derive(Debug)]
pub(crate) struct Tree {
    page_tokens: usize,
    nodes: Vec<Node>,
    /// `page_tokens` per node.
    tokens: Vec<u32>,
    unused: Vec<NodeId>,
    buckets: Vec<NodeId>,
    live: usize,
    roots: BTreeMap<Salt, NodeId>,
    salts: BTreeMap<NodeId, Salt>,
}

const BUCKETS_MIN: usize = 1 << 10;

impl Tree {
    pub(crate) fn new(page_tokens: u32) -> Tree {
        assert!(page_tokens > 0, "a page holds at least one token");
        Tree {
            page_tokens: page_tokens as usize,
            nodes: Vec::new(),
            tokens: Vec::new(),
            unused: Vec::new(),
            buckets: vec![NONE; BUCKETS_MIN],
            live: 0,
            roots: BTreeMap::new(),
            salts: BTreeMap::new(),
        }
    }

    /// Nodes, roots aside.
    pub(crate) fn len(&self) -> usize {
        self.live
    }

    pub(crate) fn root(&self, salt: Salt) -> Option<NodeId> {
        self.roots.get(&salt).copied()
    }

    /// The root of `salt`, made if there is none. It stays as long as it has children: add one.
    pub(crate) fn root_or_new(&mut self, salt: Salt) -> NodeId {
        if let Some(root) = self.root(salt) {
            return root;
        }
        let root = self.allocate(NONE, 0);
        self.roots.insert(salt, root);
        self.salts.insert(root, salt);
        root
    }

    pub(crate) fn parent(&self, node: NodeId) -> Option<NodeId> {
        let parent = self.nodes[node.0 as usize].parent;
        (parent != NONE).then_some(parent)
    }

    pub(crate) fn is_root(&self, node: NodeId) -> bool {
        self.nodes[node.0 as usize].parent == NONE
    }

    pub(crate) fn children(&self, node: NodeId) -> u32 {
        self.nodes[node.0 as usize].children
    }

    pub(crate) fn child(&self, parent: NodeId, tokens: &[u32]) -> Option<NodeId> {
        let hash = hash(parent, tokens);
        let mut at = self.buckets[self.bucket(hash)];
        while at != NONE {
            let node = &self.nodes[at.0 as usize];
            if node.hash == hash && node.parent == parent && self.tokens_of(at) == tokens {
                return Some(at);
            }
            at = node.next;
        }
        None
    }

    /// Adds a child that is not there yet.
    pub(crate) fn add_child(&mut self, parent: NodeId, tokens: &[u32]) -> NodeId {
        assert_eq!(tokens.len(), self.page_tokens, "a node holds one full page");
        if self.live >= self.buckets.len() {
            self.grow();
        }
        let hash = hash(parent, tokens);
        let node = self.allocate(parent, hash);
        let bucket = self.bucket(hash);
        self.nodes[node.0 as usize].next = self.buckets[bucket];
        self.buckets[bucket] = node;
        let start = node.0 as usize * self.page_tokens;
        self.tokens[start..start + self.page_tokens].copy_from_slice(tokens);
        self.nodes[parent.0 as usize].children += 1;
        self.live += 1;
        node
    }

    pub(crate) fn residents(&self, node: NodeId) -> &[(PoolId, PageId)] {
        &self.nodes[node.0 as usize].residents
    }

    pub(crate) fn resident(&self, node: NodeId, pool: PoolId) -> Option<PageId> {
        let mut residents = self.residents(node).iter();
        residents.find(|(at, _)| *at == pool).map(|&(_, page)| page)
    }

    pub(crate) fn add_resident(&mut self, node: NodeId, pool: PoolId, page: PageId) {
        assert!(
            self.resident(node, pool).is_none(),
            "a node has one page per worker"
        );
        self.nodes[node.0 as usize].residents.push((pool, page));
    }

    /// Removes a residency, and the node (and its root) if that was all there was to it.
    pub(crate) fn remove_resident(&mut self, node: NodeId, pool: PoolId) {
        let residents = &mut self.nodes[node.0 as usize].residents;
        let at = residents.iter().position(|(other, _)| *other == pool);
        residents.swap_remove(at.expect("the page is resident"));
        self.prune(node);
    }

    /// Drops `node` and then its ancestors as far as nothing is left of them.
    fn prune(&mut self, mut node: NodeId) {
        loop {
            let Node { parent, children, .. } = self.nodes[node.0 as usize];
            if children > 0 || !self.residents(node).is_empty() {
                return;
            }
            if parent == NONE {
                let salt = self.salts.remove(&node).expect("every root has a salt");
                self.roots.remove(&salt);
                self.unused.push(node);
                return;
            }
            self.unlink(node);
            self.unused.push(node);
            self.live -= 1;
            self.nodes[parent.0 as usize].children -= 1;
            node = parent;
        }
    }

    fn unlink(&mut self, node: NodeId) {
        let Node { hash, next, .. } = self.nodes[node.0 as usize];
        let bucket = self.bucket(hash);
        if self.buckets[bucket] == node {
            self.buckets[bucket] = next;
            return;
        }
        let mut at = self.buckets[bucket];
        while self.nodes[at.0 as usize].next != node {
            at = self.nodes[at.0 as usize].next;
        }
        self.nodes[at.0 as usize].next = next;
    }

    fn allocate(&mut self, parent: NodeId, hash: u64) -> NodeId {
        let node = self.unused.pop().unwrap_or(NodeId(self.nodes.len() as u32));
        assert!(node != NONE, "fewer nodes than pages, fewer pages than u32::MAX");
        if node.0 as usize == self.nodes.len() {
            self.tokens.resize(self.tokens.len() + self.page_tokens, 0);
            self.nodes.push(Node {
                parent,
                hash,
                next: NONE,
                children: 0,
                residents: Vec::new(),
            });
        } else {
            let reused = &mut self.nodes[node.0 as usize];
            assert!(
                reused.residents.is_empty() && reused.children == 0,
                "an unused node is empty"
            );
            (reused.parent, reused.hash, reused.next) = (parent, hash, NONE);
        }
        node
    }

    fn grow(&mut self) {
        let old = std::mem::take(&mut self.buckets);
        self.buckets = vec![NONE; old.len() * 2];
        for mut at in old {
            while at != NONE {
                let Node { hash, next, .. } = self.nodes[at.0 as usize];
                let bucket = self.bucket(hash);
                self.nodes[at.0 as usize].next = self.buckets[bucket];
                self.buckets[bucket] = at;
                at = next;
            }
        }
    }

    fn bucket(&self, hash: u64) -> usize {
        hash as usize & (self.buckets.len() - 1)
    }

    fn tokens_of(&self, node: NodeId) -> &[u32] {
        let start = node.0 as usize * self.page_tokens;
        &self.tokens[start..start + self.page_tokens]
    }
}

/// Multiply and fold, two tokens at a time.
fn hash(parent: NodeId, tokens: &[u32]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut state = u64::from(parent.0) ^ 0x2545_f491_4f6c_dd1d;
    for pair in tokens.chunks(2) {
        let word = u64::from(pair[0]) << 32 | u64::from(pair.get(1).copied().unwrap_or(0));
        let product = u128::from(state ^ word) * u128::from(ODD);
        state = (product as u64) ^ (product >> 64) as u64 ^ ODD;
    }
    state ^ (state >> 29)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: PoolId = PoolId(0);
    const THERE: PoolId = PoolId(1);

    #[test]
    fn finds_what_was_added_under_its_own_parent_and_salt_only() {
        let mut tree = Tree::new(2);
        let root = tree.root_or_new(Salt::Shared(0));
        let other = tree.root_or_new(Salt::Shared(1));
        let node = tree.add_child(root, &[1, 2]);
        assert_eq!(tree.child(root, &[1, 2]), Some(node));
        assert_eq!(tree.child(root, &[2, 1]), None);
        assert_eq!(tree.child(other, &[1, 2]), None);
        assert_eq!(tree.child(node, &[1, 2]), None);
    }

    #[test]
    fn a_node_goes_with_its_last_resident_and_takes_its_root_along() {
        let mut tree = Tree::new(1);
        let root = tree.root_or_new(Salt::Shared(7));
        let parent = tree.add_child(root, &[1]);
        let leaf = tree.add_child(parent, &[2]);
        for (node, pool, page) in [(parent, HERE, 0), (leaf, HERE, 1), (parent, THERE, 5)] {
            tree.add_resident(node, pool, PageId(page));
        }
        tree.remove_resident(leaf, HERE);
        assert_eq!((tree.len(), tree.child(parent, &[2])), (1, None));
        tree.remove_resident(parent, HERE);
        assert_eq!(tree.resident(parent, THERE), Some(PageId(5)));
        tree.remove_resident(parent, THERE);
        assert_eq!((tree.len(), tree.root(Salt::Shared(7))), (0, None));
    }

    #[test]
    fn keeps_every_node_through_growth_of_its_table() {
        let mut tree = Tree::new(1);
        let root = tree.root_or_new(Salt::Shared(0));
        let count = BUCKETS_MIN as u32 * 3;
        let nodes: Vec<NodeId> = (0..count).map(|token| tree.add_child(root, &[token])).collect();
        for (token, node) in (0..count).zip(&nodes) {
            assert_eq!(tree.child(root, &[token]), Some(*node));
        }
        assert_eq!(tree.len(), count as usize);
    }
}
