//! The experts that this rank holds. A new placement loads what is missing and drops what is not wanted.
//!
//! Must stay true: an expert's local index is its rank among the experts of the layer that this rank holds, in
//! ascending order: the one that `transport::routing` uses.

use std::collections::BTreeMap;

use conclave_kernels::backend::{ExpertsId, HostExpert};
use conclave_plan::placement::Placement;

use super::{Executor, Result};
use crate::weights::{Cancelled, Form, Part, Progress, WeightSource, parallel};

/// Host side and device side of the experts, by layer.
pub(super) struct ExpertStore {
    pub(super) layers: Vec<LayerExperts>,
}

#[derive(Default)]
pub(super) struct LayerExperts {
    /// By expert; what is kept over a change of placement is not read and repacked again. Empty for a device with
    /// memory of its own: a host need not hold the model twice.
    host: BTreeMap<u32, HostExpert>,
    /// The experts on such a device.
    pub(super) held: Vec<u32>,
    pub(super) device: Option<ExpertsId>,
}

impl std::fmt::Debug for ExpertStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let held: Vec<usize> = self.layers.iter().map(|layer| layer.host.len()).collect();
        f.debug_struct("ExpertStore").field("held", &held).finish()
    }
}

impl ExpertStore {
    pub(super) fn new(layers: usize) -> ExpertStore {
        ExpertStore {
            layers: std::iter::repeat_with(LayerExperts::default)
                .take(layers)
                .collect(),
        }
    }

    pub(super) fn device(&self, layer: usize) -> Option<ExpertsId> {
        self.layers[layer].device
    }

    /// Experts of `placement` for `rank` that are not here.
    fn missing(&self, placement: &Placement, rank: u32) -> Vec<(u32, u32)> {
        let missing = self.layers.iter().enumerate().flat_map(|(index, layer)| {
            let wanted = placement.experts_of(index, rank).into_iter();
            wanted
                .filter(|expert| !layer.host.contains_key(expert))
                .map(move |expert| (index as u32, expert))
        });
        missing.collect()
    }
}

impl Executor {
    /// Holds exactly the experts that `placement` gives to `rank`. Returns their bytes as stored. On an error the
    /// experts that were there still are, and steps of the old placement run as before.
    pub fn load_experts(
        &mut self,
        source: &WeightSource,
        placement: &Placement,
        rank: u32,
        threads: usize,
        progress: &Progress,
        cancelled: Cancelled<'_>,
    ) -> Result<u64> {
        if self.backend.device_memory()?.is_some() {
            return self.load_device_experts(source, placement, rank, threads, progress, cancelled);
        }
        let missing = self.experts.missing(placement, rank);
        let parts: Vec<Part> = missing
            .iter()
            .map(|&(layer, expert)| Part::Expert { layer, expert })
            .collect();
        source.read_in(&parts, threads, progress, cancelled)?;
        let loaded = parallel::map(threads, &missing, |_, &(layer, expert)| {
            source.expert(layer, expert, Form::Rows)
        })?;
        let mut changed = vec![false; self.experts.layers.len()];
        for ((layer, expert), host) in missing.into_iter().zip(loaded) {
            self.experts.layers[layer as usize].host.insert(expert, host);
            changed[layer as usize] = true;
        }
        let mut held = Vec::new();
        for (index, layer) in self.experts.layers.iter_mut().enumerate() {
            let wanted = placement.experts_of(index, rank);
            let before = layer.host.len();
            layer
                .host
                .retain(|expert, _| wanted.binary_search(expert).is_ok());
            held.extend(wanted.into_iter().map(|expert| Part::Expert {
                layer: index as u32,
                expert,
            }));
            if !changed[index] && layer.host.len() == before && layer.device.is_some() {
                continue;
            }
            if let Some(old) = layer.device.take() {
                self.backend.drop_experts(old);
            }
            let hosts: Vec<HostExpert> = layer.host.values().map(clone).collect();
            layer.device = Some(self.backend.upload_experts(&hosts)?);
        }
        Ok(source.stored_bytes(&held))
    }
}

fn clone(expert: &HostExpert) -> HostExpert {
    HostExpert {
        gate: expert.gate.clone(),
        up: expert.up.clone(),
        down: expert.down.clone(),
    }
}
