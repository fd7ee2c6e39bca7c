//! The command line of a worker child: the settings of `serve` that concern it.

use std::net::SocketAddr;

use clap::ValueEnum;

use super::places::Places;
use crate::model_path::FoundModel;
use crate::settings::ServeSettings;

pub fn worker(
    settings: &ServeSettings,
    found: &FoundModel,
    router: SocketAddr,
    rank: u32,
    places: &Places,
) -> Vec<String> {
    let workers = places.workers;
    let (model, engine, device) = (&settings.model, &settings.engine, &settings.device);
    let mut arguments = vec!["--child".to_owned()];
    let mut give = |flag: &str, value: String| arguments.push(format!("--{flag}={value}"));
    give("model", found.path.display().to_string());
    give("router", router.to_string());
    give("rank", rank.to_string());
    give("load-format", name_of(&model.load_format));
    give("dummy-seed", model.dummy_seed.to_string());
    if let Some(overrides) = &model.hf_overrides {
        give("hf-overrides", overrides.to_string());
    }
    give("block-size", engine.block_size.to_string());
    give("max-num-seqs", engine.max_num_seqs.to_string());
    give(
        "max-num-batched-tokens",
        engine.max_num_batched_tokens.to_string(),
    );
    if let Some(length) = engine.max_model_len {
        give("max-model-len", length.to_string());
    }
    give("device", places.device_of(rank));
    give("expected-workers", workers.to_string());
    give("threads", threads(device.threads, workers).to_string());
    give("kv-cache-dtype", name_of(&device.kv_cache_dtype));
    if let Some(bytes) = device.kv_cache_memory_bytes {
        give("kv-cache-memory-bytes", bytes.to_string());
    }
    give(
        "gpu-memory-utilization",
        (device.gpu_memory_utilization / f64::from(places.workers_per_gpu())).to_string(),
    );
    give("deterministic", device.deterministic.to_string());
    give("fp8-activations", name_of(&device.fp8_activations));
    give(
        "drain-timeout",
        format!("{}ms", settings.drain.drain_timeout.as_millis()),
    );
    give("log-format", name_of(&settings.log.log_format));
    give("log", settings.log.log.clone());
    if let Some(endpoint) = &settings.log.otlp_endpoint {
        give("otlp-endpoint", endpoint.clone());
    }
    arguments
}

/// A value as its flag spells it.
pub fn name_of(value: &impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map(|value| value.get_name().to_owned())
        .unwrap_or_default()
}

/// The machine's cores, shared.
fn threads(asked: usize, workers: u32) -> usize {
    match asked {
        0 => std::thread::available_parallelism().map_or(1, |cores| (cores.get() / workers as usize).max(1)),
        threads => threads,
    }
}

#[cfg(test)]
mod tests {
    use super::threads;

    #[test]
    fn cores_are_shared() {
        assert_eq!(threads(3, 2), 3);
        assert_eq!(threads(0, u32::MAX), 1);
    }
}
