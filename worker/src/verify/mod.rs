//! Compares what the executor computes with a reference file, over any number of ranks: `conclave verify`.
//!
//! Uses the code that serves (slots, executor, transport) and nothing else, but keeps the KV cache in F32 unless asked
//! otherwise, since a reference is computed in F32. On a GPU, which rounds, the verdict is that of `agree`.

mod agree;
mod choices;
mod compare;
mod group;
mod member;
mod messages;
mod reference;
mod run;

use std::path::PathBuf;
use std::sync::Arc;

use conclave_kernels::backend::KvDtype;
use conclave_plan::model::ModelSpec;
use serde_json::Value;

use crate::checkpoint::CheckpointError;
use crate::device::DeviceKind;
use crate::error::WorkerError;
use crate::model::Modes;
use crate::transport::{TransportKind, nccl};
use crate::weights::WeightSource;
pub use agree::{Agreement, Distance, Turned};
pub use choices::{Choices, Gate};
pub use compare::{Comparison, Miss};
pub use group::{GroupConfig, GroupError, LocalGroup};
pub use member::{Looks, MAX_QUEUED, RankOutput};
pub use messages::{greedy, run, start};
pub use reference::Reference;
pub use run::{Run, Way, run_reference};

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
    /// Of the ranks, in order; from the first again where there are fewer.
    pub devices: Vec<DeviceKind>,
    pub modes: Modes,
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

/// One way of computing it, and how it compares.
#[derive(Clone, Debug, PartialEq)]
pub struct Verified {
    /// `op by op`, `whole steps`, `as served`, `whole steps over ipc`.
    pub way: &'static str,
    /// With the reference: the verdict on the CPU.
    pub comparison: Comparison,
    /// With the CPU that takes the same experts: the verdict on a GPU.
    pub agreement: Option<Agreement>,
}

impl Verified {
    pub fn passes(&self) -> bool {
        match &self.agreement {
            Some(agreement) => agreement.passes(),
            None => self.comparison.passes(),
        }
    }
}

/// Loads the model on `workers` ranks and compares it with the reference: op by op, and, where devices run whole steps
/// by themselves, again so; with several GPUs over each way that they have of exchanging experts.
pub fn verify(config: &VerifyConfig) -> Result<Vec<Verified>, VerifyError> {
    let source = Arc::new(WeightSource::open(
        &config.model_dir,
        config.hf_overrides.as_ref(),
    )?);
    let reference = Reference::read(&config.reference, source.spec().vocab)?;
    check(config, source.spec(), &reference)?;
    let tokens = reference.input_ids.len() + reference.greedy_ids.len();
    let mut group = GroupConfig::new(config.workers);
    group.threads = config.threads;
    group.kv_dtype = config.kv_dtype;
    group.kv_pages = tokens.div_ceil(group.page_tokens);
    group.max_slots = 1;
    let chunk = config
        .prefill_chunk
        .unwrap_or(group.max_tokens)
        .clamp(1, group.max_tokens);
    (group.devices, group.modes) = (config.devices.clone(), config.modes);
    let on_cpus = config.devices.iter().all(|device| *device == DeviceKind::Cpu);
    if !on_cpus {
        group.max_logit_rows = chunk;
    }
    let on = |group: &GroupConfig, way: &Way| {
        let mut ranks = LocalGroup::start(&source, group)?;
        run_reference(&mut ranks, group, &reference, chunk, way)
    };
    if on_cpus {
        return Ok(vec![Verified {
            way: "op by op",
            comparison: Comparison::of(&on(&group, &Way::OpByOp)?, &reference)?,
            agreement: None,
        }]);
    }
    let runs = on_devices(config, &group, on)?;
    let gates = Gate::all(&source)?;
    let cpu = GroupConfig {
        devices: vec![DeviceKind::Cpu],
        ranks: 1,
        ..group
    };
    let rounding = GroupConfig {
        rounds: true,
        ..cpu.clone()
    };
    let verified = runs.into_iter().map(|(way, run)| {
        let choices = Arc::new(Choices::of(&gates, &run.router_logits));
        let forced = Way::Forced(Arc::clone(&choices));
        let (beside, rounded) = (on(&cpu, &forced)?, on(&rounding, &forced)?);
        Ok(Verified {
            way,
            comparison: Comparison::of(&run, &reference)?,
            agreement: Some(Agreement::of(&run, &beside, &rounded, &choices)),
        })
    });
    verified.collect()
}

/// Whether the reference can be computed by so many workers.
fn check(config: &VerifyConfig, spec: &ModelSpec, reference: &Reference) -> Result<(), VerifyError> {
    let experts = spec.layers.iter().map(|layer| layer.moe.experts).min();
    let experts = experts.unwrap_or(0);
    if config.workers == 0 || config.workers as usize > experts {
        return Err(VerifyError::Workers {
            workers: config.workers,
            experts,
        });
    }
    let tokens = reference.input_ids.len() + reference.greedy_ids.len();
    if reference.input_ids.is_empty() || tokens > spec.max_position {
        let problem = format!("{tokens} tokens, the model takes 1 to {}", spec.max_position);
        return Err(VerifyError::Reference(problem));
    }
    Ok(())
}

/// Every way that these devices have of computing it.
fn on_devices(
    config: &VerifyConfig,
    group: &GroupConfig,
    on: impl Fn(&GroupConfig, &Way) -> Result<Run, VerifyError>,
) -> Result<Vec<(&'static str, Run)>, VerifyError> {
    let mut runs = vec![("op by op", on(group, &Way::OpByOp)?)];
    if config.workers == 1 {
        let watched = on(group, &Way::Watched)?;
        let mut served = on(group, &Way::AsServed)?;
        // One token as one kernel does not tell what it chose: it is held to what six kernels a layer chose.
        served.router_logits.clone_from(&watched.router_logits);
        runs.push(("whole steps", watched));
        runs.push(("as served", served));
    } else if config.devices.len() >= config.workers as usize {
        // A GPU of its own for every rank, as NCCL asks for.
        for (way, transport) in [
            ("whole steps over ipc", TransportKind::Ipc),
            ("whole steps over nccl", TransportKind::Nccl),
        ] {
            if transport == TransportKind::Nccl && nccl::draw_id().is_err() {
                continue;
            }
            let between = GroupConfig {
                transport,
                ..group.clone()
            };
            runs.push((way, on(&between, &Way::Watched)?));
        }
    }
    Ok(runs)
}
