//! `conclave verify`: what the workers' code computes, against a reference file.

use anyhow::{Result, bail};
use conclave_kernels::backend::KvDtype;
use conclave_worker::verify::{Comparison, VerifyConfig, verify};

use crate::settings::VerifySettings;
use crate::{model_path, parts};

pub fn run(settings: &VerifySettings) -> Result<()> {
    let found = model_path::find(&settings.model)?;
    parts::check_quantization(&settings.model, &found)?;
    let config = VerifyConfig {
        model_dir: found.path,
        hf_overrides: settings.model.hf_overrides.clone(),
        reference: settings.reference.clone(),
        workers: settings.workers,
        threads: settings.threads,
        kv_dtype: settings.kv_cache_dtype.map_or(KvDtype::F32, parts::kv_dtype),
        prefill_chunk: settings.prefill_chunk,
    };
    let comparison = verify(&config)?;
    print(&found.name, settings.workers, &comparison);
    if !comparison.passes() {
        bail!("the model does not agree with the reference");
    }
    Ok(())
}

fn print(name: &str, workers: u32, found: &Comparison) {
    let verdict = if found.passes() { "agrees" } else { "DIFFERS" };
    println!("{name} on {workers} workers: {verdict}");
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
    if let Some(error) = found.router_max_error {
        println!("  router logits, largest difference    {error:.3e}");
    }
}
