//! What a worker says of itself when it attaches.

use conclave_kernels::backend::KvDtype;
use conclave_proto::cluster::v1 as wire;
use tokio::net::TcpListener;

use crate::config::WorkerConfig;
use crate::device::{DeviceKind, gpus};
use crate::error::{Result, WorkerError};
use crate::layout::Layout;

/// Drawn and resolved once at start; the same at every attachment.
pub(super) struct Identity {
    hello: wire::Hello,
}

impl Identity {
    pub(super) fn new(
        config: &WorkerConfig,
        layout: &Layout,
        kind: DeviceKind,
        listener: &TcpListener,
    ) -> Result<Identity> {
        let mut random = [0u8; 8];
        getrandom::fill(&mut random)
            .map_err(|error| WorkerError::Device(format!("no random numbers: {error}")))?;
        let worker_id = format!("w-{:016x}", u64::from_le_bytes(random));
        let listening = listener.local_addr().map_err(|error| WorkerError::Listen {
            address: config.listen,
            error,
        })?;
        let host = match &config.advertise {
            Some(host) => host.clone(),
            None if listening.ip().is_unspecified() => {
                let problem = "peers cannot connect to it; say with --peer-advertise under which host they reach this worker";
                return Err(WorkerError::config("peer-host", listening.ip(), problem));
            }
            None if listening.is_ipv6() => format!("[{}]", listening.ip()),
            None => listening.ip().to_string(),
        };
        let (device_name, memory_bytes, device_uuid) = match kind {
            DeviceKind::Cpu => (cpu_name(), total_memory(), String::new()),
            DeviceKind::Cuda(ordinal) => gpu_facts(ordinal)?,
        };
        Ok(Identity {
            hello: wire::Hello {
                worker_id,
                version: env!("CARGO_PKG_VERSION").into(),
                device: kind.name().into(),
                device_name,
                memory_bytes,
                peer_address: format!("{host}:{}", listening.port()),
                checkpoint_id: layout.checkpoint_id.clone(),
                cluster_token: config.cluster_token.clone(),
                kv_pages: layout.kv.pages as u32,
                page_tokens: layout.kv.page_tokens as u32,
                threads: layout.threads as u32,
                transports: kind.transports(),
                expert_bytes_capacity: layout.expert_capacity.unwrap_or(0),
                rank: config.rank,
                kv_cache_dtype: match layout.kv.dtype {
                    KvDtype::F32 => "f32",
                    KvDtype::Bf16 => "bf16",
                    KvDtype::Fp8E4m3 => "fp8_e4m3",
                    KvDtype::Fp8E5m2 => "fp8_e5m2",
                }
                .into(),
                max_slots: layout.slots.max_slots as u32,
                max_batched_tokens: layout.slots.max_tokens as u32,
                max_model_len: layout.slots.max_position as u32,
                host_id: host_id(),
                device_uuid,
            },
        })
    }

    pub(super) fn hello(&self) -> wire::Hello {
        self.hello.clone()
    }

    pub(super) fn worker_id(&self) -> &str {
        &self.hello.worker_id
    }

    pub(super) fn peer_address(&self) -> &str {
        &self.hello.peer_address
    }
}

/// The same in processes whose GPUs can map each other's memory: one kernel, and no namespace between them.
fn host_id() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let space = |name: &str| std::fs::read_link(format!("/proc/self/ns/{name}"));
    match (boot.trim(), space("ipc"), space("pid")) {
        (boot, Ok(ipc), Ok(pid)) if !boot.is_empty() => format!("{boot} {} {}", ipc.display(), pid.display()),
        _ => String::new(),
    }
}

fn gpu_facts(ordinal: u32) -> Result<(String, u64, String)> {
    let gpus = gpus().map_err(|problem| WorkerError::config("device", "cuda", problem))?;
    let gpu = gpus.into_iter().find(|gpu| gpu.ordinal == ordinal);
    let gpu = gpu.ok_or_else(|| WorkerError::Device(format!("GPU {ordinal} is gone")))?;
    Ok((gpu.name, gpu.memory_bytes, gpu.uuid))
}

/// `model name` of /proc/cpuinfo.
fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("model name"));
    line.map_or("cpu".into(), |line| {
        line.trim_start_matches([' ', '\t', ':']).trim().to_owned()
    })
}

fn total_memory() -> u64 {
    memory_info("MemTotal:").unwrap_or(0)
}

/// Bytes that can still be had; where the system does not say, a size that every machine has.
pub(super) fn free_memory() -> u64 {
    const SMALL_MACHINE: u64 = 4 << 30;
    memory_info("MemAvailable:").unwrap_or(SMALL_MACHINE)
}

fn memory_info(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    kib.checked_mul(1024)
}
