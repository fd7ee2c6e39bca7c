//! The CPU backend: the definition of correct for every op, and the fast path on machines without a GPU.
//!
//! May touch: memory it allocated at start and the weights' bytes. Must stay true: every output element has the one
//! reduction order that its op's formula names (invariant K1); no op allocates (the results of `sample` apart);
//! every buffer, weight and batch is checked before a kernel reads it.

mod backend;
pub(crate) mod batch;
pub(crate) mod buffers;
pub(crate) mod check;
pub(crate) mod engine;
pub(crate) mod float8;
pub(crate) mod kv;
pub(crate) mod memory;
pub(crate) mod pool;
mod queued;
pub(crate) mod weights;
pub(crate) mod workspace;

use std::fmt;

use crate::backend::{KernelError, Limits, Result};
use crate::cpu::batch::Step;
use crate::cpu::buffers::Buffers;
use crate::cpu::engine::Engine;
use crate::cpu::kv::KvCache;
use crate::cpu::queued::Queued;
use crate::cpu::weights::Weights;
use crate::cpu::workspace::Workspace;
pub use crate::simd::Isa;

/// A [`crate::backend::Backend`] on this machine's CPUs.
pub struct CpuBackend {
    pub(crate) engine: Engine,
    pub(crate) buffers: Buffers,
    pub(crate) weights: Weights,
    pub(crate) caches: Vec<KvCache>,
    pub(crate) step: Step,
    pub(crate) workspace: Workspace,
    /// Width of the hidden state, from the last `route`: `combine` is not told.
    pub(crate) width: usize,
    pub(crate) queued: Queued,
}

impl CpuBackend {
    /// A backend of `threads` threads (the caller's is one of them); `isa`: the best of the machine if `None`.
    /// `Unsupported` if the machine lacks the instruction set, `Shape` if `threads` is 0.
    pub fn new(limits: Limits, threads: usize, isa: Option<Isa>) -> Result<CpuBackend> {
        let isa = isa.unwrap_or_else(Isa::detect);
        if !isa.is_available() {
            return Err(KernelError::Unsupported(format!(
                "this CPU does not run {}; leave the choice of instruction set open",
                isa.name()
            )));
        }
        if threads == 0 {
            return Err(check::mismatch("cpu backend", "threads", "0", "1 or more"));
        }
        Ok(CpuBackend {
            engine: Engine::new(isa, threads)?,
            buffers: Buffers::default(),
            weights: Weights::default(),
            caches: Vec::new(),
            step: Step::new(&limits),
            workspace: Workspace::new(&limits)?,
            width: 0,
            queued: Queued::default(),
        })
    }
}

impl fmt::Debug for CpuBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let threads = self.engine.threads();
        let plural = if threads == 1 { "" } else { "s" };
        write!(f, "cpu ({}, {threads} thread{plural})", self.engine.isa.name())
    }
}
