//! Which ranks hold which expert.
//!
//! A placement may be uneven and may hold replicas. What must stay true: every expert of every layer has at
//! least one owner, owners are below `ranks`, and no owner is named twice.

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
