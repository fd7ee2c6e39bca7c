//! The model on a device: weights uploaded, buffers allocated once, and the walk through the layers.
//!
//! Knows shapes and ops; knows nothing of slots, epochs or messages. Must stay true: after [`Executor::new`] and
//! `load_replicated` no step allocates on the device; an error leaves the weights and the KV cache as they were.

pub mod buffers;
mod device_experts;
mod experts;
mod logits;
mod resident;
mod step;

use std::time::Instant;

use conclave_kernels::backend::{
    Backend, DeviceMemory, ForwardLayer, ForwardModel, KernelError, KvDtype, KvId, Limits,
};
use conclave_plan::model::ModelSpec;

use crate::checkpoint::CheckpointError;
use crate::transport::{Capacity, TransportError};
use crate::weights::{Part, Progress, WeightSource};
use buffers::Buffers;
use experts::ExpertStore;
use resident::Resident;
pub use step::{Launched, NoTap, RowSampling, StepInput, StepOutput, Tap};

/// Why a model could not be built or a step not run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("the model's weights are not loaded yet")]
    NotLoaded,
}

pub type Result<T> = std::result::Result<T, ModelError>;

/// Where the device saw a value that is not finite: the host looks at the bytes again, and says which tensor's it is.
fn spoilt(error: ModelError, source: &WeightSource, parts: &[Part], threads: usize) -> ModelError {
    match error {
        ModelError::Kernel(KernelError::NotFinite) => source
            .read_in_expected(parts, threads, &Progress::default(), &|| false)
            .map_or_else(ModelError::from, |()| error),
        error => error,
    }
}

/// The KV cache of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    pub pages: usize,
    pub page_tokens: usize,
    pub dtype: KvDtype,
}

/// Executes steps on one device.
#[derive(Debug)]
pub struct Executor {
    backend: Box<dyn Backend>,
    spec: ModelSpec,
    limits: Limits,
    buffers: Buffers,
    kv: Vec<KvId>,
    resident: Option<Resident>,
    experts: ExpertStore,
    /// The backend has the whole model and runs steps by itself.
    whole: bool,
    /// Its steps take part in an exchange of the device's own, also without tokens.
    exchanges: bool,
    deterministic: bool,
    /// The next logits are to hold a NaN: for tests.
    poisoned: bool,
    recorded: Option<Recorded>,
}

/// What was made ready for decode steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recorded {
    pub steps: usize,
    /// Of the device's memory.
    pub bytes: u64,
    pub seconds: f64,
}

/// How the device computes where there is a choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Modes {
    /// One order of summation whatever the batch.
    pub deterministic: bool,
    /// Activations in front of FP8 weights are quantised, too.
    pub fp8_activations: bool,
}

impl Executor {
    /// Allocates the workspace. `backend` was made with the same `limits`; `allocate_kv` comes next.
    pub fn new(
        mut backend: Box<dyn Backend>,
        spec: ModelSpec,
        limits: Limits,
        modes: Modes,
    ) -> Result<Executor> {
        let Modes {
            deterministic,
            fp8_activations,
        } = modes;
        if deterministic && !backend.set_deterministic(true)? {
            let problem = "this device has no deterministic mode";
            return Err(KernelError::Unsupported(problem.into()).into());
        }
        if fp8_activations && !backend.set_fp8_activations(true)? {
            let problem = "this device has no products with FP8 activations";
            return Err(KernelError::Unsupported(problem.into()).into());
        }
        let buffers = Buffers::new(backend.as_mut(), &spec, &limits)?;
        backend.reserve(&spec)?;
        Ok(Executor {
            experts: ExpertStore::new(spec.layers.len()),
            backend,
            spec,
            limits,
            buffers,
            kv: Vec::new(),
            resident: None,
            whole: false,
            exchanges: false,
            deterministic,
            poisoned: false,
            recorded: None,
        })
    }

    /// Once, before the first step.
    pub fn allocate_kv(&mut self, kv: KvShape) -> Result<()> {
        for layer in &self.spec.layers {
            let attention = &layer.attention;
            let cache = self.backend.alloc_kv(
                kv.pages,
                kv.page_tokens,
                attention.kv_heads,
                attention.head_dim,
                kv.dtype,
            )?;
            self.kv.push(cache);
        }
        Ok(())
    }

    /// The device, for measuring it and for faults on purpose.
    pub fn backend(&mut self) -> &mut dyn Backend {
        self.backend.as_mut()
    }

    /// The next logits hold a NaN.
    pub fn poison(&mut self) {
        self.poisoned = true;
    }

    /// Hands the whole model to the backend if all experts are here (`is_alone`), or it exchanges with the devices of other
    /// ranks (`exchanges`), and it can run steps by itself; else steps go op by op, which a device that exchanges cannot.
    /// Says which.
    pub fn choose_path(&mut self, is_alone: bool, exchanges: bool) -> Result<&'static str> {
        (self.whole, self.exchanges) = (false, exchanges);
        if !is_alone && !exchanges {
            return Ok("op by op: experts are on several ranks");
        }
        let Some(model) = self.forward_model() else {
            return Err(ModelError::NotLoaded);
        };
        match self.backend.set_forward(model) {
            Ok(whole) => self.whole = whole,
            Err(KernelError::Unsupported(reason)) if !exchanges => {
                tracing::warn!(reason, "this model's steps run op by op");
            }
            Err(error) => return Err(error.into()),
        }
        if exchanges && !self.whole {
            let problem = "this device does not run whole steps, and exchanges in no other way".into();
            return Err(KernelError::Unsupported(problem).into());
        }
        if self.whole && !exchanges {
            self.record_steps()?;
        }
        Ok(if self.whole { "whole steps" } else { "op by op" })
    }

    /// Of the path that was chosen last, once.
    pub fn take_recorded(&mut self) -> Option<Recorded> {
        self.recorded.take()
    }

    /// What decode steps need, before the first of them.
    fn record_steps(&mut self) -> Result<()> {
        let (began, before) = (Instant::now(), self.backend.device_memory()?);
        let (logits, most) = (&self.buffers.logits, self.limits.max_logit_rows);
        let steps = self.backend.record_steps(logits, most)?;
        let free = |memory: Option<DeviceMemory>| memory.map_or(0, |memory| memory.free);
        let took = free(before).saturating_sub(free(self.backend.device_memory()?));
        self.recorded = (steps > 0).then(|| Recorded {
            steps,
            bytes: took,
            seconds: began.elapsed().as_secs_f64(),
        });
        Ok(())
    }

    /// Makes one more decode step with an exchange ready, while none is on its way; whether there was one left.
    pub fn record_one(&mut self) -> Result<bool> {
        if !self.whole || !self.exchanges {
            return Ok(false);
        }
        let (logits, most) = (&self.buffers.logits, self.limits.max_logit_rows);
        Ok(self.backend.record_step(logits, most)?)
    }

    fn forward_model(&self) -> Option<ForwardModel> {
        let resident = self.resident.as_ref()?;
        let layers = resident.layers.iter().enumerate().map(|(index, layer)| {
            Some(ForwardLayer {
                attention: layer.attention,
                kv: *self.kv.get(index)?,
                moe_norm: layer.moe_norm,
                gate: layer.gate,
                selection_bias: layer.selection_bias,
                experts: self.experts.device(index)?,
            })
        });
        Some(ForwardModel {
            spec: self.spec.clone(),
            embedding: resident.embedding,
            final_norm: resident.final_norm,
            head: resident.head,
            layers: layers.collect::<Option<_>>()?,
        })
    }

    /// Before a step: the most tokens that any rank of the group has in it.
    pub fn set_group_tokens(&mut self, largest: usize) -> Result<()> {
        if !self.exchanges {
            return Ok(());
        }
        if largest > self.limits.max_tokens {
            return Err(KernelError::Shape {
                op: "step",
                what: "largest number of tokens of a rank",
                found: largest.to_string(),
                expected: format!("at most {}", self.limits.max_tokens),
            }
            .into());
        }
        Ok(self.backend.begin_group(largest)?)
    }

    pub fn is_deterministic(&self) -> bool {
        self.deterministic
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    pub fn describe_backend(&self) -> String {
        self.backend.describe()
    }

    /// What this rank may send and must take in one step.
    pub fn capacity(&self) -> Capacity {
        capacity(&self.spec, &self.limits)
    }
}

/// Sizes of the exchange for a model under these limits.
pub fn capacity(spec: &ModelSpec, limits: &Limits) -> Capacity {
    Capacity {
        max_tokens: limits.max_tokens,
        max_top_k: spec.layers.iter().map(|layer| layer.moe.top_k).max().unwrap_or(1),
        hidden: spec.hidden,
    }
}
