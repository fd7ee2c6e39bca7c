//! Everything of the model but its experts, on the device.

use conclave_kernels::backend::{AttentionWeights, Backend, LinearId, Reading, VectorId};

use super::{Executor, Result, spoilt};
use crate::weights::modules::{self, LinearModule, VectorModule};
use crate::weights::{Form, Part, Progress, WeightSource, parallel};

#[derive(Debug)]
pub(super) struct Resident {
    pub(super) embedding: LinearId,
    pub(super) head: LinearId,
    pub(super) final_norm: VectorId,
    pub(super) layers: Vec<ResidentLayer>,
}

pub(super) struct ResidentLayer {
    pub(super) attention: AttentionWeights,
    pub(super) moe_norm: VectorId,
    pub(super) gate: LinearId,
    pub(super) selection_bias: Option<VectorId>,
}

impl std::fmt::Debug for ResidentLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResidentLayer").finish_non_exhaustive()
    }
}

impl Executor {
    /// Loads what every rank holds. Does nothing if it is there already.
    pub fn load_replicated(
        &mut self,
        source: &WeightSource,
        threads: usize,
        progress: &Progress,
    ) -> Result<()> {
        if self.resident.is_some() {
            return Ok(());
        }
        let parts = [Part::Replicated];
        if !self.backend.takes_packed() {
            source.read_in(&parts, threads, progress, &|| false)?;
            return self.upload_replicated(source, threads, &|_| true);
        }
        progress.expect(source.read_bytes(&parts));
        let reading = |bytes: usize| {
            progress.add(bytes as u64);
            true
        };
        self.upload_replicated(source, threads, &reading)
            .map_err(|error| spoilt(error, source, &parts, threads))
    }

    fn upload_replicated(
        &mut self,
        source: &WeightSource,
        threads: usize,
        reading: Reading<'_>,
    ) -> Result<()> {
        let layers = (0..self.spec.layers.len())
            .map(|layer| modules::layer(&self.spec, layer))
            .collect::<Vec<_>>();
        let backend = self.backend.as_mut();
        let mut modules = vec![modules::embedding(&self.spec), modules::head(&self.spec)];
        modules.dedup();
        let ends = modules.len();
        modules.extend(
            layers
                .iter()
                .flat_map(|layer| [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate].map(Clone::clone)),
        );
        let linears = linears(backend, source, &modules, threads, reading)?;
        let (ends, linears) = linears.split_at(ends);
        let final_norm = upload_vector(backend, source, &modules::final_norm(&self.spec))?;
        let mut resident_layers = Vec::with_capacity(layers.len());
        for (layer, linears) in layers.iter().zip(linears.as_chunks::<5>().0) {
            let [q, k, v, o, gate] = *linears;
            let mut vector = |module: &VectorModule| upload_vector(backend, source, module);
            resident_layers.push(ResidentLayer {
                attention: AttentionWeights {
                    norm: vector(&layer.attention_norm)?,
                    q,
                    k,
                    v,
                    o,
                    q_norm: layer.q_norm.as_ref().map(&mut vector).transpose()?,
                    k_norm: layer.k_norm.as_ref().map(&mut vector).transpose()?,
                },
                moe_norm: vector(&layer.moe_norm)?,
                gate,
                selection_bias: layer.selection_bias.as_ref().map(&mut vector).transpose()?,
            });
        }
        self.resident = Some(Resident {
            embedding: ends[0],
            // A tied one is the embedding.
            head: ends[ends.len() - 1],
            final_norm,
            layers: resident_layers,
        });
        Ok(())
    }
}

/// What the backend takes.
fn form(backend: &dyn Backend) -> Form {
    match backend.takes_packed() {
        true => Form::Packed,
        false => Form::Rows,
    }
}

/// Weights that are made on the device, or read and uploaded, all at once: INT4 projections are repacked on all threads.
fn linears(
    backend: &mut dyn Backend,
    source: &WeightSource,
    modules: &[LinearModule],
    threads: usize,
    reading: Reading<'_>,
) -> Result<Vec<LinearId>> {
    let mut made = Vec::with_capacity(modules.len());
    for module in modules {
        match make_linear(backend, source, module)? {
            Some(id) => made.push(id),
            None => break,
        }
    }
    let form = form(backend);
    let read = parallel::map(threads, &modules[made.len()..], |_, module| {
        source.linear(module, form)
    })?;
    made.extend(backend.upload_linears(&read, reading)?);
    Ok(made)
}

/// `None`: the weight comes from a checkpoint, or this backend makes none.
fn make_linear(
    backend: &mut dyn Backend,
    source: &WeightSource,
    module: &LinearModule,
) -> Result<Option<LinearId>> {
    let Some(seed) = source.dummy_seed(&module.name) else {
        return Ok(None);
    };
    let (outputs, inputs) = (module.out_features, module.in_features);
    Ok(backend.make_linear(source.format(module), outputs, inputs, seed)?)
}

fn upload_vector(
    backend: &mut dyn Backend,
    source: &WeightSource,
    module: &VectorModule,
) -> Result<VectorId> {
    Ok(backend.upload_vector(&source.vector(module)?)?)
}
