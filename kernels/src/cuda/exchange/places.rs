//! This rank's own memory of an exchange, and the table of who holds which expert, as kernels read it.

use conclave_plan::placement::Placement;

use super::{ExchangeShape, MAX_RANKS, MAX_REPLICAS};
use crate::backend::Result;
use crate::cuda::{Gpu, Memory, as_bytes, shape};
use crate::ops::route::cuda::{Groups, max_groups};

/// No owner; no expert here.
const ABSENT: u32 = u32::MAX;
/// Bytes of `State`.
const STATE: usize = 40;

/// Entries `[layers][experts][MAX_REPLICAS]`: rank << 16 | index among the rank's experts, and the most experts that
/// `rank` holds in a layer.
pub(super) fn table(placement: &Placement, layers: usize, rank: u32) -> Result<(Vec<u32>, usize)> {
    const OP: &str = "placement";
    let experts = placement.experts as usize;
    let mut entries = Vec::with_capacity(layers * experts * MAX_REPLICAS);
    let mut most = 0;
    for layer in 0..layers {
        let owners = &placement.layer(layer).owners;
        if owners.len() != experts {
            return Err(shape(OP, "experts", owners.len(), experts));
        }
        let mut held = vec![0u32; placement.ranks as usize];
        for of_expert in owners {
            if of_expert.is_empty() || of_expert.len() > MAX_REPLICAS {
                return Err(shape(
                    OP,
                    "owners of an expert",
                    of_expert.len(),
                    format!("1 to {MAX_REPLICAS}"),
                ));
            }
            for place in 0..MAX_REPLICAS {
                entries.push(match of_expert.get(place) {
                    None => ABSENT,
                    Some(&owner) => {
                        let index = held
                            .get_mut(owner as usize)
                            .ok_or_else(|| shape(OP, "owner", owner, format!("below {}", placement.ranks)))?;
                        *index += 1;
                        owner << 16 | (*index - 1)
                    }
                });
            }
        }
        most = most.max(held.get(rank as usize).copied().unwrap_or(0) as usize);
    }
    Ok((entries, most))
}

/// Tokens for which there is always room.
const TOKENS: usize = 8192;

/// Memory that no peer touches. It is kept over epochs: while a dead peer's process is torn down, the driver may hold up
/// every allocation for hundreds of milliseconds.
pub(super) struct Places {
    /// `State`: exchanges begun and open, the time that a poll may last, failure, arrivals, when the host's word was read.
    pub(super) state: Memory,
    pub(super) placement: Memory,
    pub(super) loads: Memory,
    pub(super) owner: Memory,
    pub(super) counts: Memory,
    pub(super) ids: Memory,
    pub(super) weights: Memory,
    /// Rows of the few-token family as they came, as F32.
    pub(super) x: Memory,
    pub(super) rows: Memory,
    group_memory: Memory,
    pub(super) groups: Groups,
    pub(super) most_groups: usize,
    pub(super) local_experts: usize,
}

impl Places {
    /// For `shape` and every shape of no more ranks. `experts`: of a layer, on all ranks.
    pub(super) fn new(gpu: &Gpu, shape: &ExchangeShape, entries: usize, experts: usize) -> Result<Places> {
        let alloc = |words: usize| gpu.alloc(words.max(1) * 4, "an exchange");
        let (few, k) = (shape.few_rows().next_multiple_of(128), shape.top_k);
        let group_memory = gpu.alloc(Groups::bytes(few * k, experts), "groups of an exchange")?;
        Ok(Places {
            state: gpu.alloc(STATE, "an exchange")?,
            placement: alloc(entries)?,
            loads: alloc(2 * MAX_RANKS)?,
            owner: alloc(shape.few_tokens.max(shape.many_tokens).max(TOKENS) * k)?,
            counts: alloc(MAX_RANKS)?,
            ids: alloc(few * k)?,
            weights: alloc(few * k)?,
            x: alloc(few * shape.hidden)?,
            rows: alloc(1)?,
            groups: Groups::default(),
            group_memory,
            most_groups: 0,
            local_experts: 0,
        })
    }

    /// Whether there is room for an epoch.
    pub(super) fn hold(&self, shape: &ExchangeShape, entries: usize, experts: usize) -> bool {
        let (few, k) = (shape.few_rows(), shape.top_k);
        let tokens = shape.few_tokens.max(shape.many_tokens);
        self.placement.bytes >= entries * 4
            && self.ids.bytes >= few * k * 4
            && self.owner.bytes >= tokens * k * 4
            && self.x.bytes >= few * shape.hidden * 4
            && self.group_memory.bytes >= Groups::bytes(few * k, experts)
    }

    /// For an epoch in which this rank holds `local` experts of a layer.
    pub(super) fn set(
        &mut self,
        gpu: &Gpu,
        shape: &ExchangeShape,
        entries: &[u32],
        local: usize,
    ) -> Result<()> {
        let rows = shape.few_rows() * shape.top_k;
        let local = local.max(1);
        self.groups = Groups::at(self.group_memory.address, rows, local);
        self.most_groups = max_groups(rows, local);
        self.local_experts = local;
        gpu.write(&self.placement, 0, as_bytes(entries))?;
        let loads = [0u32; 2 * MAX_RANKS];
        gpu.write(&self.loads, 0, as_bytes(&loads))?;
        gpu.write(&self.rows, 0, as_bytes(&[0u32]))
    }

    /// For an epoch's first exchange; `timeout`: nanoseconds that a poll may last.
    pub(super) fn start(&self, gpu: &Gpu, epoch: u32, timeout: u64) -> Result<()> {
        let begun = u64::from(epoch) << 32;
        gpu.write(&self.state, 0, as_bytes(&[begun, begun, timeout, 0, 0]))
    }

    pub(super) fn set_timeout(&self, gpu: &Gpu, timeout: u64) -> Result<()> {
        gpu.write(&self.state, 16, as_bytes(&[timeout]))
    }
}

#[cfg(test)]
mod tests {
    use conclave_plan::placement::LayerPlacement;

    use super::*;

    fn placement(ranks: u32, owners: Vec<Vec<u32>>) -> Placement {
        Placement {
            ranks,
            experts: owners.len() as u32,
            layers: vec![LayerPlacement { owners }],
        }
    }

    #[test]
    fn local_indices_count_each_ranks_experts() {
        let placement = placement(3, vec![vec![0], vec![1, 2], vec![1], vec![2]]);
        let (entries, most) = table(&placement, 2, 1).unwrap();
        let layer = [
            [0, ABSENT, ABSENT, ABSENT],
            [1 << 16, 2 << 16, ABSENT, ABSENT],
            [1 << 16 | 1, ABSENT, ABSENT, ABSENT],
            [2 << 16 | 1, ABSENT, ABSENT, ABSENT],
        ];
        assert_eq!(entries, [layer, layer].concat().concat());
        assert_eq!(most, 2);
    }

    #[test]
    fn a_placement_that_kernels_cannot_follow_is_refused() {
        for owners in [vec![vec![]], vec![vec![3]], vec![vec![0, 1, 2, 3, 4]]] {
            assert!(table(&placement(3, owners), 1, 0).is_err());
        }
    }
}
