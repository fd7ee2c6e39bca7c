//! The resolved layout of a worker: every number that follows from config, model and machine, and the table of what
//! takes how much memory. Printed at start.

use std::fmt;

use conclave_kernels::backend::{KvDtype, Limits};
use conclave_plan::memory::kv_bytes_per_token;
use conclave_plan::model::ModelSpec;

use crate::config::WorkerConfig;
use crate::error::{Result, WorkerError};
use crate::model::KvShape;
use crate::model::buffers::workspace_bytes;
use crate::slots::SlotLimits;
use crate::weights::{StoredBytes, WeightSource};

/// Bounds on the numbers of a [`WorkerConfig`]: buffers are products of them.
pub const MAX_SLOTS: u32 = 1 << 16;
pub const MAX_BATCHED_TOKENS: u32 = 1 << 17;
pub const MAX_PAGE_TOKENS: u32 = 1 << 10;
/// Page numbers stay far below 2^32.
pub const MAX_KV_PAGES: u64 = 1 << 28;
/// Without a size, the KV cache holds so many of the longest sequences,
const DEFAULT_LONGEST_SEQUENCES: u64 = 4;
/// within this part of the memory that is free.
const DEFAULT_KV_SHARE: u64 = 8;

/// What a worker has resolved to.
#[derive(Clone, Debug)]
pub struct Layout {
    pub family: String,
    pub checkpoint_id: String,
    pub threads: usize,
    pub limits: Limits,
    pub slots: SlotLimits,
    pub kv: KvShape,
    pub kv_bytes: u64,
    pub workspace_bytes: u64,
    pub stored: StoredBytes,
    /// Bytes of experts (as stored) that fit beside everything else; `None`: no limit is known.
    pub expert_capacity: Option<u64>,
    /// What the device has, if it has memory of its own.
    pub device: Option<DeviceTable>,
}

/// A device's memory, for the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceTable {
    pub total: u64,
    /// What this worker may use of it.
    pub usable: u64,
    /// Weights that every rank holds, as the device keeps them.
    pub replicated: u64,
    /// This rank's share of the experts, and among how many workers.
    pub experts: u64,
    pub workers: u32,
    /// Set aside for the driver's context, the kernels' code and recorded decode steps.
    pub context: u64,
}

impl Layout {
    /// `free_memory` in bytes; `None`: the device's own memory decides how many KV pages there are, once it is open
    /// (`set_pages`).
    pub fn new(config: &WorkerConfig, source: &WeightSource, free_memory: Option<u64>) -> Result<Layout> {
        let spec = source.spec();
        let within = |field, value: u32, most: u32| match value {
            1.. if value <= most => Ok(value as usize),
            _ => Err(WorkerError::config(
                field,
                value,
                format!("1 to {most} are allowed"),
            )),
        };
        let max_slots = within("max-num-seqs", config.max_slots, MAX_SLOTS)?;
        let max_tokens = within(
            "max-num-batched-tokens",
            config.max_batched_tokens,
            MAX_BATCHED_TOKENS,
        )?;
        let page_tokens = within("block-size", config.page_tokens, MAX_PAGE_TOKENS)?;
        let max_position = match config.max_model_len {
            None => spec.max_position,
            Some(length) if length > 0 && length as usize <= spec.max_position => length as usize,
            Some(length) => {
                let problem = format!("1 to the model's {} are allowed", spec.max_position);
                return Err(WorkerError::config("max-model-len", length, problem));
            }
        };
        let page_bytes = page_bytes(spec, page_tokens, config.kv_cache_dtype);
        let pages = kv_pages(
            config,
            max_position.div_ceil(page_tokens) as u64,
            page_bytes,
            free_memory,
        )?;
        let longest = max_position.div_ceil(page_tokens);
        let slots = SlotLimits {
            max_slots,
            max_tokens,
            kv_pages: pages.unwrap_or(longest as u64) as usize,
            page_tokens,
            vocab: spec.vocab,
            max_position,
            layers: spec.layers.len(),
        };
        let top_k = spec.layers.iter().map(|layer| layer.moe.top_k).max().unwrap_or(1);
        let limits = Limits {
            max_tokens,
            max_logit_rows: max_slots.min(max_tokens),
            max_runs: max_slots.min(max_tokens),
            max_pages_per_run: slots.max_pages_per_slot(),
            max_expert_rows: max_tokens * top_k,
            page_tokens,
        };
        Ok(Layout {
            family: spec.family.clone(),
            checkpoint_id: source.id().to_owned(),
            threads: config.resolved_threads(),
            kv: KvShape {
                pages: pages.unwrap_or(0) as usize,
                page_tokens,
                dtype: config.kv_cache_dtype,
            },
            kv_bytes: pages.unwrap_or(0) * page_bytes,
            workspace_bytes: workspace_bytes(spec, &limits),
            stored: source.stored_by_kind(),
            expert_capacity: config.expert_memory,
            device: None,
            limits,
            slots,
        })
    }

    pub fn page_bytes(&self, spec: &ModelSpec) -> u64 {
        page_bytes(spec, self.kv.page_tokens, self.kv.dtype)
    }

    /// Pages of all running sequences at their longest: more are of no use.
    pub fn most_useful_pages(&self) -> u64 {
        let longest = self.slots.max_position.div_ceil(self.slots.page_tokens) as u64;
        (longest * self.slots.max_slots as u64).min(MAX_KV_PAGES)
    }

    /// The KV cache's size, where it was left open.
    pub fn set_pages(&mut self, pages: u64, spec: &ModelSpec) {
        self.kv.pages = pages as usize;
        self.slots.kv_pages = pages as usize;
        self.kv_bytes = pages * self.page_bytes(spec);
    }
}

fn page_bytes(spec: &ModelSpec, page_tokens: usize, dtype: KvDtype) -> u64 {
    let value_bytes = match dtype {
        KvDtype::F32 => 4,
        KvDtype::Bf16 => 2,
        KvDtype::Fp8E4m3 | KvDtype::Fp8E5m2 => 1,
    };
    kv_bytes_per_token(spec, value_bytes) * page_tokens as u64
}

fn kv_pages(
    config: &WorkerConfig,
    longest: u64,
    page_bytes: u64,
    free_memory: Option<u64>,
) -> Result<Option<u64>> {
    let (field, pages) = match (config.kv_pages, config.kv_cache_memory) {
        (Some(pages), _) => ("kv-pages", u64::from(pages)),
        (None, Some(bytes)) => ("kv-cache-memory-bytes", bytes / page_bytes.max(1)),
        (None, None) => {
            let Some(free_memory) = free_memory else {
                return Ok(None);
            };
            let wanted = DEFAULT_LONGEST_SEQUENCES * longest;
            (
                "kv-cache-memory-bytes",
                wanted.min(free_memory / DEFAULT_KV_SHARE / page_bytes.max(1)),
            )
        }
    };
    if pages == 0 || pages > MAX_KV_PAGES {
        let problem = format!("that is {pages} pages of {page_bytes} bytes, 1 to {MAX_KV_PAGES} are allowed");
        let value = config
            .kv_cache_memory
            .map_or("unset".into(), |bytes| bytes.to_string());
        return Err(WorkerError::config(field, value, problem));
    }
    Ok(Some(pages))
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |f: &mut fmt::Formatter<'_>, name: &str, bytes: u64, note: &str| {
            writeln!(f, "  {name:<24}{:>12}  {note}", Size(bytes))
        };
        writeln!(
            f,
            "model {} ({}), {} threads",
            self.family,
            &self.checkpoint_id[..12],
            self.threads
        )?;
        row(
            f,
            "embedding and head",
            self.stored.embedding_and_head,
            "on every rank",
        )?;
        row(f, "attention", self.stored.attention, "on every rank")?;
        row(f, "norms and gates", self.stored.norms_and_gates, "on every rank")?;
        row(
            f,
            "experts",
            self.stored.experts,
            "of the whole model; this rank holds its share",
        )?;
        let tokens = self.kv.pages * self.kv.page_tokens;
        let note = format!(
            "{} pages of {} = {tokens} tokens, {:?}",
            self.kv.pages, self.kv.page_tokens, self.kv.dtype
        );
        row(f, "KV cache", self.kv_bytes, &note)?;
        let note = format!(
            "{} sequences, {} tokens a step",
            self.slots.max_slots, self.slots.max_tokens
        );
        row(f, "workspace", self.workspace_bytes, &note)?;
        if let Some(device) = &self.device {
            let note = format!("this rank's, of {} workers", device.workers);
            row(f, "on the device: experts", device.experts, &note)?;
            row(f, "on the device: the rest", device.replicated, "of the weights")?;
            row(
                f,
                "context",
                device.context,
                "set aside: driver, code, recorded decode steps",
            )?;
            row(
                f,
                "usable",
                device.usable,
                &format!("of {}, --gpu-memory-utilization", Size(device.total)),
            )?;
        }
        Ok(())
    }
}

/// Bytes for people.
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let unit = (self.0.max(1).ilog2() / 10).min(4);
        let value = self.0 as f64 / f64::from(1u32 << 10).powi(unit as i32);
        let digits = usize::from(unit > 0) * 2;
        f.pad(&format!("{value:.digits$} {}", UNITS[unit as usize]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(Size(0).to_string(), "0 B");
        assert_eq!(Size(1023).to_string(), "1023 B");
        assert_eq!(Size(1536).to_string(), "1.50 KiB");
        assert_eq!(Size(5 << 40).to_string(), "5.00 TiB");
    }

    #[test]
    fn pages_follow_from_memory_and_have_bounds() {
        let mut config = WorkerConfig::new("", "");
        assert_eq!(kv_pages(&config, 100, 1000, Some(1 << 30)).unwrap(), Some(400));
        assert_eq!(kv_pages(&config, 100, 1000, Some(80_000)).unwrap(), Some(10));
        assert_eq!(kv_pages(&config, 100, 1000, None).unwrap(), None);
        config.kv_cache_memory = Some(5_999);
        assert_eq!(kv_pages(&config, 100, 1000, None).unwrap(), Some(5));
        config.kv_cache_memory = Some(999);
        assert!(
            kv_pages(&config, 100, 1000, Some(0))
                .unwrap_err()
                .to_string()
                .contains("kv-cache-memory-bytes is 999")
        );
        config.kv_pages = Some(7);
        assert_eq!(kv_pages(&config, 100, 1000, None).unwrap(), Some(7));
        config.kv_pages = Some(0);
        assert!(kv_pages(&config, 100, 1000, Some(0)).is_err());
    }
}
