//! Everything of the model but its experts, on the device.

use conclave_kernels::backend::{AttentionWeights, Backend, LinearId, VectorId};

use super::{Executor, Result};
use crate::weights::modules::{self, LinearModule, VectorModule};
use crate::weights::{Part, Progress, WeightSource, parallel};

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
        source.read_in(&[Part::Replicated], threads, progress, &|| false)?;
        let layers = (0..self.spec.layers.len())
            .map(|layer| modules::layer(&self.spec, layer))
            .collect::<Vec<_>>();
        let backend = self.backend.as_mut();
        let embedding_module = modules::embedding(&self.spec);
        let embedding = linear(backend, source, &embedding_module)?;
        let head = match modules::head(&self.spec) {
            tied if tied == embedding_module => embedding,
            head => linear(backend, source, &head)?,
        };
        let final_norm = upload_vector(backend, source, &modules::final_norm(&self.spec))?;
        let modules: Vec<LinearModule> = layers
            .iter()
            .flat_map(|layer| [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate].map(Clone::clone))
            .collect();
        let linears = linears(backend, source, &modules, threads)?;
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
            embedding,
            head,
            final_norm,
            layers: resident_layers,
        });
        Ok(())
    }
}

/// One weight: made on the device, or read and uploaded.
fn linear(backend: &mut dyn Backend, source: &WeightSource, module: &LinearModule) -> Result<LinearId> {
    match make_linear(backend, source, module)? {
        Some(made) => Ok(made),
        None => Ok(backend.upload_linear(&source.linear(module)?)?),
    }
}

/// The same for many: INT4 projections are repacked, all at once, on all threads.
fn linears(
    backend: &mut dyn Backend,
    source: &WeightSource,
    modules: &[LinearModule],
    threads: usize,
) -> Result<Vec<LinearId>> {
    let mut made = Vec::with_capacity(modules.len());
    for module in modules {
        match make_linear(backend, source, module)? {
            Some(id) => made.push(id),
            None => break,
        }
    }
    let read = parallel::map(threads, &modules[made.len()..], |_, module| source.linear(module))?;
    made.extend(backend.upload_linears(&read)?);
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
