//! Which ranks hold which expert.
//!
//! A placement may be uneven and may hold replicas. What must stay true: every expert of every layer has at
//! least one owner, owners are below `ranks`, and no owner is named twice.

use crate::error::{PlanError, Result};
use crate::limits::{MAX_EXPERTS, MAX_LAYERS, MAX_RANKS};

/// Expert to ranks, for every layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    pub ranks: u32,
    pub experts: u32,
    /// One entry for all layers, or one per layer.
    pub layers: Vec<LayerPlacement>,
}

/// `owners[expert]` is the sorted list of ranks that hold it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerPlacement {
    pub owners: Vec<Vec<u32>>,
}

impl Placement {
    /// Contiguous blocks of experts, sizes as equal as possible, each expert on one rank.
    pub fn even(experts: u32, ranks: u32) -> Placement {
        let owners =
            (0..experts).map(|e| vec![(u64::from(e) * u64::from(ranks) / u64::from(experts.max(1))) as u32]);
        Placement {
            ranks,
            experts,
            layers: vec![LayerPlacement {
                owners: owners.collect(),
            }],
        }
    }

    /// Contiguous blocks of experts, each on one rank, where rank `r` holds at most `capacities[r]` experts of a layer:
    /// as equal as the capacities allow. Equals [`Placement::even`] if no capacity is below an equal share.
    pub fn fit(experts: u32, capacities: &[u32]) -> Result<Placement> {
        let ranks = u32::try_from(capacities.len()).unwrap_or(u32::MAX);
        if ranks == 0 || ranks > MAX_RANKS || experts as usize > MAX_EXPERTS {
            return Err(PlanError::Placement {
                problem: format!("{experts} experts on {ranks} ranks"),
                advice: "1 to 4096 of each are supported",
            });
        }
        let room: u64 = capacities.iter().map(|&capacity| u64::from(capacity)).sum();
        if room < u64::from(experts) {
            return Err(PlanError::Placement {
                problem: format!("{experts} experts per layer, room for {room} on {ranks} ranks"),
                advice: "add ranks, or devices with more memory, or take a checkpoint of fewer bits",
            });
        }
        let even = Placement::even(experts, ranks);
        let share = |rank: u32| even.experts_of(0, rank).len();
        if (0..ranks).all(|rank| share(rank) <= capacities[rank as usize] as usize) {
            return Ok(even);
        }
        let owners = blocks(experts, capacities)
            .into_iter()
            .zip(0..)
            .flat_map(|(size, rank)| std::iter::repeat_n(vec![rank], size as usize));
        Ok(Placement {
            ranks,
            experts,
            layers: vec![LayerPlacement {
                owners: owners.collect(),
            }],
        })
    }

    /// Checks a placement that came from elsewhere against the rules above, for a model of `layers` layers.
    pub fn check(&self, layers: usize) -> Result<()> {
        let wrong = |problem: String| PlanError::Placement {
            problem,
            advice: "the sender is broken or of another version",
        };
        if self.ranks == 0 || self.ranks > MAX_RANKS {
            return Err(wrong(format!(
                "it names {} ranks, 1 to {MAX_RANKS} are allowed",
                self.ranks
            )));
        }
        if self.experts as usize > MAX_EXPERTS || layers > MAX_LAYERS {
            return Err(wrong(format!(
                "it names {} experts and {layers} layers",
                self.experts
            )));
        }
        if self.layers.len() != 1 && self.layers.len() != layers {
            return Err(wrong(format!(
                "it has {} layers, the model {layers}",
                self.layers.len()
            )));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            if layer.owners.len() != self.experts as usize {
                return Err(wrong(format!(
                    "layer {index} has {} experts, not {}",
                    layer.owners.len(),
                    self.experts
                )));
            }
            for (expert, owners) in layer.owners.iter().enumerate() {
                let sorted = owners.windows(2).all(|pair| pair[0] < pair[1]);
                if !sorted || owners.last().is_none_or(|&last| last >= self.ranks) {
                    return Err(wrong(format!(
                        "expert {expert} of layer {index} is on {owners:?}: at least one rank below {}, ascending, each once",
                        self.ranks
                    )));
                }
            }
        }
        Ok(())
    }

    /// The placement of one layer.
    pub fn layer(&self, layer: usize) -> &LayerPlacement {
        &self.layers[if self.layers.len() == 1 { 0 } else { layer }]
    }

    /// The experts of `layer` that `rank` holds, ascending.
    pub fn experts_of(&self, layer: usize, rank: u32) -> Vec<u32> {
        let owners = &self.layer(layer).owners;
        (0..self.experts)
            .filter(|&e| owners[e as usize].contains(&rank))
            .collect()
    }
}

/// Sizes of the blocks: one expert after the other goes to the rank that has the fewest, among those with room.
fn blocks(experts: u32, capacities: &[u32]) -> Vec<u32> {
    let mut sizes = vec![0u32; capacities.len()];
    for _ in 0..experts {
        let open = (0..sizes.len()).filter(|&rank| sizes[rank] < capacities[rank]);
        match open.min_by_key(|&rank| sizes[rank]) {
            Some(rank) => sizes[rank] += 1,
            None => break,
        }
    }
    sizes
}
