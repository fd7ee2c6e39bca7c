//! Experts of a device with memory of its own: layer by layer from the checkpoint, while the next layer is read.
//!
//! Must stay true: a layer's old block is freed before its new one is allocated, so that a change of placement needs no
//! room for both; no more than two layers are in the host's memory.

use std::sync::mpsc::sync_channel;

use conclave_kernels::backend::HostExpert;
use conclave_plan::placement::Placement;

use super::{Executor, Result};
use crate::weights::modules;
use crate::weights::{Cancelled, Part, Progress, WeightSource, parallel};

/// A layer whose experts change.
struct Change {
    layer: usize,
    wanted: Vec<u32>,
}

impl Change {
    fn parts(&self) -> Vec<Part> {
        let layer = self.layer as u32;
        let part = |&expert: &u32| Part::Expert { layer, expert };
        self.wanted.iter().map(part).collect()
    }
}

impl Executor {
    pub(super) fn load_device_experts(
        &mut self,
        source: &WeightSource,
        placement: &Placement,
        rank: u32,
        threads: usize,
        progress: &Progress,
        cancelled: Cancelled<'_>,
    ) -> Result<u64> {
        let layers = 0..self.experts.layers.len();
        let all: Vec<Change> = layers
            .map(|layer| Change {
                layer,
                wanted: placement.experts_of(layer, rank),
            })
            .collect();
        let held: Vec<Part> = all.iter().flat_map(Change::parts).collect();
        let changes: Vec<Change> = all
            .into_iter()
            .filter(|change| self.experts.layers[change.layer].held != change.wanted)
            .collect();
        for change in &changes {
            let layer = &mut self.experts.layers[change.layer];
            layer.held.clear();
            if let Some(old) = layer.device.take() {
                self.backend.drop_experts(old);
            }
        }
        self.whole = false;
        match source {
            WeightSource::Dummy(_) => self.make_device_experts(source, changes, threads)?,
            WeightSource::Checkpoint(_) => {
                self.upload_device_experts(source, changes, threads, progress, cancelled)?;
            }
        }
        self.backend.synchronize()?;
        Ok(source.stored_bytes(&held))
    }

    fn make_device_experts(
        &mut self,
        source: &WeightSource,
        changes: Vec<Change>,
        threads: usize,
    ) -> Result<()> {
        for change in changes {
            let (layer, hidden) = (change.layer, self.spec.hidden);
            let name = |&expert: &u32| modules::expert(&self.spec, layer, expert as usize).gate;
            let seeds = change.wanted.iter().map(name);
            let seeds: Vec<u64> = seeds.filter_map(|gate| source.dummy_seed(&gate.name)).collect();
            let Some(first) = change.wanted.first().map(name) else {
                continue;
            };
            let inter = self.spec.layers[layer].moe.intermediate;
            let format = source.format(&first);
            let made = self.backend.make_experts(format, hidden, inter, &seeds)?;
            let made = match made {
                Some(made) => made,
                None => {
                    let read = parallel::map(threads, &change.wanted, |_, &expert| {
                        source.expert(layer as u32, expert)
                    })?;
                    self.backend.upload_experts(&read)?
                }
            };
            let entry = &mut self.experts.layers[layer];
            (entry.device, entry.held) = (Some(made), change.wanted);
        }
        Ok(())
    }

    fn upload_device_experts(
        &mut self,
        source: &WeightSource,
        changes: Vec<Change>,
        threads: usize,
        progress: &Progress,
        cancelled: Cancelled<'_>,
    ) -> Result<()> {
        let bytes = |change: &Change| source.stored_bytes(&change.parts());
        progress.expect(changes.iter().map(bytes).sum());
        std::thread::scope(|scope| {
            // One layer waits here, one is being read, one is being uploaded.
            let (read, layers) = sync_channel::<Result<(Change, Vec<HostExpert>)>>(0);
            scope.spawn(move || {
                for change in changes {
                    let layer = read_layer(source, &change, threads, progress, cancelled);
                    let failed = layer.is_err();
                    // The other end is gone after an error of the device.
                    if read.send(layer.map(|experts| (change, experts))).is_err() || failed {
                        return;
                    }
                }
            });
            for layer in layers {
                let (change, experts) = layer?;
                if experts.is_empty() {
                    continue;
                }
                let uploaded = self.backend.upload_experts(&experts)?;
                let entry = &mut self.experts.layers[change.layer];
                (entry.device, entry.held) = (Some(uploaded), change.wanted);
            }
            Ok(())
        })
    }
}

fn read_layer(
    source: &WeightSource,
    change: &Change,
    threads: usize,
    progress: &Progress,
    cancelled: Cancelled<'_>,
) -> Result<Vec<HostExpert>> {
    source.read_in_expected(&change.parts(), threads, progress, cancelled)?;
    let layer = change.layer as u32;
    Ok(parallel::map(threads, &change.wanted, |_, &expert| {
        source.expert(layer, expert)
    })?)
}
