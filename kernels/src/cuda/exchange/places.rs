//! This rank's own memory of an exchange, and the table of who holds which expert, as kernels read it.

use conclave_plan::placement::Placement;

use super::{ExchangeShape, MAX_RANKS, MAX_REPLICAS};
use crate::backend::Result;
use crate::cuda::{Gpu, Memory, as_bytes, shape};
use crate::ops::route::cuda::{Groups, max_groups};

/// No owner; no expert here.
const ABSENT: u32 = u32::MAX;
/// Bytes of `State`.
const STATE: usize = 32;

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

/// Memory that no peer touches.
pub(super) struct Places {
    /// `State`: exchanges begun and open, the time that a poll may last, failure, arrivals.
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
    _groups: Memory,
    pub(super) groups: Groups,
    pub(super) most_groups: usize,
    pub(super) local_experts: usize,
}

impl Places {
    pub(super) fn new(gpu: &Gpu, shape: &ExchangeShape, entries: &[u32], local: usize) -> Result<Places> {
        let alloc = |words: usize| gpu.alloc(words.max(1) * 4, "an exchange");
        let (few, k) = (shape.few_rows(), shape.top_k);
        let placement = alloc(entries.len())?;
        gpu.write(&placement, 0, as_bytes(entries))?;
        let local = local.max(1);
        let groups = gpu.alloc(Groups::bytes(few * k, local), "groups of an exchange")?;
        Ok(Places {
            state: gpu.alloc(STATE, "an exchange")?,
            placement,
            loads: alloc(2 * MAX_RANKS)?,
            owner: alloc(shape.few_tokens.max(shape.many_tokens) * k)?,
            counts: alloc(MAX_RANKS)?,
            ids: alloc(few * k)?,
            weights: alloc(few * k)?,
            x: alloc(few * shape.hidden)?,
            rows: alloc(1)?,
            groups: Groups::at(groups.address, few * k, local),
            _groups: groups,
            most_groups: max_groups(few * k, local),
            local_experts: local,
        })
    }

    /// For an epoch's first exchange; `timeout`: nanoseconds that a poll may last.
    pub(super) fn start(&self, gpu: &Gpu, epoch: u32, timeout: u64) -> Result<()> {
        let begun = u64::from(epoch) << 32;
        gpu.write(&self.state, 0, as_bytes(&[begun, begun, timeout, 0]))
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
