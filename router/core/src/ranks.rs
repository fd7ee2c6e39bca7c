//! Who gets which rank. Ranks asked for come first, then those kept from the epoch before, then attach order, so that
//! a restart or a loss moves as few workers as it can.

use std::collections::BTreeMap;

use crate::api::WorkerId;
use crate::member::Attached;

/// The chosen workers in order of rank.
pub(crate) fn assign_ranks(chosen: &[WorkerId], attached: &BTreeMap<WorkerId, Attached>) -> Vec<WorkerId> {
    let mut sorted = chosen.to_vec();
    sorted.sort_unstable();
    let mut ranks: Vec<Option<WorkerId>> = vec![None; sorted.len()];
    let wishes: [fn(&Attached) -> Option<u32>; 2] =
        [|worker| worker.info.wanted_rank, |worker| worker.last_rank];
    for wish in wishes {
        sorted.retain(|worker| {
            let wanted = wish(&attached[worker]);
            let place = wanted
                .and_then(|rank| ranks.get_mut(rank as usize))
                .filter(|place| place.is_none());
            match place {
                Some(place) => *place = Some(*worker),
                None => return true,
            }
            false
        });
    }
    let mut rest = sorted.into_iter();
    ranks
        .into_iter()
        .filter_map(|place| place.or_else(|| rest.next()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::WorkerInfo;
    use crate::radix::PoolId;

    fn ranks(workers: &[(u64, Option<u32>, Option<u32>)]) -> Vec<u64> {
        let attached = workers.iter().map(|&(id, wanted_rank, last_rank)| {
            let info = WorkerInfo {
                kv_pages: 1,
                max_slots: 1,
                max_batched_tokens: 1,
                expert_capacity: None,
                wanted_rank,
            };
            let attached = Attached {
                info,
                pool: PoolId(0),
                leaving: None,
                member: None,
                last_rank,
                experts: Vec::new(),
                suspicions: 0,
                busy_us: 0,
                idle_us: 0,
            };
            (WorkerId(id), attached)
        });
        let attached: BTreeMap<WorkerId, Attached> = attached.collect();
        let chosen: Vec<WorkerId> = attached.keys().copied().collect();
        assign_ranks(&chosen, &attached)
            .into_iter()
            .map(|worker| worker.0)
            .collect()
    }

    #[test]
    fn asked_for_then_kept_then_in_order() {
        assert_eq!(
            ranks(&[(5, None, None), (6, Some(0), Some(2)), (7, None, Some(1))]),
            [6, 7, 5]
        );
    }

    #[test]
    fn a_rank_beyond_the_group_or_asked_for_twice_is_any_rank() {
        assert_eq!(
            ranks(&[(1, Some(9), None), (2, Some(1), None), (3, Some(1), None)]),
            [1, 2, 3]
        );
    }
}
