//! The model on a device: weights uploaded, buffers allocated once, and the walk through the layers.
//!
//! Knows shapes and ops; knows nothing of slots, epochs or messages. Must stay true: after [`Executor::new`] and
//! `load_replicated` no step allocates on the device; an error leaves the weights and the KV cache as they were.

pub mod buffers;
mod experts;
mod logits;
mod resident;
mod step;

use conclave_kernels::backend::{Backend, KernelError, KvDtype, KvId, Limits};
use conclave_plan::model::ModelSpec;

use crate::checkpoint::CheckpointError;
use crate::transport::{Capacity, TransportError};
use buffers::Buffers;
use experts::ExpertStore;
use resident::Resident;
pub use step::{NoTap, RowSampling, StepInput, StepOutput, Tap};

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
}

impl Executor {
    /// Allocates the workspace and the KV cache. `backend` was made with the same `limits`.
    pub fn new(
        mut backend: Box<dyn Backend>,
        spec: ModelSpec,
        limits: Limits,
        kv: KvShape,
    ) -> Result<Executor> {
        let buffers = Buffers::new(backend.as_mut(), &spec, &limits)?;
        let caches = spec.layers.iter().map(|layer| {
            let attention = &layer.attention;
            backend.alloc_kv(
                kv.pages,
                kv.page_tokens,
                attention.kv_heads,
                attention.head_dim,
                kv.dtype,
            )
        });
        let caches = caches.collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(Executor {
            experts: ExpertStore::new(spec.layers.len()),
            backend,
            spec,
            limits,
            buffers,
            kv: caches,
            resident: None,
        })
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
