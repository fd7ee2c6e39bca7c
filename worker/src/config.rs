//! What a worker is told at start.
//!
//! Keeps invariant F1 of ARCHITECTURE.md.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use conclave_kernels::backend::KvDtype;
use serde_json::Value;

use crate::weights::Progress;

/// Everything a worker is told. [`WorkerConfig::new`] has the defaults.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// host:port of the router's port for workers, or a whole URL.
    pub router_addr: String,
    /// Secret of the cluster; empty if it has none.
    pub cluster_token: String,
    pub model_dir: PathBuf,
    pub load_format: LoadFormat,
    /// A JSON object merged into config.json.
    pub hf_overrides: Option<Value>,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// 0: all of the machine's.
    pub threads: usize,
    /// Where peers connect to; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Host under which peers reach this worker; `None`: the address it listens on.
    pub advertise: Option<String>,
    /// Asked-for position in the group.
    pub rank: Option<u32>,
    pub kv_cache_dtype: KvDtype,
    /// `None`: what `kv_cache_memory` holds.
    pub kv_pages: Option<u32>,
    /// Bytes; `None`: what a few of the longest sequences need, bounded by a share of the machine's memory.
    pub kv_cache_memory: Option<u64>,
    /// Must be the router's.
    pub page_tokens: u32,
    pub max_slots: u32,
    /// Tokens of one step.
    pub max_batched_tokens: u32,
    /// Longest sequence; `None`: the model's.
    pub max_model_len: Option<u32>,
    /// Bytes of experts that this worker may hold; `None`: no limit is told.
    pub expert_memory: Option<u64>,
    /// Share of a GPU's memory to use.
    pub gpu_memory_utilization: f64,
    /// Workers that the experts are shared among: on a GPU, what their share leaves is for the KV cache. One worker
    /// fewer is planned for if that leaves room for the longest sequence.
    pub expected_workers: u32,
    /// One order of summation whatever the batch, chunking and placement; the CPU always has it.
    pub deterministic: bool,
    /// Activations in front of FP8 weights are quantised, too.
    pub fp8_activations: bool,
    /// Only for tests of what follows a fault.
    pub fault: Option<Fault>,
    /// Asked to end, the worker stays for so long while its sequences move away.
    pub drain_timeout: Duration,
    /// Without a router for so long, the worker gives up.
    pub reconnect_for: Duration,
    /// Follows loading.
    pub progress: Arc<Progress>,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadFormat {
    /// The checkpoint's safetensors.
    #[default]
    Auto,
    /// Random values of the config's shapes and formats.
    Dummy { seed: u64 },
}

/// A fault on purpose, at a step of the first epoch that gets so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub kind: FaultKind,
    pub step: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// A kernel that writes where no memory is.
    Kernel,
    /// The first row of logits holds a NaN.
    Nan,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            FaultKind::Kernel => "kernel",
            FaultKind::Nan => "nan",
        };
        write!(f, "{kind}@{}", self.step)
    }
}

impl std::str::FromStr for Fault {
    type Err = String;

    /// `kernel@100`, `nan@5`.
    fn from_str(text: &str) -> std::result::Result<Fault, String> {
        let (kind, step) = text.split_once('@').unwrap_or((text, ""));
        let kind = match kind {
            "kernel" => FaultKind::Kernel,
            "nan" => FaultKind::Nan,
            _ => return Err("it must be kernel@STEP or nan@STEP".into()),
        };
        let step = step.parse().map_err(|_| "the step must be a number".to_owned())?;
        Ok(Fault { kind, step })
    }
}

impl WorkerConfig {
    pub fn new(router_addr: impl Into<String>, model_dir: impl Into<PathBuf>) -> WorkerConfig {
        WorkerConfig {
            router_addr: router_addr.into(),
            cluster_token: String::new(),
            model_dir: model_dir.into(),
            load_format: LoadFormat::Auto,
            hf_overrides: None,
            device: "auto".into(),
            threads: 0,
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise: None,
            rank: None,
            kv_cache_dtype: KvDtype::Bf16,
            kv_pages: None,
            kv_cache_memory: None,
            page_tokens: 16,
            max_slots: 256,
            max_batched_tokens: 2048,
            max_model_len: None,
            expert_memory: None,
            gpu_memory_utilization: 0.92,
            expected_workers: 1,
            deterministic: false,
            fp8_activations: false,
            fault: None,
            drain_timeout: Duration::from_secs(30),
            reconnect_for: Duration::from_secs(600),
            progress: Progress::new(),
        }
    }

    /// Threads to use.
    pub fn resolved_threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
    }
}
