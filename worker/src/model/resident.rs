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
        // INT4 projections are repacked: all at once, on all threads.
        let linears: Vec<LinearModule> = layers
            .iter()
            .flat_map(|layer| [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate].map(Clone::clone))
            .collect();
        let linears = parallel::map(threads, &linears, |_, module| source.linear(module))?;
        let backend = self.backend.as_mut();
        let embedding_module = modules::embedding(&self.spec);
        let embedding = backend.upload_linear(&source.linear(&embedding_module)?)?;
        let head = match modules::head(&self.spec) {
            tied if tied == embedding_module => embedding,
            head => backend.upload_linear(&source.linear(&head)?)?,
        };
        let final_norm = upload_vector(backend, source, &modules::final_norm(&self.spec))?;
        let mut linears = linears.iter();
        let mut resident_layers = Vec::with_capacity(layers.len());
        for layer in &layers {
            let mut next = |backend: &mut dyn Backend| {
                let weight = linears
                    .next()
                    .expect("five linear weights were read for every layer");
                backend.upload_linear(weight)
            };
            let (q, k, v, o) = (next(backend)?, next(backend)?, next(backend)?, next(backend)?);
            let gate = next(backend)?;
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

fn upload_vector(
    backend: &mut dyn Backend,
    source: &WeightSource,
    module: &VectorModule,
) -> Result<VectorId> {
    Ok(backend.upload_vector(&source.vector(module)?)?)
}
