//! Settings to the configurations of router, worker and gateway.
//!
//! Keeps invariant F1 of ARCHITECTURE.md.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use anyhow::{Context, Result, bail};
use conclave_gateway::{GatewayConfig, KeyLimits, Limits, TlsFiles};
use conclave_kernels::backend::KvDtype;
use conclave_router::RouterConfig;
use conclave_worker::{LoadFormat as WorkerLoadFormat, WorkerConfig};

use crate::model_path::FoundModel;
use crate::settings::{
    ClusterSettings, DrainSettings, EngineSettings, GenerationConfig, HttpSettings, KvCacheDtype, LoadFormat,
    ModelSettings, WorkerSettings,
};

/// A host name or address and a port.
pub fn socket_address(field: &str, host: &str, port: u16) -> Result<SocketAddr> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(SocketAddr::new(address, port));
    }
    let mut found = (host, port).to_socket_addrs().with_context(|| {
        format!("{field} is {host:?}: no such host; give an address such as 127.0.0.1 or 0.0.0.0")
    })?;
    found
        .next()
        .with_context(|| format!("{field} is {host:?}: it has no address"))
}

/// The secret, or what to do about its absence.
pub fn cluster_token(token: Option<&String>) -> Result<String> {
    let Some(token) = token else {
        bail!(
            "cluster_token is missing: draw a secret for the cluster, e.g. with `openssl rand -hex 16`, and give it to router \
             and workers as CONCLAVE_CLUSTER_TOKEN"
        );
    };
    Ok(token.clone())
}

/// `--quantization` must name what config.json says.
pub fn check_quantization(settings: &ModelSettings, model: &FoundModel) -> Result<()> {
    let Some(asked) = settings.quantization.as_deref() else {
        return Ok(());
    };
    let config = conclave_plan::config::read(&model.path, settings.hf_overrides.as_ref())?;
    let found = config.quant.as_ref().map_or("none", |quant| quant.method());
    // vLLM names kernels, too.
    let plain = asked.trim_end_matches("_marlin");
    if plain != found {
        bail!(
            "quantization is {asked:?}: the checkpoint's is {found:?}, and nothing is quantised on the fly; leave the flag out, \
             or give a checkpoint of that format"
        );
    }
    Ok(())
}

pub fn router(
    model: &ModelSettings,
    found: &FoundModel,
    engine: &EngineSettings,
    cluster: &ClusterSettings,
    drain: &DrainSettings,
) -> Result<RouterConfig> {
    check_quantization(model, found)?;
    let mut config = RouterConfig::new(found.path.clone());
    config.hf_overrides = model.hf_overrides.clone();
    config.served_model_name = if engine.served_model_name.is_empty() {
        [Some(found.name.clone()), found.short_name.clone()]
            .into_iter()
            .flatten()
            .collect()
    } else {
        engine.served_model_name.clone()
    };
    config.skip_tokenizer_init = engine.skip_tokenizer_init;
    config.chat_template = engine.format.chat_template.clone();
    config.tool_call_parser = engine.format.tool_call_parser.clone();
    config.reasoning_parser = engine.format.reasoning_parser.clone();
    config.use_generation_config = engine.generation_config == GenerationConfig::Auto;
    config.transport = cluster.transport.name().into();
    config.max_model_len = engine.max_model_len;
    config.max_num_seqs = engine.max_num_seqs;
    config.max_num_batched_tokens = engine.max_num_batched_tokens;
    config.block_size = engine.block_size;
    config.enable_prefix_caching = engine.enable_prefix_caching;
    config.max_waiting = engine.max_waiting;
    config.steps_in_flight = engine.steps_in_flight;
    config.heartbeat_timeout = cluster.heartbeat_timeout;
    config.collective_deadline = cluster.collective_deadline;
    config.drain_timeout = drain.drain_timeout;
    config.text_threads = engine.text_threads;
    config.log_prompts = engine.log_prompts;
    Ok(config)
}

pub fn gateway(http: &HttpSettings, drain: &DrainSettings, routers: Vec<String>) -> Result<GatewayConfig> {
    let listen = socket_address("host", &http.host, http.port)?;
    let mut config = GatewayConfig::new(listen, routers);
    config.api_keys = http.api_key.clone();
    config.api_key_file = http.api_key_file.clone();
    config.key_limits = KeyLimits {
        requests_per_minute: http.key_requests_per_minute,
        tokens_per_minute: http.key_tokens_per_minute,
        concurrent: http.key_concurrent,
    };
    config.tls = match (&http.tls_cert, &http.tls_key) {
        (Some(certificate), Some(key)) => Some(TlsFiles {
            certificate: certificate.clone(),
            key: key.clone(),
        }),
        (None, None) => None,
        (Some(_), None) => bail!("tls_key is missing: tls_cert needs the certificate's private key"),
        (None, Some(_)) => bail!("tls_cert is missing: tls_key needs the certificate it belongs to"),
    };
    config.cors_origins = http.allowed_origins.clone();
    config.drain_timeout = drain.drain_timeout;
    config.limits = Limits {
        body_bytes: usize::try_from(http.max_body_bytes).context("max_body_bytes is larger than memory")?,
        connections: http.max_connections,
        request_timeout: http.request_timeout,
        ..Limits::default()
    };
    Ok(config)
}

pub fn worker(settings: &WorkerSettings, found: &FoundModel) -> Result<WorkerConfig> {
    check_quantization(&settings.model, found)?;
    let mut config = WorkerConfig::new(settings.router.clone(), found.path.clone());
    config.cluster_token = cluster_token(settings.cluster_token.as_ref())?;
    config.load_format = match settings.model.load_format {
        LoadFormat::Safetensors => WorkerLoadFormat::Auto,
        LoadFormat::Dummy => WorkerLoadFormat::Dummy {
            seed: settings.model.dummy_seed,
        },
    };
    config.hf_overrides = settings.model.hf_overrides.clone();
    config.device = settings.device.device.clone();
    config.threads = settings.device.threads;
    config.listen = socket_address("peer_host", &settings.peer_host, settings.peer_port)?;
    config.advertise = settings.peer_advertise.clone();
    config.rank = settings.rank;
    config.kv_cache_dtype = kv_dtype(settings.device.kv_cache_dtype);
    config.kv_cache_memory = settings.device.kv_cache_memory_bytes;
    config.gpu_memory_utilization = settings.device.gpu_memory_utilization;
    config.expected_workers = settings.expected_workers;
    config.deterministic = settings.device.deterministic;
    config.fault = settings.device.inject_fault;
    config.fp8_activations = settings.device.fp8_activations.is_on();
    config.page_tokens = settings.block_size;
    config.max_slots = settings.max_num_seqs;
    config.max_batched_tokens = settings.max_num_batched_tokens;
    config.max_model_len = settings.max_model_len;
    config.drain_timeout = settings.drain.drain_timeout;
    Ok(config)
}

pub fn kv_dtype(dtype: KvCacheDtype) -> KvDtype {
    match dtype {
        KvCacheDtype::Bf16 => KvDtype::Bf16,
        KvCacheDtype::Fp8E4m3 => KvDtype::Fp8E4m3,
        KvCacheDtype::Fp8E5m2 => KvDtype::Fp8E5m2,
    }
}
