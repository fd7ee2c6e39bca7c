//! `conclave verify`.

use std::path::PathBuf;

use clap::Args;
use clap::builder::BoolishValueParser;

use super::{Fp8Activations, KvCacheDtype, LogSettings, ModelSettings};

#[derive(Args, Clone, Debug)]
pub struct VerifySettings {
    #[command(flatten)]
    pub model: ModelSettings,
    /// Safetensors file with input_ids, logits, greedy_ids and perhaps router_logits.
    #[arg(long, value_name = "FILE")]
    pub reference: PathBuf,
    /// Ranks to compute on, in this process.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub workers: u32,
    /// Threads of each rank.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub threads: usize,
    /// What keys and values are kept as; without it F32 on a CPU, as references are computed, and BF16 on a GPU.
    #[arg(long, value_enum)]
    pub kv_cache_dtype: Option<KvCacheDtype>,
    /// Prompt tokens per step; without it, all that fit.
    #[arg(long, value_name = "TOKENS")]
    pub prefill_chunk: Option<usize>,
    /// cpu, cuda, cuda:N, or auto.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// Kernels with one order of summation, whatever the batch.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub deterministic: bool,
    /// Quantise activations in front of FP8 weights.
    #[arg(long, value_enum, default_value_t = Fp8Activations::Off)]
    pub fp8_activations: Fp8Activations,
    #[command(flatten)]
    pub log: LogSettings,
}
