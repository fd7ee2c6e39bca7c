//! Opens the device and divides its memory: workspace first, then what the weights will take, and the rest is for
//! keys and values. What does not fit is an error at start that says what would.

use conclave_kernels::backend::{Backend, DeviceMemory, KernelError};
use conclave_kernels::dummy::DummyFormat;
use conclave_plan::storage::StorageFormat;

use super::DeviceKind;
use crate::config::WorkerConfig;
use crate::error::{Result, WorkerError};
use crate::layout::{DeviceTable, Layout, Size};
use crate::model::{Executor, ModelError, Modes};
use crate::weights::{WeightSource, modules};

/// Of the usable memory, for the driver's context, the code and recorded steps.
const CONTEXT_BYTES: u64 = 1 << 30;
/// Stays free whatever is allowed.
const RESERVE_BYTES: u64 = 512 << 20;

/// The executor with all its buffers and its KV cache; where the layout left the number of pages open, it is set.
pub fn open(
    kind: DeviceKind,
    config: &WorkerConfig,
    source: &WeightSource,
    layout: &mut Layout,
) -> Result<Executor> {
    let backend = kind.open(layout.limits.clone(), layout.threads)?;
    let spec = source.spec();
    let modes = Modes {
        deterministic: config.deterministic,
        fp8_activations: config.fp8_activations,
    };
    if modes.fp8_activations && !has_fp8(source) {
        let problem = "fp8_activations is on, but no weight is FP8; leave it off";
        return Err(ModelError::from(KernelError::Unsupported(problem.into())).into());
    }
    let mut executor = Executor::new(backend, spec.clone(), layout.limits.clone(), modes)?;
    let device = executor.backend();
    if let Some(memory) = device.device_memory().map_err(ModelError::from)? {
        let needs = Needs::of(device, source, config);
        divide(memory, &needs, config, source, layout)?;
    }
    executor.allocate_kv(layout.kv)?;
    Ok(executor)
}

/// Whether projections or experts are FP8.
fn has_fp8(source: &WeightSource) -> bool {
    let spec = source.spec();
    (0..spec.layers.len()).any(|index| {
        let (q, gate) = (
            modules::layer(spec, index).q,
            modules::expert(spec, index, 0).gate,
        );
        [q, gate]
            .iter()
            .any(|module| source.format(module) == DummyFormat::Fp8Block)
    })
}

/// What whole steps make of the weights, where one worker holds them all.
fn forward_bytes(device: &dyn Backend, source: &WeightSource, config: &WorkerConfig) -> u64 {
    let spec = source.spec();
    if config.expected_workers > 1 || spec.layers.is_empty() {
        return 0;
    }
    let layer = modules::layer(spec, 0);
    let formats =
        [&layer.q, &layer.gate, &modules::expert(spec, 0, 0).gate].map(|module| source.format(module));
    device.forward_bytes(spec, formats, config.kv_cache_dtype)
}

/// Bytes of weights on the device.
struct Needs {
    replicated: u64,
    /// One expert of every layer.
    expert: u64,
    experts: u32,
    layers: usize,
}

impl Needs {
    fn of(device: &dyn Backend, source: &WeightSource, config: &WorkerConfig) -> Needs {
        let spec = source.spec();
        let linear = |module: &modules::LinearModule| {
            device.linear_bytes(source.format(module), module.out_features, module.in_features)
        };
        let mut replicated = linear(&modules::embedding(spec));
        if modules::head(spec) != modules::embedding(spec) {
            replicated += linear(&modules::head(spec));
        }
        replicated += forward_bytes(device, source, config);
        let (mut expert, mut experts) = (0, 0);
        for (index, layer) in spec.layers.iter().enumerate() {
            let modules = modules::layer(spec, index);
            for module in [&modules.q, &modules.k, &modules.v, &modules.o, &modules.gate] {
                replicated += linear(module);
            }
            let first = modules::expert(spec, index, 0);
            let inter = layer.moe.intermediate;
            expert += device.expert_bytes(source.format(&first.gate), spec.hidden, inter);
            experts = experts.max(layer.moe.experts as u32);
        }
        Needs {
            replicated,
            expert,
            experts,
            layers: spec.layers.len(),
        }
    }

    /// Of one of so many workers.
    fn share(&self, workers: u32) -> u64 {
        u64::from(self.experts.div_ceil(workers.max(1))) * self.expert
    }
}

fn divide(
    memory: DeviceMemory,
    needs: &Needs,
    config: &WorkerConfig,
    source: &WeightSource,
    layout: &mut Layout,
) -> Result<()> {
    let spec = source.spec();
    let usable = (memory.total as f64 * config.gpu_memory_utilization) as u64;
    let left = usable
        .saturating_sub(memory.ours + CONTEXT_BYTES)
        .min(memory.free.saturating_sub(RESERVE_BYTES));
    let page_bytes = layout.page_bytes(spec);
    let longest = layout.slots.max_position.div_ceil(layout.slots.page_tokens) as u64;
    let fixed = (layout.kv.pages > 0).then_some(layout.kv.pages as u64);
    let pages_beside = |workers: u32| {
        let weights = needs.replicated + needs.share(workers);
        left.checked_sub(weights).map(|rest| rest / page_bytes.max(1))
    };
    let wanted = fixed.unwrap_or(1);
    let expected = config.expected_workers.max(1);
    // One worker may be lost, if the others then still hold the longest sequence.
    let planned = match pages_beside(expected - 1) {
        Some(pages) if expected > 1 && pages >= fixed.unwrap_or(longest) => expected - 1,
        _ => expected,
    };
    let Some(pages) = pages_beside(planned).filter(|pages| *pages >= wanted) else {
        return Err(does_not_fit(
            needs,
            left,
            usable,
            memory,
            config,
            layout,
            wanted * page_bytes,
        ));
    };
    if expected > 1 && planned == expected {
        tracing::warn!(
            workers = expected,
            "all workers are needed to hold the experts: the loss of one stops the service until it is back"
        );
    }
    let pages = fixed.unwrap_or(pages.min(layout.most_useful_pages()));
    layout.set_pages(pages, spec);
    if pages < longest {
        let tokens = pages * layout.slots.page_tokens as u64;
        tracing::warn!(
            tokens,
            longest = layout.slots.max_position,
            "the KV cache holds less than the longest sequence; fewer bytes a token (--kv-cache-dtype fp8_e4m3), more workers, \
             or --max-model-len {tokens}"
        );
    }
    let room = left - needs.replicated - layout.kv_bytes.min(left - needs.replicated);
    let fitting = room / needs.expert.max(1);
    layout.expert_capacity = Some(
        config
            .expert_memory
            .unwrap_or(u64::MAX)
            .min(fitting * stored_expert(source)),
    );
    layout.workspace_bytes = memory.ours;
    layout.device = Some(DeviceTable {
        total: memory.total,
        usable,
        replicated: needs.replicated,
        experts: needs.share(planned),
        workers: planned,
        context: CONTEXT_BYTES,
    });
    Ok(())
}

/// One expert of every layer in the bytes that the router counts in: those of the checkpoint.
fn stored_expert(source: &WeightSource) -> u64 {
    let (spec, config) = (source.spec(), source.config());
    let format = StorageFormat::of(spec, config.quant.as_ref());
    let layers = spec.layers.iter();
    layers.map(|layer| format.expert_bytes(spec.hidden, layer)).sum()
}

fn does_not_fit(
    needs: &Needs,
    left: u64,
    usable: u64,
    memory: DeviceMemory,
    config: &WorkerConfig,
    layout: &Layout,
    kv_bytes: u64,
) -> WorkerError {
    let workers = config.expected_workers.max(1);
    let weights = needs.replicated + needs.share(workers);
    let mut advice = Vec::new();
    let enough =
        (workers + 1..=needs.experts).find(|more| needs.replicated + needs.share(*more) + kv_bytes <= left);
    if let Some(more) = enough {
        advice.push(format!("{more} workers (--workers {more})"));
    }
    let layers = needs.layers as u64;
    let fitting = (left.saturating_sub(kv_bytes) as f64 / (weights as f64 / layers.max(1) as f64)) as u64;
    if (1..layers).contains(&fitting) {
        advice.push(format!(
            "fewer layers (--hf-overrides '{{\"num_hidden_layers\":{fitting}}}')"
        ));
    }
    if layout.kv.pages > 0 {
        advice.push(
            "a smaller KV cache (--kv-cache-memory-bytes, --kv-cache-dtype fp8_e4m3, --max-model-len)".into(),
        );
    }
    if memory.ours > (1 << 30) {
        advice.push("smaller steps (--max-num-batched-tokens, --max-num-seqs)".into());
    }
    if memory.free < usable {
        advice.push("a device that nobody else uses".into());
    }
    let problem = format!(
        "out of memory: {} of weights (every rank's {}, experts {} with {workers} workers) and {} of KV cache do not fit into \
         the {} that are left of {} usable beside the workspace of {}; what would fit: {}",
        Size(weights),
        Size(needs.replicated),
        Size(needs.share(workers)),
        Size(kv_bytes),
        Size(left),
        Size(usable),
        Size(memory.ours),
        advice.join(", or ")
    );
    WorkerError::config("gpu-memory-utilization", config.gpu_memory_utilization, problem)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use conclave_kernels::cpu::CpuBackend;

    use super::*;
    use crate::config::LoadFormat;

    const H100: u64 = 85_520_809_984;
    const H200: u64 = 150_121_545_728;

    /// MiniMax-M2.7 in INT4 on a device of `total` bytes.
    fn divided(total: u64, change: impl FnOnce(&mut WorkerConfig)) -> Result<Layout> {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/minimax-m2/full-size/awq");
        let mut config = WorkerConfig::new("", &directory);
        config.load_format = LoadFormat::Dummy { seed: 0 };
        change(&mut config);
        let source = WeightSource::dummy(&directory, None, 0, 1)?;
        let mut layout = Layout::new(&config, &source, None)?;
        let limits = conclave_kernels::backend::Limits {
            max_tokens: 1,
            max_logit_rows: 1,
            max_runs: 1,
            max_pages_per_run: 1,
            max_expert_rows: 1,
            page_tokens: 16,
        };
        // Any device gives sizes; this one counts what a checkpoint stores.
        let device = CpuBackend::new(limits, 1, None).map_err(ModelError::from)?;
        let needs = Needs::of(&device, &source, &config);
        let memory = DeviceMemory {
            free: total - (3 << 30),
            total,
            ours: 2 << 30,
        };
        divide(memory, &needs, &config, &source, &mut layout)?;
        Ok(layout)
    }

    fn tokens(layout: &Layout) -> usize {
        layout.kv.pages * layout.kv.page_tokens
    }

    #[test]
    fn what_the_weights_leave_is_for_keys_and_values() {
        let layout = divided(H200, |_| ()).unwrap();
        assert!((20_000..60_000).contains(&tokens(&layout)), "{}", tokens(&layout));
        assert_eq!(layout.slots.kv_pages, layout.kv.pages);
        let fp8 = divided(H200, |config| {
            config.kv_cache_dtype = conclave_kernels::backend::KvDtype::Fp8E4m3;
        });
        assert!(tokens(&fp8.unwrap()).abs_diff(2 * tokens(&layout)) <= 32);
        let more = divided(H200, |config| config.gpu_memory_utilization = 0.97).unwrap();
        assert!(tokens(&more) > tokens(&layout) + 20_000);
        // The router may give it all experts, and no more than fit.
        let device = layout.device.as_ref().unwrap();
        assert_eq!(device.workers, 1);
        assert!(layout.expert_capacity.unwrap() >= 108 << 30);
    }

    #[test]
    fn one_of_several_workers_may_be_lost_if_the_rest_holds_the_longest_sequence() {
        let short = divided(H200, |config| {
            config.expected_workers = 2;
            config.max_model_len = Some(8192);
        });
        assert_eq!(short.unwrap().device.unwrap().workers, 1);
        let long = divided(H200, |config| config.expected_workers = 2).unwrap();
        assert_eq!(long.device.as_ref().unwrap().workers, 2);
        assert!(tokens(&long) > 200_000);
    }

    #[test]
    fn what_does_not_fit_is_told_with_what_would() {
        let error = divided(H100, |_| ()).unwrap_err().to_string();
        for part in [
            "out of memory",
            "--workers 2",
            "num_hidden_layers\":3",
            "KV cache",
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
        let error = divided(H200, |config| config.kv_pages = Some(10_000)).unwrap_err();
        assert!(error.to_string().contains("--kv-cache-dtype fp8_e4m3"), "{error}");
        divided(H100, |config| config.expected_workers = 2).unwrap();
    }
}
