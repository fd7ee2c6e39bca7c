//! Every op of the CUDA backend against the CPU backend, whole steps against op by op, and the tiny reference
//! checkpoints: `gpu_check [--data tests/data/minimax-m2] [--only PART[,PART…]] [--small]`. Needs a GPU; exit status 1 if
//! anything differs. `--small` keeps to every kernel's smallest shapes, for compute-sanitizer.
//!
//! Inputs are random, outputs are filled with NaN before each op, sizes are odd. Errors are relative 2-norms.

#![expect(clippy::unwrap_used, reason = "a check fails where it stands")]

#[path = "../../tests/common/mod.rs"]
mod common;
mod divergence;
mod forward;
mod host;
mod ops;
mod quantised;
mod report;
mod tiny;

use conclave_kernels::backend::{Backend, Limits};
use conclave_kernels::cpu::CpuBackend;
use conclave_kernels::cuda::CudaBackend;
use report::Report;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (mut data, mut only) = ("tests/data/minimax-m2".to_owned(), None::<String>);
    let mut report = Report::default();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--data" => data = arguments.next().unwrap(),
            "--only" => only = arguments.next(),
            "--small" => report.small = true,
            other => panic!("unknown argument {other}"),
        }
    }
    let wanted = |name: &str| {
        let parts = only.as_deref();
        parts.is_none_or(|parts| parts.split(',').any(|part| name.contains(part)))
    };
    type Check = fn(&mut Report);
    let checks: [(&str, Check); 18] = [
        ("loading", ops::loading::check),
        ("head", ops::linear::head),
        ("linear_add", ops::linear::linear_add),
        ("qkv_attention", ops::attention::qkv_attention),
        ("route", ops::experts::route),
        ("experts", ops::experts::experts),
        ("combine", ops::experts::combine),
        ("fold", ops::fold::check),
        ("sample_drawn", ops::sample::drawn),
        ("sample_greedy", ops::sample::greedy),
        ("sample_queued", ops::sample::queued),
        ("sample_kept", ops::sample::kept::check),
        ("forward", forward::forward),
        ("fp8_activations", quantised::check),
        ("alone", forward::alone),
        ("pipeline", forward::pipeline),
        ("rows", forward::rows),
        ("divergence", divergence::check),
    ];
    for (name, check) in checks {
        if wanted(name) {
            guarded(name, &mut report, check);
        }
    }
    if wanted("tiny") {
        guarded("tiny", &mut report, |report| tiny::references(report, &data));
    }
    std::process::exit(report.finish());
}

/// A panic ends one group of checks, not all of them.
fn guarded(name: &str, report: &mut Report, check: impl FnOnce(&mut Report)) {
    println!("== {name}");
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(report)));
    if outcome.is_err() {
        report.broken(name);
    }
}

/// Both backends under the same limits.
fn pair(limits: &Limits) -> (Box<dyn Backend>, Box<dyn Backend>) {
    let cpu = CpuBackend::new(
        limits.clone(),
        std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(16),
        None,
    )
    .unwrap();
    let gpu = CudaBackend::new(limits.clone(), 0).unwrap();
    (Box::new(cpu), Box::new(gpu))
}
