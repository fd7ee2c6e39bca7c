//! NCCL alone, one process a GPU: joining, pairs of exchanges there and back, and the end of a communicator whose peer was
//! killed while a recorded graph waited for it.
//!
//! `gpu_nccl [--ranks N] [--hidden 3072] [--tokens 1,8,32,128,512,4096]`
//!
//! Each rank sends `tokens` rows of BF16 to every rank: what `docs/benchmarks/peers/torch_all_to_all.py` does.

#![expect(clippy::unwrap_used, reason = "a benchmark fails where it stands")]

use std::process::{Child, Command};
use std::time::{Duration, Instant};

use conclave_kernels::cuda::exchange::nccl::measure::Bench;
use conclave_kernels::cuda::exchange::nccl::{ID_BYTES, Nccl, UniqueId, set_environment};

/// How long a survivor lets its graph wait for the killed one.
const PATIENCE: Duration = Duration::from_millis(300);
/// Tokens of the exchange in which a rank is killed.
const HANG_TOKENS: usize = 8;

#[derive(Clone)]
struct Arguments {
    ranks: u32,
    hidden: usize,
    tokens: Vec<usize>,
    /// Of a child: what it does, its rank and the ids of its communicators.
    role: String,
    rank: u32,
    ids: Vec<UniqueId>,
}

fn main() {
    let arguments = arguments();
    // SAFETY: no other thread has been started yet.
    unsafe { set_environment() };
    match arguments.role.as_str() {
        "time" => time(&arguments, false),
        "time-blocking" => time(&arguments, true),
        "hang" => hang(&arguments),
        _ => parent(&arguments),
    }
}

fn parent(arguments: &Arguments) {
    let nccl = Nccl::open().unwrap_or_else(|error| panic!("{error}"));
    println!("nccl {}, {} ranks", nccl.version, arguments.ranks);
    for role in ["time", "time-blocking"] {
        println!("{role}: tokens a rank | bytes to each rank | recorded us | queued us | host us a pair");
        finish(children(arguments, role, &[nccl.unique_id().unwrap()]));
    }
    if arguments.ranks > 1 {
        let ids = [nccl.unique_id().unwrap(), nccl.unique_id().unwrap()];
        finish(children(arguments, "hang", &ids));
    }
}

fn children(arguments: &Arguments, role: &str, ids: &[UniqueId]) -> Vec<Child> {
    let ids: Vec<String> = ids
        .iter()
        .map(|id| id.0.iter().map(|byte| format!("{byte:02x}")).collect())
        .collect();
    let tokens: Vec<String> = arguments.tokens.iter().map(ToString::to_string).collect();
    let child = |rank: u32| {
        Command::new(std::env::current_exe().unwrap())
            .args([
                "--role",
                role,
                "--rank",
                &rank.to_string(),
                "--ids",
                &ids.join(","),
            ])
            .args([
                "--ranks",
                &arguments.ranks.to_string(),
                "--tokens",
                &tokens.join(","),
            ])
            .args(["--hidden", &arguments.hidden.to_string()])
            .spawn()
            .unwrap()
    };
    (0..arguments.ranks).map(child).collect()
}

fn finish(children: Vec<Child>) {
    for (rank, mut child) in children.into_iter().enumerate() {
        let status = child.wait().unwrap();
        if !status.success() {
            println!("rank {rank}: {status}");
        }
    }
}

fn bench(arguments: &Arguments, blocking: bool) -> Bench {
    let most = arguments.tokens.iter().max().unwrap().max(&HANG_TOKENS);
    let (rank, bytes) = (arguments.rank, most * arguments.hidden * 2);
    Bench::new(
        rank as i32,
        arguments.ids[0],
        (rank, arguments.ranks),
        bytes,
        blocking,
    )
    .unwrap()
}

fn time(arguments: &Arguments, blocking: bool) {
    let bench = bench(arguments, blocking);
    if arguments.rank == 0 {
        println!("joined in {:.1} ms", bench.joined.as_secs_f64() * 1e3);
    }
    for &tokens in &arguments.tokens {
        let bytes = tokens * arguments.hidden * 2;
        let times = bench.time(bytes).unwrap();
        if arguments.rank == 0 {
            println!(
                "{tokens:>6} | {bytes:>9} | {:>7.1} | {:>7.1} | {:>7.1}",
                times.recorded_us, times.queued_us, times.host_us
            );
        }
    }
}

/// The last rank is killed; the others have a graph in flight that waits for it.
fn hang(arguments: &Arguments) {
    let Arguments { rank, ranks, .. } = *arguments;
    let first = bench(arguments, false);
    let bytes = HANG_TOKENS * arguments.hidden * 2;
    let graph = first.record(bytes, 4).unwrap();
    first.launch(&graph).unwrap();
    first.wait().unwrap();
    if rank == ranks - 1 {
        // SAFETY: ends this process, as asked.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
    let (freed, whole) = first.hang(&graph, PATIENCE).unwrap();
    let usable = first.usable();
    println!(
        "rank {rank}: stream free {freed:?} after the abort (all freed at once: {whole}), device: {usable:?}"
    );
    // Launched again it must pass, not hang and not fail.
    let begin = Instant::now();
    first.launch(&graph).unwrap();
    let again = first.wait();
    println!(
        "rank {rank}: the same graph again: {again:?} after {:?}",
        begin.elapsed()
    );
    drop(graph);
    drop(first);
    let mut next = arguments.clone();
    next.ids.remove(0);
    next.ranks -= 1;
    let begin = Instant::now();
    let second = bench(&next, false);
    println!(
        "rank {rank}: joined the survivors' communicator in {:?} ({:?} with the device)",
        second.joined,
        begin.elapsed()
    );
    let times = second.time(bytes).unwrap();
    println!("rank {rank}: its pair takes {:.1} us recorded", times.recorded_us);
}

fn arguments() -> Arguments {
    let mut found = Arguments {
        ranks: 2,
        hidden: 3072,
        tokens: vec![1, 8, 32, 128, 512, 4096],
        role: String::new(),
        rank: 0,
        ids: Vec::new(),
    };
    let mut list = std::env::args().skip(1);
    while let Some(name) = list.next() {
        let value = list.next().unwrap();
        match name.as_str() {
            "--ranks" => found.ranks = value.parse().unwrap(),
            "--hidden" => found.hidden = value.parse().unwrap(),
            "--tokens" => found.tokens = value.split(',').map(|item| item.parse().unwrap()).collect(),
            "--role" => found.role = value,
            "--rank" => found.rank = value.parse().unwrap(),
            "--ids" => found.ids = value.split(',').map(id).collect(),
            other => panic!("{other} is not an argument"),
        }
    }
    found
}

fn id(text: &str) -> UniqueId {
    let byte = |i: usize| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap();
    UniqueId(std::array::from_fn::<u8, ID_BYTES, _>(byte))
}
