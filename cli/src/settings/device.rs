//! What a worker's device is, and what it keeps there.

use clap::Args;

use super::KvCacheDtype;
use super::values::{bytes, fraction};

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Device")]
pub struct DeviceSettings {
    /// cpu, cuda, cuda:N, or auto: cuda if this build and machine have it, else cpu.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// Threads of each CPU worker; 0 shares the machine's cores among its workers.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    /// What keys and values are kept as.
    #[arg(long, value_enum, default_value_t = KvCacheDtype::Bf16)]
    pub kv_cache_dtype: KvCacheDtype,
    /// Bytes of KV cache per worker; without it, what --gpu-memory-utilization leaves on a GPU, and on a CPU what a
    /// few of the longest sequences need.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub kv_cache_memory_bytes: Option<u64>,
    /// Share of a GPU's memory to use for weights, activations and KV cache.
    #[arg(long, value_name = "SHARE", visible_alias = "mem-fraction-static", default_value_t = 0.92, value_parser = fraction)]
    pub gpu_memory_utilization: f64,
}
