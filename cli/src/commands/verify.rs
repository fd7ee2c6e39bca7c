//! `conclave verify`: what the workers' code computes, against a reference file.

use anyhow::{Result, bail};
use conclave_kernels::backend::KvDtype;
use conclave_worker::device::DeviceKind;
use conclave_worker::verify::{Comparison, VerifyConfig, verify};

use crate::settings::VerifySettings;
use crate::{model_path, parts};

pub fn run(settings: &VerifySettings) -> Result<()> {
    let found = model_path::find(&settings.model)?;
    parts::check_quantization(&settings.model, &found)?;
    let device = DeviceKind::choose(&settings.device)?;
    let exact = match device {
        DeviceKind::Cpu => KvDtype::F32,
        DeviceKind::Cuda(_) => KvDtype::Bf16,
    };
    let config = VerifyConfig {
        model_dir: found.path,
        hf_overrides: settings.model.hf_overrides.clone(),
        reference: settings.reference.clone(),
        workers: settings.workers,
        threads: settings.threads,
        kv_dtype: settings.kv_cache_dtype.map_or(exact, parts::kv_dtype),
        prefill_chunk: settings.prefill_chunk,
        device,
        deterministic: settings.deterministic,
    };
    let comparisons = verify(&config)?;
    for (path, comparison) in &comparisons {
        print(&found.name, settings.workers, device, path, comparison);
    }
    if !comparisons.iter().all(|(_, comparison)| comparison.passes()) {
        bail!("the model does not agree with the reference");
    }
    Ok(())
}

fn print(name: &str, workers: u32, device: DeviceKind, path: &str, found: &Comparison) {
    let verdict = if found.passes() { "agrees" } else { "DIFFERS" };
    let where_ = match device {
        DeviceKind::Cpu => String::new(),
        DeviceKind::Cuda(ordinal) => format!(", cuda:{ordinal}, {path}"),
    };
    println!("{name} on {workers} workers{where_}: {verdict}");
    println!(
        "  logits, relative 2-norm error        {:.3e}",
        found.logits_relative_error
    );
    println!(
        "  of the worst position                {:.3e}",
        found.worst_position_relative_error
    );
    println!(
        "  positions with the same best token   {} of {}",
        found.argmax_equal, found.positions
    );
    println!(
        "  greedy tokens equal                  {} of {}",
        found.greedy_equal, found.greedy_tokens
    );
    for miss in &found.misses {
        println!(
            "    token {} is {}, expected {}, by a margin of {:.2e} in its logit: {}",
            miss.index,
            miss.found,
            miss.expected,
            miss.margin,
            if miss.is_tie { "a tie" } else { "no tie" }
        );
    }
    if let Some(error) = found.router_max_error {
        println!("  router logits, largest difference    {error:.3e}");
    }
}
