//! Where a step's tokens go: from the experts of each token and the placement to one list per destination rank.
//!
//! Must stay true: the lists depend only on this rank's tokens, the placement and the rank, so that every run gives
//! the same; a token's row is listed once per destination.

use conclave_plan::placement::Placement;

/// Who holds which expert, for every layer, as one rank sees it.
#[derive(Clone, Debug)]
pub struct Routes {
    pub rank: u32,
    pub ranks: u32,
    layers: Vec<LayerRoutes>,
}

/// One layer's owners.
#[derive(Clone, Debug)]
pub struct LayerRoutes {
    owners: Vec<Vec<u32>>,
    /// Index among this rank's experts, by expert.
    local: Vec<Option<u32>>,
}

impl Routes {
    /// The placement must have been checked.
    pub fn new(placement: &Placement, rank: u32, layers: usize) -> Routes {
        let layer = |layer: usize| {
            let owners = placement.layer(layer).owners.clone();
            let mut held = 0..;
            let local = owners
                .iter()
                .map(|owners| owners.contains(&rank).then(|| held.next()).flatten());
            LayerRoutes {
                local: local.collect(),
                owners,
            }
        };
        Routes {
            rank,
            ranks: placement.ranks,
            layers: (0..layers).map(layer).collect(),
        }
    }

    pub fn layer(&self, layer: usize) -> &LayerRoutes {
        &self.layers[layer]
    }
}

impl LayerRoutes {
    /// The expert's index among those that this rank holds.
    pub fn local(&self, expert: u32) -> Option<u32> {
        self.local.get(expert as usize).copied().flatten()
    }

    pub fn experts(&self) -> usize {
        self.owners.len()
    }
}

/// What goes to one rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Destination {
    /// Tokens whose rows go there, ascending.
    pub tokens: Vec<u32>,
    /// What to compute there: index into `tokens`, and the expert. In the order of tokens, then of slots.
    pub pairs: Vec<(u32, u32)>,
    /// For each pair, the row of `y` its result belongs to: token * top_k + slot.
    pub origins: Vec<u32>,
}

/// All destinations of one layer; kept over layers so that its lists are allocated once.
#[derive(Clone, Debug, Default)]
pub struct SendPlan {
    pub destinations: Vec<Destination>,
    load: Vec<u32>,
}

impl SendPlan {
    /// Plans where the `experts` (`[tokens, top_k]`) of this rank's tokens are computed. An expert with replicas goes
    /// to the rank that this step has given least to so far; of equals, to the next one from this rank on, so that
    /// ranks do not all choose the first. `Err`: an expert that the layer does not have.
    pub fn fill(&mut self, routes: &Routes, layer: usize, experts: &[u32], top_k: usize) -> Result<(), u32> {
        let layer = routes.layer(layer);
        self.destinations
            .resize_with(routes.ranks as usize, Destination::default);
        for destination in &mut self.destinations {
            destination.tokens.clear();
            destination.pairs.clear();
            destination.origins.clear();
        }
        self.load.clear();
        self.load.resize(routes.ranks as usize, 0);
        for (token, slots) in (0u32..).zip(experts.chunks_exact(top_k)) {
            for (slot, &expert) in (0u32..).zip(slots) {
                let owners = layer.owners.get(expert as usize).ok_or(expert)?;
                let distance = |rank: u32| (rank + routes.ranks - routes.rank) % routes.ranks;
                let chosen = owners
                    .iter()
                    .min_by_key(|&&rank| (self.load[rank as usize], distance(rank)));
                let rank = *chosen.ok_or(expert)? as usize;
                self.load[rank] += 1;
                let destination = &mut self.destinations[rank];
                if destination.tokens.last() != Some(&token) {
                    destination.tokens.push(token);
                }
                destination
                    .pairs
                    .push((destination.tokens.len() as u32 - 1, expert));
                destination.origins.push(token * top_k as u32 + slot);
            }
        }
        Ok(())
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
    fn a_row_goes_once_to_each_rank() {
        let routes = Routes::new(&placement(2, vec![vec![0], vec![1], vec![0]]), 0, 1);
        let mut plan = SendPlan::default();
        plan.fill(&routes, 0, &[0, 2, 1, 0], 2).unwrap();
        let [own, other] = &plan.destinations[..] else {
            panic!()
        };
        assert_eq!(own.tokens, [0, 1]);
        assert_eq!(own.pairs, [(0, 0), (0, 2), (1, 0)]);
        assert_eq!(own.origins, [0, 1, 3]);
        assert_eq!(other.tokens, [1]);
        assert_eq!(other.pairs, [(0, 1)]);
        assert_eq!(other.origins, [2]);
        assert_eq!(routes.layer(0).local(2), Some(1));
        assert_eq!(routes.layer(0).local(1), None);
    }

    #[test]
    fn replicas_share_the_load() {
        let both = vec![0, 1, 2];
        let routes = Routes::new(&placement(3, vec![both.clone(), both]), 1, 1);
        let mut plan = SendPlan::default();
        plan.fill(&routes, 0, &[0, 1, 0, 1, 0, 1], 2).unwrap();
        let loads: Vec<usize> = plan.destinations.iter().map(|d| d.pairs.len()).collect();
        assert_eq!(loads, [2, 2, 2]);
        // The first one stays at home.
        assert_eq!(plan.destinations[1].origins[0], 0);
    }

    #[test]
    fn an_unknown_expert_is_an_error() {
        let routes = Routes::new(&placement(1, vec![vec![0]]), 0, 1);
        assert_eq!(SendPlan::default().fill(&routes, 0, &[7], 1), Err(7));
    }
}
