//! `conclave verify`: what the workers' code computes, against a reference file.

use anyhow::{Result, bail};
use conclave_kernels::backend::KvDtype;
use conclave_worker::device::DeviceKind;
use conclave_worker::model::Modes;
use conclave_worker::verify::{Agreement, Miss, Verified, VerifyConfig, verify};

use crate::settings::VerifySettings;
use crate::{model_path, parts};

pub fn run(settings: &VerifySettings) -> Result<()> {
    let found = model_path::find(&settings.model)?;
    parts::check_quantization(&settings.model, &found)?;
    let devices = DeviceKind::choose_all(&settings.device)?;
    let first = devices[0];
    let exact = match first {
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
        devices,
        modes: Modes {
            deterministic: settings.deterministic,
            fp8_activations: settings.fp8_activations.is_on(),
        },
    };
    let verified = verify(&config)?;
    for one in &verified {
        print(&found.name, settings.workers, first, one);
    }
    if !verified.iter().all(Verified::passes) {
        bail!("the model does not agree with the reference");
    }
    Ok(())
}

fn print(name: &str, workers: u32, device: DeviceKind, verified: &Verified) {
    let verdict = if verified.passes() { "agrees" } else { "DIFFERS" };
    let where_ = match device {
        DeviceKind::Cpu => String::new(),
        DeviceKind::Cuda(ordinal) => format!(", cuda:{ordinal}, {}", verified.way),
    };
    println!("{name} on {workers} workers{where_}: {verdict}");
    let found = &verified.comparison;
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
    if verified.agreement.is_none() {
        print_misses(&found.misses);
    }
    if let Some(error) = found.router_max_error {
        println!("  router logits, largest difference    {error:.3e}");
    }
    if let Some(agreement) = &verified.agreement {
        print_agreement(agreement);
    }
}

fn print_agreement(found: &Agreement) {
    println!(
        "  beside the CPU with the same keys and values that takes the same experts, and what rounding to BF16 does there:"
    );
    println!(
        "  logits, relative 2-norm error        {:.3e}, rounding {:.3e} (at most {:.1e})",
        found.found.logits,
        found.rounding.logits,
        found.logits_bound()
    );
    println!(
        "  router logits of the worst layer     {:.3e}, rounding {:.3e} (at most {:.1e})",
        found.found.router,
        found.rounding.router,
        found.router_bound()
    );
    println!(
        "  choices of experts that it would turn {} of {}",
        found.turned.len(),
        found.choices
    );
    for turned in &found.turned {
        println!(
            "    layer {} position {}: by {:.2e} in its key; within {:.1e} is {}",
            turned.layer,
            turned.position,
            turned.gap,
            turned.bound,
            tie(turned.is_tie())
        );
    }
    println!("  greedy tokens that are not its own   {}", found.misses.len());
    print_misses(&found.misses);
}

fn print_misses(misses: &[Miss]) {
    for miss in misses {
        println!(
            "    token {} is {}, expected {}, by a margin of {:.2e} in its logit: {}",
            miss.index,
            miss.found,
            miss.expected,
            miss.margin,
            tie(miss.is_tie)
        );
    }
}

fn tie(is_tie: bool) -> &'static str {
    if is_tie { "a tie" } else { "no tie" }
}
