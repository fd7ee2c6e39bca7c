//! Compares what the executor computes with a reference file, over any number of ranks: `conclave verify`.
//!
//! Uses the code that serves (slots, executor, transport) and nothing else, but keeps the KV cache in F32 unless asked
//! otherwise, since a reference is computed in F32.

mod compare;
mod group;
mod member;
mod messages;
mod reference;

use std::path::PathBuf;
use std::sync::Arc;

use conclave_kernels::backend::KvDtype;
use serde_json::Value;

use crate::checkpoint::CheckpointError;
use crate::device::DeviceKind;
use crate::error::WorkerError;
use crate::weights::WeightSource;
pub use compare::{Comparison, Miss, compare};
pub use group::{GroupConfig, GroupError, LocalGroup};
pub use member::{Looks, MAX_QUEUED, RankOutput};
pub use messages::{greedy, run, start};
pub use reference::Reference;

/// What to verify.
#[derive(Clone, Debug)]
pub struct VerifyConfig {
    pub model_dir: PathBuf,
    pub hf_overrides: Option<Value>,
    pub reference: PathBuf,
    pub workers: u32,
    /// Per worker.
    pub threads: usize,
    pub kv_dtype: KvDtype,
    /// Tokens of the prompt that run in one step; `None`: all that fit into one.
    pub prefill_chunk: Option<usize>,
    pub device: DeviceKind,
    pub deterministic: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error("workers: {workers} is not within 1 to {experts}, the number of experts")]
    Workers { workers: u32, experts: usize },
    #[error(transparent)]
    Worker(#[from] WorkerError),
    #[error("reference: {0}")]
    Reference(String),
}

/// Loads the model on `workers` ranks and compares it with the reference: op by op, and, where a device runs whole
/// steps by itself, a second time so.
pub fn verify(config: &VerifyConfig) -> Result<Vec<(&'static str, Comparison)>, VerifyError> {
    let source = Arc::new(WeightSource::open(
        &config.model_dir,
        config.hf_overrides.as_ref(),
    )?);
    let spec = source.spec();
    let experts = spec
        .layers
        .iter()
        .map(|layer| layer.moe.experts)
        .min()
        .unwrap_or(0);
    if config.workers == 0 || config.workers as usize > experts {
        return Err(VerifyError::Workers {
            workers: config.workers,
            experts,
        });
    }
    let reference = Reference::read(&config.reference, spec.vocab)?;
    let tokens = reference.input_ids.len() + reference.greedy_ids.len();
    if reference.input_ids.is_empty() || tokens > spec.max_position {
        let problem = format!("{tokens} tokens, the model takes 1 to {}", spec.max_position);
        return Err(VerifyError::Reference(problem));
    }
    let mut group = GroupConfig::new(config.workers);
    group.threads = config.threads;
    group.kv_dtype = config.kv_dtype;
    group.kv_pages = tokens.div_ceil(group.page_tokens);
    group.max_slots = 1;
    let chunk = config
        .prefill_chunk
        .unwrap_or(group.max_tokens)
        .clamp(1, group.max_tokens);
    (group.device, group.deterministic) = (config.device, config.deterministic);
    if config.device != DeviceKind::Cpu {
        group.max_logit_rows = chunk;
    }
    let on = |group: &GroupConfig, looks| {
        let mut ranks = LocalGroup::start(&source, group)?;
        compare(&mut ranks, group, &reference, chunk, looks)
    };
    let mut found = vec![("op by op", on(&group, Looks::Inside)?)];
    if config.device == DeviceKind::Cpu {
        return Ok(found);
    }
    if config.workers == 1 {
        found.push(("whole steps", on(&group, Looks::Logits)?));
    }
    // What rounded keys and values do by themselves.
    group.device = DeviceKind::Cpu;
    let mut rounded = on(&group, Looks::Logits)?;
    for (_, comparison) in &mut found {
        let allowed = compare::OF_ROUNDED_KV * rounded.logits_relative_error;
        comparison.tolerance = comparison.tolerance.max(allowed);
    }
    rounded.tolerance = f64::INFINITY;
    rounded.misses.clear();
    found.push((ON_THE_CPU, rounded));
    Ok(found)
}

/// The name of the comparison that shows what rounded keys and values do.
pub const ON_THE_CPU: &str = "on the CPU with such keys and values";
