//! Experts of a device with memory of its own: some layers at a time from the checkpoint.
//!
//! Must stay true: a layer's old block is freed before its new one is allocated, so that a change of placement needs no
//! room for both; the host holds no weights but what is on its way.

use std::iter::Peekable;
use std::sync::mpsc::sync_channel;
use std::vec::IntoIter;

use conclave_kernels::backend::HostExpert;
use conclave_plan::placement::Placement;

use super::{Executor, Result, spoilt};
use crate::weights::modules;
use crate::weights::{Cancelled, Form, Part, Progress, WeightSource, parallel};

/// Bytes of layers that are uploaded together: between two uploads the bus waits for milliseconds.
const GROUP_BYTES: u64 = 8 << 30;
/// Threads that find out where a group's bytes are.
const MOST_THREADS: usize = 4;

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
                        source.expert(layer as u32, expert, Form::Rows)
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
        let bytes = |change: &Change| source.read_bytes(&change.parts());
        progress.expect(changes.iter().map(bytes).sum());
        let reading = |bytes: usize| {
            progress.add(bytes as u64);
            !cancelled()
        };
        std::thread::scope(|scope| {
            // One group waits here, one is being prepared, one is being uploaded.
            let (give, groups) = sync_channel::<crate::checkpoint::Result<Group>>(0);
            scope.spawn(move || {
                let mut changes = changes.into_iter().peekable();
                while changes.peek().is_some() {
                    let group = Group::prepare(source, &mut changes, threads);
                    let failed = group.is_err();
                    // The other end is gone after an error of the device.
                    if give.send(group).is_err() || failed {
                        return;
                    }
                }
            });
            for group in groups {
                let Group { changes, experts } = group?;
                let uploaded = self.backend.upload_layers(&experts, &reading);
                let uploaded = uploaded.map_err(|error| {
                    let parts: Vec<Part> = changes.iter().flat_map(Change::parts).collect();
                    spoilt(error.into(), source, &parts, threads)
                })?;
                for (change, uploaded) in changes.into_iter().zip(uploaded) {
                    let entry = &mut self.experts.layers[change.layer];
                    (entry.device, entry.held) = (Some(uploaded), change.wanted);
                }
            }
            Ok(())
        })
    }
}

/// Layers that are uploaded together.
struct Group {
    changes: Vec<Change>,
    experts: Vec<Vec<HostExpert>>,
}

impl Group {
    /// Takes layers from `changes` until they are [`GROUP_BYTES`]; layers without experts are left out.
    fn prepare(
        source: &WeightSource,
        changes: &mut Peekable<IntoIter<Change>>,
        threads: usize,
    ) -> crate::checkpoint::Result<Group> {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while bytes < GROUP_BYTES
            && let Some(change) = changes.next()
        {
            bytes += source.read_bytes(&change.parts());
            if !change.wanted.is_empty() {
                taken.push(change);
            }
        }
        let wanted: Vec<(u32, u32)> = taken
            .iter()
            .flat_map(|change| change.wanted.iter().map(|expert| (change.layer as u32, *expert)))
            .collect();
        let mut all = parallel::map(threads.min(MOST_THREADS), &wanted, |_, &(layer, expert)| {
            source.expert(layer, expert, Form::Packed)
        })?
        .into_iter();
        let experts = taken
            .iter()
            .map(|change| all.by_ref().take(change.wanted.len()).collect());
        Ok(Group {
            experts: experts.collect(),
            changes: taken,
        })
    }
}
