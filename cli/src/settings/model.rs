//! Which checkpoint, and how it is read.

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};
use serde_json::Value;

use super::CheckpointSettings;

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub struct ModelSettings {
    #[command(flatten)]
    pub checkpoint: CheckpointSettings,
    /// JSON object merged into config.json, e.g. {"num_hidden_layers":4}.
    #[arg(long, value_name = "JSON", visible_alias = "json-model-override-args", value_parser = json_object)]
    pub hf_overrides: Option<Value>,
    /// Where weights come from.
    #[arg(long, value_enum, default_value_t = LoadFormat::Safetensors)]
    pub load_format: LoadFormat,
    /// Seed of the dummy weights.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub dummy_seed: u64,
    /// The checkpoint's quantisation; it is found by itself, and one that disagrees is refused.
    #[arg(long, value_name = "METHOD")]
    pub quantization: Option<String>,
    /// Accepted for vLLM's sake: nothing in a checkpoint is ever executed.
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub trust_remote_code: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// Memory-mapped safetensors.
    #[value(alias = "auto")]
    Safetensors,
    /// Random weights of the config's shapes, made in memory.
    Dummy,
}

/// What keys and values are kept as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KvCacheDtype {
    #[value(name = "bf16", aliases = ["auto", "bfloat16"])]
    Bf16,
    #[value(name = "fp8_e4m3", alias = "fp8")]
    Fp8E4m3,
    #[value(name = "fp8_e5m2")]
    Fp8E5m2,
}

fn json_object(text: &str) -> Result<Value, String> {
    match serde_json::from_str(text) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err("it must be a JSON object such as {\"num_hidden_layers\":4}".into()),
        Err(error) => Err(format!("not JSON: {error}")),
    }
}
