//! What a worker's device is, and what it keeps there.

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};
use conclave_worker::Fault;

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
    /// Kernels with one order of summation, whatever the batch: the same request always gives the same tokens. CPUs
    /// always compute so; GPUs get slower.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub deterministic: bool,
    /// Quantise activations in front of FP8 weights, per token and 128 inputs: faster prompts, results less close to the
    /// checkpoint's. On a GPU in steps of more than 128 tokens, in front of attention's weights of more than 16.
    #[arg(long, value_enum, default_value_t = Fp8Activations::Off)]
    pub fp8_activations: Fp8Activations,
    /// For tests: kernel@STEP or nan@STEP makes the worker of rank 0 fail once, at that step.
    #[arg(long, value_name = "FAULT", hide = true, value_parser = fault)]
    pub inject_fault: Option<Fault>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Fp8Activations {
    Off,
    On,
}

impl Fp8Activations {
    pub fn is_on(self) -> bool {
        self == Fp8Activations::On
    }
}

fn fault(text: &str) -> Result<Fault, String> {
    text.parse()
}
