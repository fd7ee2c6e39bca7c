//! The figures of `conclave plan`, as data. The arithmetic is `conclave_plan`'s; this file only asks for it.

use anyhow::Result;
use conclave_plan::balance::max_over_mean_load;
use conclave_plan::config::Config;
use conclave_plan::gpu::Gpu;
use conclave_plan::memory::{self, RankBytes};
use conclave_plan::model::ModelSpec;
use conclave_plan::parameters::Parameters;
use conclave_plan::placement::Placement;
use conclave_plan::roofline;
use conclave_plan::storage::{FP8_BLOCK, LinearFormat, StorageFormat};
use serde::Serialize;

use crate::settings::PlanSettings;

/// Free memory that the smallest group must leave on each rank for KV cache and activations.
const RESERVE_BYTES: u64 = 1 << 30;
/// Batches over which load imbalance is averaged.
const IMBALANCE_DRAWS: u32 = 400;

#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub family: String,
    pub layers: usize,
    pub hidden: usize,
    pub experts: usize,
    pub experts_per_token: usize,
    pub max_position: usize,
    /// `none`, or the method that config.json names.
    pub quantization: String,
    pub parameters: Parameters,
    /// One F32 scale per block, were all linears FP8.
    pub fp8_scale_elements: u64,
    pub checkpoint: Vec<CheckpointSize>,
    pub expert_bytes: Vec<CheckpointSize>,
    pub kv_bytes_per_token: KvBytes,
    pub distinct_experts: Vec<Distinct>,
    pub flops_per_token: u64,
    pub attention_flops_at_8192: u64,
    pub dispatch_bytes_per_token_and_layer: DispatchBytes,
    pub group: Group,
    pub decode_bounds: Vec<DecodeBound>,
}

#[derive(Debug, Serialize)]
pub struct CheckpointSize {
    pub format: &'static str,
    pub bytes: u64,
    /// Whether this is what the config describes.
    pub this: bool,
}

#[derive(Debug, Serialize)]
pub struct KvBytes {
    pub bf16: u64,
    pub fp8: u64,
}

#[derive(Debug, Serialize)]
pub struct Distinct {
    pub batch: u64,
    pub experts: f64,
}

#[derive(Debug, Serialize)]
pub struct DispatchBytes {
    pub bf16: u64,
    pub fp8: u64,
}

/// The model on some ranks.
#[derive(Debug, Serialize)]
pub struct Group {
    pub gpu: &'static str,
    pub workers: u32,
    pub memory_bytes_per_rank: u64,
    pub ranks: Vec<Rank>,
    /// Tokens of KV over the group if weights counted once, as guides for tensor parallelism compute it.
    pub kv_tokens_weights_once: KvBytes,
    pub imbalance: Vec<Imbalance>,
}

#[derive(Debug, Serialize)]
pub struct Rank {
    pub bytes: RankBytes,
    pub kv_tokens: KvBytes,
    pub fits: bool,
}

/// Most loaded rank over the mean, uniform routing.
#[derive(Debug, Serialize)]
pub struct Imbalance {
    pub batch: u32,
    pub max_over_mean: f64,
}

/// The time that reading alone takes, over the group at data-sheet bandwidth.
#[derive(Debug, Serialize)]
pub struct DecodeBound {
    pub batch: u64,
    pub context: u64,
    pub weight_bytes: f64,
    pub kv_bytes: f64,
    pub milliseconds: f64,
    pub tokens_per_second: f64,
}

impl Report {
    pub fn of(model: &str, config: &Config, settings: &PlanSettings) -> Result<Report> {
        let spec = &config.spec;
        let format = StorageFormat::of(spec, config.quant.as_ref());
        let parameters = Parameters::of(spec);
        let fp8 = uniform(FP8_BLOCK).bytes(spec);
        let group = group(spec, &format, settings)?;
        let bandwidth = f64::from(group.workers) * settings.gpu.bandwidth;
        let moe = &spec.layers[0].moe;
        Ok(Report {
            model: model.to_owned(),
            family: spec.family.clone(),
            layers: spec.layers.len(),
            hidden: spec.hidden,
            experts: moe.experts,
            experts_per_token: moe.top_k,
            max_position: spec.max_position,
            quantization: config
                .quant
                .as_ref()
                .map_or("none", |quant| quant.method())
                .to_owned(),
            parameters,
            fp8_scale_elements: (fp8.attention + fp8.experts - parameters.attention - parameters.experts) / 4,
            checkpoint: sizes(&format, |format| format.bytes(spec).total()),
            expert_bytes: sizes(&format, |format| format.bytes(spec).expert),
            kv_bytes_per_token: kv_bytes(spec),
            distinct_experts: [1, 2, 4, 8, 16, 32, 64, 128, 256]
                .map(|batch| Distinct {
                    batch,
                    experts: roofline::distinct_experts(moe.experts, moe.top_k, batch),
                })
                .into(),
            flops_per_token: roofline::flops_per_token(spec),
            attention_flops_at_8192: roofline::attention_flops(spec, 8192),
            dispatch_bytes_per_token_and_layer: DispatchBytes {
                bf16: roofline::dispatch_bytes_bf16(spec),
                fp8: roofline::dispatch_bytes_fp8(spec),
            },
            group,
            decode_bounds: decode_bounds(spec, &format, bandwidth),
        })
    }
}

const fn uniform(linear: LinearFormat) -> StorageFormat {
    StorageFormat {
        attention: linear,
        experts: linear,
    }
}

/// The checkpoint's own format and those that people download.
fn sizes(own: &StorageFormat, bytes: impl Fn(&StorageFormat) -> u64) -> Vec<CheckpointSize> {
    let int4 = LinearFormat::awq(128);
    let with = |attention, experts| StorageFormat { attention, experts };
    let known = [
        ("BF16", StorageFormat::SIXTEEN_BIT),
        ("FP8, 128x128 blocks", uniform(FP8_BLOCK)),
        ("INT4 g128, all linears (AWQ)", uniform(int4)),
        ("INT4 g128 experts, FP8 attention", with(FP8_BLOCK, int4)),
        (
            "INT4 g128 experts, BF16 attention",
            with(LinearFormat::SixteenBit, int4),
        ),
        (
            "INT4 g32 symmetric experts, BF16 attention",
            with(LinearFormat::SixteenBit, LinearFormat::pack_quantized(32)),
        ),
    ];
    let mut rows: Vec<CheckpointSize> = known
        .iter()
        .map(|(name, format)| CheckpointSize {
            format: name,
            bytes: bytes(format),
            this: format == own,
        })
        .collect();
    if !rows.iter().any(|row| row.this) {
        rows.push(CheckpointSize {
            format: "as config.json says",
            bytes: bytes(own),
            this: true,
        });
    }
    rows
}

fn kv_bytes(spec: &ModelSpec) -> KvBytes {
    KvBytes {
        bf16: memory::kv_bytes_per_token(spec, 2),
        fp8: memory::kv_bytes_per_token(spec, 1),
    }
}

fn group(spec: &ModelSpec, format: &StorageFormat, settings: &PlanSettings) -> Result<Group> {
    let Gpu {
        name, usable_bytes, ..
    } = settings.gpu;
    let memory = (usable_bytes as f64 * settings.gpu_memory_utilization) as u64;
    let workers = match settings.workers {
        Some(workers) => workers,
        None => memory::fewest_ranks(spec, format, memory, RESERVE_BYTES)?,
    };
    let experts = spec.layers[0].moe.experts as u32;
    let placement = Placement::even(experts, workers);
    let kv = kv_bytes(spec);
    let tokens = |memory, weights| KvBytes {
        bf16: memory::kv_tokens(memory, weights, kv.bf16),
        fp8: memory::kv_tokens(memory, weights, kv.fp8),
    };
    let ranks = memory::ranks(spec, format, &placement)
        .into_iter()
        .map(|bytes| Rank {
            bytes,
            kv_tokens: tokens(memory, bytes.total()),
            fits: bytes.total() <= memory,
        });
    let top_k = spec.layers[0].moe.top_k as u32;
    Ok(Group {
        gpu: name,
        workers,
        memory_bytes_per_rank: memory,
        ranks: ranks.collect(),
        kv_tokens_weights_once: tokens(memory * u64::from(workers), format.bytes(spec).total()),
        imbalance: [1, 8, 32, 128, 256]
            .map(|batch| Imbalance {
                batch,
                max_over_mean: max_over_mean_load(&placement, top_k, batch, IMBALANCE_DRAWS),
            })
            .into(),
    })
}

fn decode_bounds(spec: &ModelSpec, format: &StorageFormat, bandwidth: f64) -> Vec<DecodeBound> {
    let mut bounds = Vec::new();
    for batch in [1, 32, 256] {
        for context in [0, 8192, 65536] {
            let bytes = roofline::step_bytes(spec, format, batch, context, 2);
            let seconds = bytes.seconds(bandwidth);
            bounds.push(DecodeBound {
                batch,
                context,
                weight_bytes: bytes.weights,
                kv_bytes: bytes.kv,
                milliseconds: seconds * 1e3,
                tokens_per_second: batch as f64 / seconds,
            });
        }
    }
    bounds
}
