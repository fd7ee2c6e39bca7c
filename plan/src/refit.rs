//! A new placement after the group has changed, that moves as few experts as it can.
//!
//! Must stay true: what [`Placement::fit`] promises of sizes and room holds here too; an expert changes its rank
//! only if its rank is gone or holds more than its share.

use crate::error::Result;
use crate::placement::{LayerPlacement, Placement};

impl Placement {
    /// Like [`Placement::fit`], but rank `r`, which already holds the experts `held[r]` (of every layer), keeps them
    /// as far as its share allows. Experts that nobody keeps go to the ranks with room, in ascending order.
    pub fn refit(experts: u32, capacities: &[u32], held: &[Vec<u32>]) -> Result<Placement> {
        let fitted = Placement::fit(experts, capacities)?;
        if held.iter().all(Vec::is_empty) {
            return Ok(fitted);
        }
        let mut room: Vec<usize> = (0..fitted.ranks)
            .map(|rank| fitted.experts_of(0, rank).len())
            .collect();
        let mut owner: Vec<Option<u32>> = vec![None; experts as usize];
        for (rank, kept) in (0..fitted.ranks).zip(held) {
            for &expert in kept {
                let Some(slot) = owner.get_mut(expert as usize) else {
                    continue;
                };
                if slot.is_none() && room[rank as usize] > 0 {
                    *slot = Some(rank);
                    room[rank as usize] -= 1;
                }
            }
        }
        let mut open = (0..fitted.ranks).flat_map(|rank| std::iter::repeat_n(rank, room[rank as usize]));
        let owners = owner
            .into_iter()
            .map(|kept| kept.or_else(|| open.next()).into_iter().collect());
        Ok(Placement {
            ranks: fitted.ranks,
            experts,
            layers: vec![LayerPlacement {
                owners: owners.collect(),
            }],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(placement: &Placement) -> Vec<Vec<u32>> {
        (0..placement.ranks)
            .map(|rank| placement.experts_of(0, rank))
            .collect()
    }

    /// Experts that their rank did not hold before: bytes to load.
    fn loads(placement: &Placement, before: &[Vec<u32>]) -> usize {
        held(placement)
            .iter()
            .zip(before)
            .map(|(now, had)| now.iter().filter(|expert| !had.contains(expert)).count())
            .sum()
    }

    #[test]
    fn a_lost_rank_costs_the_survivors_its_experts_only() {
        let mut before = held(&Placement::even(256, 8));
        before.remove(3);
        let after = Placement::refit(256, &[256; 7], &before).unwrap();
        after.check(1).unwrap();
        assert_eq!(loads(&after, &before), 32);
        assert!(
            held(&after)
                .iter()
                .all(|experts| (36..=37).contains(&experts.len()))
        );
    }

    #[test]
    fn a_newcomer_takes_its_share_and_nobody_else_loads_anything() {
        let mut before = held(&Placement::even(256, 7));
        before.push(Vec::new());
        let after = Placement::refit(256, &[256; 8], &before).unwrap();
        after.check(1).unwrap();
        assert_eq!(loads(&after, &before), 32);
        assert_eq!(after.experts_of(0, 7).len(), 32);
    }

    #[test]
    fn capacities_bind_and_too_little_room_is_refused() {
        let before = vec![vec![0, 1, 2, 3, 4, 5], vec![6, 7]];
        let after = Placement::refit(8, &[3, 6], &before).unwrap();
        assert_eq!(after.experts_of(0, 0), [0, 1, 2]);
        assert_eq!(after.experts_of(0, 1), [3, 4, 5, 6, 7]);
        assert!(Placement::refit(8, &[3, 4], &before).is_err());
    }

    #[test]
    fn nobody_holds_anything_yet() {
        let after = Placement::refit(8, &[8, 8, 8], &[vec![], vec![], vec![]]).unwrap();
        assert_eq!(after, Placement::even(8, 3));
    }
}
