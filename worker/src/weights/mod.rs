//! Weights of a model as the host has them, before a backend takes them over.
//!
//! A [`WeightSource`] is a checkpoint or a seed; both give the same modules in the same forms. May touch: the files
//! of the checkpoint, read-only. Must stay true: only what is asked for is read; what comes out has the shape the
//! model says and holds no NaN.

mod awq;
mod dense;
mod dummy;
mod fp8;
mod gptq;
mod grouped;
pub mod modules;
mod pack_quantized;
pub(crate) mod parallel;
mod read_in;
mod reader;
mod transpose;

use std::path::Path;

use conclave_kernels::backend::HostExpert;
use conclave_kernels::dummy::DummyFormat;
use conclave_kernels::weight::HostLinear;
use conclave_plan::config::Config;
use conclave_plan::model::ModelSpec;
use serde_json::Value;

use crate::checkpoint::{Checkpoint, Result, Tensor};
pub use dummy::DummyWeights;
use modules::{LayerModules, LinearModule, VectorModule};
pub use read_in::{Cancelled, Progress};
pub use reader::Form;

/// Where weights come from.
#[derive(Debug)]
pub enum WeightSource {
    Checkpoint(Checkpoint),
    Dummy(DummyWeights),
}

/// What a rank wants in memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// Embedding, head, final norm and everything of every layer but its experts.
    Replicated,
    Expert {
        layer: u32,
        expert: u32,
    },
}

impl WeightSource {
    /// `--load-format auto` or `safetensors`.
    pub fn open(directory: &Path, overrides: Option<&Value>) -> Result<WeightSource> {
        Ok(WeightSource::Checkpoint(Checkpoint::open(directory, overrides)?))
    }

    /// `--load-format dummy`: only the config of `directory` is read.
    pub fn dummy(
        directory: &Path,
        overrides: Option<&Value>,
        seed: u64,
        threads: usize,
    ) -> Result<WeightSource> {
        Ok(WeightSource::Dummy(DummyWeights::open(
            directory, overrides, seed, threads,
        )?))
    }

    pub fn config(&self) -> &Config {
        match self {
            WeightSource::Checkpoint(checkpoint) => &checkpoint.config,
            WeightSource::Dummy(dummy) => &dummy.config,
        }
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.config().spec
    }

    /// All ranks of a cluster must have the same.
    pub fn id(&self) -> &str {
        match self {
            WeightSource::Checkpoint(checkpoint) => checkpoint.id(),
            WeightSource::Dummy(dummy) => dummy.id(),
        }
    }

    pub fn linear(&self, module: &LinearModule, form: Form) -> Result<HostLinear> {
        match self {
            WeightSource::Checkpoint(checkpoint) => reader::linear(checkpoint, module, form),
            WeightSource::Dummy(dummy) => dummy.linear(module),
        }
    }

    pub fn vector(&self, module: &VectorModule) -> Result<Vec<f32>> {
        match self {
            WeightSource::Checkpoint(checkpoint) => reader::vector(checkpoint, module),
            WeightSource::Dummy(dummy) => Ok(dummy.vector(module)),
        }
    }

    pub fn expert(&self, layer: u32, expert: u32, form: Form) -> Result<HostExpert> {
        let modules = modules::expert(self.spec(), layer as usize, expert as usize);
        Ok(HostExpert {
            gate: self.linear(&modules.gate, form)?,
            up: self.linear(&modules.up, form)?,
            down: self.linear(&modules.down, form)?,
        })
    }

    /// How a linear module is stored; what is not there counts as BF16 and is found when it is read.
    pub fn format(&self, module: &LinearModule) -> DummyFormat {
        match self {
            WeightSource::Checkpoint(checkpoint) => reader::format(checkpoint, module),
            WeightSource::Dummy(dummy) => dummy.format(module),
        }
    }

    /// The seed of a dummy module; `None`: it is in a checkpoint.
    pub fn dummy_seed(&self, name: &str) -> Option<u64> {
        match self {
            WeightSource::Checkpoint(_) => None,
            WeightSource::Dummy(dummy) => Some(dummy.seed_of(name)),
        }
    }

    /// Brings the bytes of `parts` into memory and looks at each once, so that what follows does not wait for the
    /// disk and an unreadable or spoilt tensor is known before anything of it is on the device.
    pub fn read_in(
        &self,
        parts: &[Part],
        threads: usize,
        progress: &Progress,
        cancelled: Cancelled<'_>,
    ) -> Result<()> {
        if let WeightSource::Checkpoint(checkpoint) = self {
            let tensors = parts.iter().flat_map(|part| tensors_of(checkpoint, part));
            progress.expect(tensors.map(|(_, tensor)| tensor.len as u64).sum());
        }
        self.read_in_expected(parts, threads, progress, cancelled)
    }

    /// The same, where `progress` expects the bytes already.
    pub fn read_in_expected(
        &self,
        parts: &[Part],
        threads: usize,
        progress: &Progress,
        cancelled: Cancelled<'_>,
    ) -> Result<()> {
        match self {
            WeightSource::Checkpoint(checkpoint) => {
                let tensors = parts
                    .iter()
                    .flat_map(|part| tensors_of(checkpoint, part))
                    .collect::<Vec<_>>();
                read_in::read_in(&tensors, threads, progress, cancelled)
            }
            // There is nothing to read: values are made when they are asked for.
            WeightSource::Dummy(_) => Ok(()),
        }
    }

    /// Bytes of files that `parts` are read from.
    pub fn read_bytes(&self, parts: &[Part]) -> u64 {
        match self {
            WeightSource::Checkpoint(_) => self.stored_bytes(parts),
            WeightSource::Dummy(_) => 0,
        }
    }

    /// The whole model.
    pub fn stored_by_kind(&self) -> StoredBytes {
        let spec = self.spec();
        let bytes = |linears: &[LinearModule], vectors: &[VectorModule]| -> u64 {
            let linears = linears.iter().map(|module| self.linear_bytes(module));
            linears
                .chain(vectors.iter().map(|module| self.vector_bytes(module)))
                .sum()
        };
        let mut ends = vec![modules::embedding(spec)];
        ends.extend(Some(modules::head(spec)).filter(|head| *head != ends[0]));
        let mut stored = StoredBytes {
            embedding_and_head: bytes(&ends, &[]),
            norms_and_gates: bytes(&[], &[modules::final_norm(spec)]),
            ..StoredBytes::default()
        };
        for (layer, shape) in (0u32..).zip(&spec.layers) {
            let modules = modules::layer(spec, layer as usize);
            stored.attention += bytes(&[modules.q, modules.k, modules.v, modules.o], &[]);
            let vectors = [modules.q_norm, modules.k_norm, modules.selection_bias]
                .into_iter()
                .flatten();
            let vectors: Vec<_> = vectors
                .chain([modules.attention_norm, modules.moe_norm])
                .collect();
            stored.norms_and_gates += bytes(&[modules.gate], &vectors);
            let experts = (0..shape.moe.experts as u32).map(|expert| Part::Expert { layer, expert });
            stored.experts += self.stored_bytes(&experts.collect::<Vec<_>>());
        }
        stored
    }

    fn linear_bytes(&self, module: &LinearModule) -> u64 {
        match self {
            WeightSource::Checkpoint(checkpoint) => reader::tensors(checkpoint, &module.name)
                .map(|(_, tensor)| tensor.len as u64)
                .sum(),
            WeightSource::Dummy(dummy) => dummy.linear_bytes(module),
        }
    }

    fn vector_bytes(&self, module: &VectorModule) -> u64 {
        match self {
            WeightSource::Checkpoint(checkpoint) => checkpoint
                .tensor(&module.name)
                .map_or(0, |tensor| tensor.len as u64),
            WeightSource::Dummy(_) => 4 * module.len as u64,
        }
    }

    /// Bytes of `parts` as stored.
    pub fn stored_bytes(&self, parts: &[Part]) -> u64 {
        let bytes = |part| {
            let (linears, vectors) = modules_of(self.spec(), part);
            let linears: u64 = linears.iter().map(|module| self.linear_bytes(module)).sum();
            linears
                + vectors
                    .iter()
                    .map(|module| self.vector_bytes(module))
                    .sum::<u64>()
        };
        parts.iter().map(bytes).sum()
    }
}

/// Bytes as stored, by what they belong to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoredBytes {
    pub embedding_and_head: u64,
    pub attention: u64,
    pub norms_and_gates: u64,
    /// Of the whole model.
    pub experts: u64,
}

/// The tensors of `part` that are there; what is missing is found when the module is read.
fn tensors_of<'a>(checkpoint: &'a Checkpoint, part: &Part) -> Vec<(String, &'a Tensor)> {
    let (linears, vectors) = modules_of(&checkpoint.config.spec, part);
    let linears = linears
        .iter()
        .flat_map(|module| reader::tensors(checkpoint, &module.name));
    let vectors = vectors.iter().filter_map(|module| {
        let tensor = checkpoint.tensor(&module.name)?;
        Some((module.name.clone(), tensor))
    });
    linears.chain(vectors).collect()
}

fn modules_of(spec: &ModelSpec, part: &Part) -> (Vec<LinearModule>, Vec<VectorModule>) {
    match *part {
        Part::Expert { layer, expert } => {
            let expert = modules::expert(spec, layer as usize, expert as usize);
            (vec![expert.gate, expert.up, expert.down], Vec::new())
        }
        Part::Replicated => {
            let mut linears = vec![modules::embedding(spec)];
            if modules::head(spec) != linears[0] {
                linears.push(modules::head(spec));
            }
            let mut vectors = vec![modules::final_norm(spec)];
            for layer in 0..spec.layers.len() {
                let LayerModules {
                    attention_norm,
                    moe_norm,
                    q,
                    k,
                    v,
                    o,
                    q_norm,
                    k_norm,
                    gate,
                    selection_bias,
                } = modules::layer(spec, layer);
                linears.extend([q, k, v, o, gate]);
                vectors.extend([attention_norm, moe_norm]);
                vectors.extend([q_norm, k_norm, selection_bias].into_iter().flatten());
            }
            (linears, vectors)
        }
    }
}
