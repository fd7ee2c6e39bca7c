//! The exchange of experts between ranks, without a model: needs one GPU or more; exit status 1 if anything is wrong.
//!
//!     gpu_exchange check [--ranks 1,2,4] [--gpus N] [--processes]   results and faults against the host's
//!     gpu_exchange bench [--ranks 2] [--gpus N] [--processes]       time of dispatch and combine per layer
//!                       [--trace] [--skew-us N]                         when blocks do what; one rank always launches late
//!     gpu_exchange model [--ranks 2] [--gpus N] [--data DIR]         tiny checkpoints, whole steps, against one rank
//!     gpu_exchange vanish [--ranks 2] [--gpus N] [--times N]         a rank stops amid recorded exchanges, again and again
//!     gpu_exchange kill  [--ranks 4] [--gpus N] [--times N] [--timeout-ms N] [--abort]
//!
//! All of them with `--transport ipc` (the default) or `--transport nccl`, which wants a GPU for every rank.
//! Ranks are threads of this process, or processes with `--processes` (`kill` always: it kills them), rank r on device
//! r modulo `--gpus`. Several ranks a device as processes need MPS to be fast.

#![expect(clippy::unwrap_used, reason = "a check fails where it stands")]

mod bench;
mod cases;
mod check;
#[path = "../../tests/common/mod.rs"]
mod common;
mod faults;
mod kill;
mod late;
mod link;
mod made;
mod model;
mod rank;
mod ties;
mod vanish;

use std::process::exit;

use conclave_kernels::cuda::exchange::nccl;

#[derive(Clone, Debug)]
pub struct Options {
    pub mode: String,
    pub ranks: Vec<usize>,
    pub gpus: usize,
    pub processes: bool,
    pub times: usize,
    pub timeout_ms: u64,
    pub abort: bool,
    pub nccl: bool,
    /// Only what contains this.
    pub only: String,
    /// `bench`: print when blocks do what.
    pub trace: bool,
    /// `bench`: microseconds by which the last rank launches every graph later than the others.
    pub skew_us: u64,
    /// Of the tiny checkpoints.
    pub data: String,
    /// Of a child: its rank.
    pub child: Option<usize>,
}

fn options() -> Options {
    let mut arguments = std::env::args().skip(1);
    let mut options = Options {
        mode: arguments.next().unwrap_or_default(),
        ranks: vec![2],
        gpus: 1,
        processes: false,
        times: 10,
        timeout_ms: 500,
        abort: false,
        nccl: false,
        only: String::new(),
        trace: false,
        skew_us: 0,
        data: "tests/data/minimax-m2".into(),
        child: None,
    };
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap();
        match argument.as_str() {
            "--ranks" => options.ranks = value().split(',').map(|n| n.parse().unwrap()).collect(),
            "--gpus" => options.gpus = value().parse().unwrap(),
            "--processes" => options.processes = true,
            "--times" => options.times = value().parse().unwrap(),
            "--timeout-ms" => options.timeout_ms = value().parse().unwrap(),
            "--abort" => options.abort = true,
            "--trace" => options.trace = true,
            "--skew-us" => options.skew_us = value().parse().unwrap(),
            "--transport" => {
                options.nccl = match value().as_str() {
                    "ipc" => false,
                    "nccl" => true,
                    other => panic!("--transport is {other}: ipc or nccl"),
                }
            }
            "--data" => options.data = value(),
            "--only" => options.only = value(),
            "--child" => options.child = Some(value().parse().unwrap()),
            other => panic!("unknown argument {other}"),
        }
    }
    options
}

/// As a worker does at its start. NCCL connects every pair of ranks by 32 channels, and `check` and `vanish` make dozens of
/// epochs: what they look at does not depend on the number, so one will do unless the environment says otherwise.
fn set_environment(options: &Options) {
    const CHANNELS: &str = "NCCL_MAX_P2P_NCHANNELS";
    let makes_many_epochs = matches!(options.mode.as_str(), "check" | "vanish");
    // SAFETY: no other thread has been started yet.
    unsafe {
        nccl::set_environment();
        if makes_many_epochs && std::env::var_os(CHANNELS).is_none() {
            std::env::set_var(CHANNELS, "1");
        }
    }
}

fn main() {
    let options = options();
    set_environment(&options);
    let run: rank::Work = match options.mode.as_str() {
        "check" => check::check,
        "bench" => bench::bench,
        "model" => model::model,
        "vanish" => vanish::vanish,
        "kill" => match options.child {
            Some(_) => return kill::child(&options),
            None => exit(kill::kill(&options)),
        },
        other => panic!("check, bench, model, vanish or kill, not {other:?}"),
    };
    if options.child.is_some() {
        exit(link::child(&options, run));
    }
    let mut failed = 0;
    for &ranks in &options.ranks {
        let how = if options.processes { "processes" } else { "threads" };
        println!(
            "== {} with {ranks} ranks as {how} on {} GPUs",
            options.mode, options.gpus
        );
        failed += match options.processes {
            true => link::processes(&options, ranks),
            false => link::threads(&options, ranks, run),
        };
    }
    exit(i32::from(failed > 0));
}
