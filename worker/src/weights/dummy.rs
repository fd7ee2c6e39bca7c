//! `--load-format dummy`: random weights of any config, in the formats the config announces, made in memory.
//!
//! Must stay true: a module's values depend on the seed and its name alone, so that every placement and every rank
//! gives the same model.

use std::path::Path;

use conclave_kernels::dummy::{self, DummyFormat};
use conclave_kernels::weight::HostLinear;
use conclave_plan::config::{self, Config};
use conclave_plan::quant::QuantFormat;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::modules::{LinearModule, VectorModule};
use crate::checkpoint::{CheckpointError, Result, config_fingerprint};

/// Modules below this size are made by one thread; the caller makes many of them at once.
const LARGE_VALUES: usize = 1 << 24;

/// A config and a seed.
#[derive(Debug)]
pub struct DummyWeights {
    pub config: Config,
    seed: u64,
    threads: usize,
    id: String,
}

impl DummyWeights {
    /// Needs a config.json in `directory` and nothing else.
    pub fn open(
        directory: &Path,
        overrides: Option<&Value>,
        seed: u64,
        threads: usize,
    ) -> Result<DummyWeights> {
        let config = config::read(directory, overrides)?;
        Ok(DummyWeights {
            id: config_fingerprint(&config.raw, seed),
            config,
            seed,
            threads,
        })
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn linear(&self, module: &LinearModule) -> Result<HostLinear> {
        let large = module.out_features.saturating_mul(module.in_features) >= LARGE_VALUES;
        let threads = if large { self.threads } else { 1 };
        let seed = self.seed_of(&module.name);
        let made = dummy::linear(
            self.format(module),
            module.out_features,
            module.in_features,
            seed,
            threads,
        );
        made.map_err(|error| CheckpointError::Module {
            directory: "dummy weights".into(),
            module: module.name.clone(),
            problem: error.to_string(),
            advice: "take fewer layers with --hf-overrides, or more workers",
        })
    }

    /// Norms are 1, biases 0.
    pub(super) fn vector(&self, module: &VectorModule) -> Vec<f32> {
        let value = if module.name.ends_with(".weight") {
            1.0
        } else {
            0.0
        };
        vec![value; module.len]
    }

    /// Bytes of a linear module, scales included.
    pub(super) fn linear_bytes(&self, module: &LinearModule) -> u64 {
        self.format(module)
            .stored_bytes(module.out_features, module.in_features)
    }

    /// As a published checkpoint of this config stores it.
    pub(super) fn format(&self, module: &LinearModule) -> DummyFormat {
        let names = &self.config.spec.names;
        let is_expert_or_projection =
            module.name != names.embedding && module.name != names.head && !self.is_gate(module);
        if self.is_gate(module) {
            return DummyFormat::F32;
        }
        match &self.config.quant {
            Some(quant) if is_expert_or_projection && quant.covers(&module.name) => match quant.format {
                QuantFormat::Fp8Block { .. } => DummyFormat::Fp8Block,
                QuantFormat::Int4 { group, .. } => DummyFormat::Int4 { group },
            },
            _ if self.is_half() => DummyFormat::F16,
            _ => DummyFormat::Bf16,
        }
    }

    fn is_gate(&self, module: &LinearModule) -> bool {
        // `model.layers.{layer}.block_sparse_moe.gate`: what follows the layer's number.
        let suffix = self.config.spec.names.gate.rsplit('}').next().unwrap_or_default();
        module.name.ends_with(suffix)
    }

    fn is_half(&self) -> bool {
        let raw = &self.config.raw;
        let dtype = raw
            .get("dtype")
            .or(raw.get("torch_dtype"))
            .and_then(Value::as_str);
        dtype == Some("float16")
    }

    pub(super) fn seed_of(&self, name: &str) -> u64 {
        let mut hash = Sha256::new();
        hash.update(self.seed.to_le_bytes());
        hash.update(name.as_bytes());
        hash.finalize()
            .iter()
            .take(8)
            .fold(0, |seed, &byte| seed << 8 | u64::from(byte))
    }
}
