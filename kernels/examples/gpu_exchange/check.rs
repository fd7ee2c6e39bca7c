//! The contract of an exchange: results for random and extreme routings, repeated epochs, and every wait ended by its
//! deadline or by abort when a rank is missing before, inside or after an exchange.

use std::time::{Duration, Instant};

use conclave_kernels::backend::KernelError;
use conclave_kernels::cuda::exchange::station::{Family, StationGraph, Until};
use conclave_kernels::cuda::exchange::{ExchangeShape, FaultReason, Wire};

use crate::cases::{Holding, Routing, Tokens, compare, placement};
use crate::rank::Rank;

const PATIENT: Duration = Duration::from_secs(5);

/// One way of carrying rows, and how far results may be from exact ones.
struct Mode {
    name: &'static str,
    family: Family,
    exact: bool,
    deterministic: bool,
    wire: Wire,
    tolerance: f64,
}

const MODES: [Mode; 6] = [
    Mode {
        name: "few, per slot",
        family: Family::Few,
        exact: true,
        deterministic: true,
        wire: Wire::Bf16,
        tolerance: 0.0,
    },
    Mode {
        name: "few, f32",
        family: Family::Few,
        exact: true,
        deterministic: false,
        wire: Wire::Bf16,
        tolerance: 0.0,
    },
    Mode {
        name: "few, bf16",
        family: Family::Few,
        exact: false,
        deterministic: false,
        wire: Wire::Bf16,
        tolerance: 6e-3,
    },
    Mode {
        name: "many, bf16",
        family: Family::Many,
        exact: false,
        deterministic: false,
        wire: Wire::Bf16,
        tolerance: 6e-3,
    },
    Mode {
        name: "many, in halves, bf16",
        family: Family::Halves,
        exact: false,
        deterministic: false,
        wire: Wire::Bf16,
        tolerance: 6e-3,
    },
    Mode {
        name: "many, fp8",
        family: Family::Many,
        exact: false,
        deterministic: false,
        wire: Wire::Fp8,
        tolerance: 4e-2,
    },
];

/// (hidden, top-k, experts).
const SIZES: [(usize, usize, usize); 4] = [(64, 2, 16), (3072, 8, 256), (200, 5, 33), (1000, 1, 64)];

pub fn check(rank: &mut Rank) -> usize {
    let mut failed = 0;
    for mode in &MODES {
        if !mode.name.contains(&rank.options.only) || !rank.offers(mode.family) {
            continue;
        }
        let (mut cases, began, connecting) = (0, Instant::now(), rank.connecting);
        for sizes in SIZES {
            for holding in [Holding::Even, Holding::Uneven, Holding::Replicas] {
                failed += routings(rank, mode, sizes, holding, &mut cases);
            }
        }
        rank.say(&format!(
            "ok       {}: {cases} cases in {:.1?}, {:.1?} of it for epochs",
            mode.name,
            began.elapsed(),
            rank.connecting - connecting
        ));
    }
    if "faults".contains(&rank.options.only) && rank.ranks > 1 {
        failed += faults(rank);
        if !rank.options.nccl {
            failed += forged(rank);
        }
    }
    // Counted once for all ranks.
    if rank.rank == 0 { failed } else { 0 }
}

fn shape(rank: &Rank, mode: &Mode, (hidden, top_k, _): (usize, usize, usize)) -> ExchangeShape {
    ExchangeShape {
        exact: mode.exact,
        deterministic: mode.deterministic,
        wire: mode.wire,
        // More than the blocks that add results sum ahead of what comes.
        many_tokens: if mode.family == Family::Few { 0 } else { 896 },
        ..ExchangeShape::new(rank.ranks, hidden, top_k, 0, mode.deterministic)
    }
}

/// Tokens of a rank: (rank, last rank, some tokens, capacity).
type Count = fn(usize, usize, usize, usize) -> usize;

/// All routings of one epoch. Returns the failures, the same on every rank.
fn routings(
    rank: &mut Rank,
    mode: &Mode,
    sizes: (usize, usize, usize),
    holding: Holding,
    cases: &mut usize,
) -> usize {
    let shape = shape(rank, mode, sizes);
    let placement = placement(holding, sizes.2, rank.ranks);
    rank.renew(shape, &placement, PATIENT);
    let capacity = match mode.family {
        Family::Few => shape.few_tokens,
        Family::Many | Family::Halves => shape.many_tokens,
    };
    let last = rank.ranks - 1;
    let some = (capacity / 3).max(1);
    let counts: [(&str, Count, Routing); 8] = [
        ("one token each", |_, _, _, _| 1, Routing::Uniform),
        ("some", |r, _, some, _| some + r % 3, Routing::Uniform),
        (
            "only the last rank has tokens",
            |r, last, some, _| if r == last { some } else { 0 },
            Routing::Uniform,
        ),
        (
            "the first rank has none",
            |r, _, some, _| if r == 0 { 0 } else { some },
            Routing::Uniform,
        ),
        ("nobody has any", |_, _, _, _| 0, Routing::Uniform),
        ("all to one expert", |_, _, some, _| some, Routing::OneExpert(7)),
        ("all at capacity", |_, _, _, capacity| capacity, Routing::Uniform),
        (
            "all at capacity to the first rank",
            |_, _, _, capacity| capacity,
            Routing::FirstRank,
        ),
    ];
    let mut failed = 0;
    for (case, (name, count, routing)) in counts.into_iter().enumerate() {
        let count = count(rank.rank, last, some, capacity).min(capacity);
        let seed = (rank.rank * 1000 + case) as u64 + sizes.0 as u64 * 77;
        let tokens = Tokens::new(seed, count, sizes, routing, rank.ranks);
        rank.set_tokens(&tokens, mode.family);
        rank.station.set_hidden(&tokens.state).unwrap();
        // Three in a graph, twice, and one without.
        if mode.family == Family::Halves {
            for _ in 0..6 {
                rank.station.queue(mode.family, 0, Until::All).unwrap();
            }
        } else {
            let graph = rank.station.record(mode.family, 3, Until::All).unwrap();
            // Making and ending a graph may wait for kernels of other threads.
            rank.meet();
            rank.station.launch(&graph).unwrap();
            rank.station.launch(&graph).unwrap();
        }
        rank.station.queue(mode.family, 0, Until::All).unwrap();
        let state = rank.station.hidden().unwrap();
        let owners = &placement.layers[0].owners;
        let owner = |expert: u32| owners[expert as usize][0];
        let by_owner = !mode.deterministic && holding != Holding::Replicas;
        let expected = tokens.expected(7, by_owner.then_some(&owner as &dyn Fn(u32) -> u32));
        let (error, different, first) = compare(&state, &expected);
        let tolerance = match holding {
            // Which replica computes a slot decides the order of the sum.
            Holding::Replicas if !mode.deterministic => mode.tolerance.max(1e-6),
            _ => mode.tolerance,
        };
        let (worst, who) = rank.worst(error);
        *cases += 1;
        if let Some(fault) = rank.station.control().fault() {
            println!(
                "FAILED   {} {sizes:?} {holding:?} {name}: rank {}: {fault:?}",
                mode.name, rank.rank
            );
        }
        if worst > tolerance {
            failed += 1;
            if rank.rank == who {
                let at = first.min(state.len().saturating_sub(1));
                println!(
                    "FAILED   {} {sizes:?} {holding:?} {name}: error {worst:.1e} on rank {who}, {different} of {} values differ, \
                     large from token {} value {}: {:?} for {:?}",
                    mode.name,
                    state.len(),
                    at / sizes.0,
                    at % sizes.0,
                    &state[at..state.len().min(at + 4)],
                    &expected[at..state.len().min(at + 4)],
                );
            }
        }
    }
    failed
}

/// The last rank announces more tokens than its places: nobody believes it.
fn forged(rank: &mut Rank) -> usize {
    const SIZES: (usize, usize, usize) = (200, 5, 33);
    let (placement, shape) = (
        placement(Holding::Even, SIZES.2, rank.ranks),
        shape(rank, &MODES[0], SIZES),
    );
    rank.connect(shape, &placement, PATIENT);
    let tokens = Tokens::new(rank.rank as u64, 3, SIZES, Routing::Uniform, rank.ranks);
    rank.set_tokens(&tokens, Family::Few);
    rank.station.set_hidden(&tokens.state).unwrap();
    let forger = rank.ranks - 1;
    if rank.rank == forger {
        for peer in 0..forger {
            let too_many = shape.few_tokens as u32 + 1;
            rank.station.forge_count(peer, rank.epoch(), too_many).unwrap();
        }
    }
    rank.meet();
    let mut wrong = "";
    if rank.rank != forger {
        rank.station.queue(Family::Few, 0, Until::All).unwrap();
        let untouched = rank.station.hidden().unwrap() == tokens.state;
        let fault = rank.station.control().fault();
        let right =
            fault.is_some_and(|fault| fault.reason == FaultReason::Count && fault.peer as usize == forger);
        if !right || !untouched {
            println!(
                "FAILED   a forged count: rank {}: {fault:?}, state untouched: {untouched}",
                rank.rank
            );
            wrong = "wrong";
        }
    }
    let failed = rank.gather(wrong).iter().any(|line| !line.is_empty());
    if !failed {
        rank.say("ok       a forged count");
    }
    usize::from(failed)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Before,
    Inside,
    After,
}

/// Of `faults`.
const TIMEOUT: Duration = Duration::from_millis(150);

/// Exchanges that the last rank does not take part in to their end; empty, or what was wrong.
fn survive(
    rank: &mut Rank,
    family: Family,
    graph: Option<&StationGraph>,
    phase: Phase,
    abort: bool,
) -> String {
    let dead = rank.ranks - 1;
    let control = rank.station.control();
    let start = Instant::now();
    let ending = abort.then(|| {
        let control = control.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            control.abort();
        })
    });
    let queued = match graph {
        Some(graph) => rank.station.launch(graph),
        None => (0..4).try_for_each(|_| rank.station.queue(family, 0, Until::All)),
    };
    // The library may notice while the host still queues: to a worker that is a failed step like any other, which it aborts.
    let told = match queued {
        Err(KernelError::Exchange { peer, .. }) if rank.options.nccl => {
            control.abort();
            Some(peer as usize)
        }
        queued => {
            queued.unwrap();
            None
        }
    };
    let outcome = rank.station.wait();
    let took = start.elapsed();
    if let Some(ending) = ending {
        ending.join().unwrap();
    }
    let limit = match abort {
        true => Duration::from_millis(120),
        false => TIMEOUT + Duration::from_millis(250),
    };
    let fault = control.fault();
    let reason = match (abort, phase) {
        (true, _) => FaultReason::Aborted,
        (false, _) if rank.options.nccl => FaultReason::Deadline,
        (false, Phase::Inside) => FaultReason::CombineDeadline,
        _ => FaultReason::DispatchDeadline,
    };
    // Of more than two ranks a survivor may have waited for one that gave up first.
    let right = match told {
        Some(peer) => peer == dead || rank.ranks > 2,
        None => fault.is_some_and(|fault| {
            fault.reason == reason && (fault.peer as usize == dead || rank.ranks > 2)
                || (rank.ranks > 2 && fault.reason == FaultReason::DispatchDeadline)
        }),
    };
    if outcome.is_ok() && took <= limit && right {
        return String::new();
    }
    format!(
        "rank {}: {outcome:?} after {took:?}, {fault:?}, queueing told of {told:?}",
        rank.rank
    )
}

/// The last rank stops before, inside or after an exchange; the others wait until their deadline or abort.
fn faults(rank: &mut Rank) -> usize {
    const SIZES: (usize, usize, usize) = (3072, 8, 256);
    let dead = rank.ranks - 1;
    let mut failed = 0;
    for mode in [&MODES[0], &MODES[2], &MODES[3], &MODES[4]] {
        if !rank.offers(mode.family) {
            continue;
        }
        let (began, connecting) = (Instant::now(), rank.connecting);
        for phase in [Phase::Before, Phase::Inside, Phase::After] {
            for abort in [false, true] {
                let placement = placement(Holding::Even, SIZES.2, rank.ranks);
                rank.renew(
                    shape(rank, mode, SIZES),
                    &placement,
                    if abort { PATIENT } else { TIMEOUT },
                );
                let tokens = Tokens::new(rank.rank as u64, 16, SIZES, Routing::Uniform, rank.ranks);
                rank.set_tokens(&tokens, mode.family);
                rank.station.set_hidden(&tokens.state).unwrap();
                let graph = match mode.family {
                    Family::Halves => None,
                    family => Some(rank.station.record(family, 4, Until::All).unwrap()),
                };
                rank.meet();
                let wrong = if rank.rank == dead {
                    match phase {
                        Phase::Before => {}
                        Phase::Inside => rank.station.queue(mode.family, 0, Until::Dispatch).unwrap(),
                        Phase::After => rank.station.queue(mode.family, 0, Until::All).unwrap(),
                    }
                    rank.station.wait().unwrap();
                    String::new()
                } else {
                    survive(rank, mode.family, graph.as_ref(), phase, abort)
                };
                drop(graph);
                let all = rank.gather(&wrong);
                let wrong: Vec<&String> = all.iter().filter(|line| !line.is_empty()).collect();
                let what = format!(
                    "{}: a rank stops {phase:?}, {}",
                    mode.name,
                    if abort { "abort" } else { "deadline" }
                );
                // The devices and the mappings are as good as before.
                rank.connect(shape(rank, mode, SIZES), &placement, PATIENT);
                rank.set_tokens(&tokens, mode.family);
                rank.station.set_hidden(&tokens.state).unwrap();
                rank.station.queue(mode.family, 0, Until::All).unwrap();
                let state = rank.station.hidden().unwrap();
                let (error, _) = rank.worst(compare(&state, &tokens.expected(1, None)).0);
                if !wrong.is_empty() || error > mode.tolerance.max(1e-6) {
                    failed += 1;
                    rank.say(&format!(
                        "FAILED   {what}: {wrong:?}; afterwards error {error:.1e}"
                    ));
                } else {
                    rank.say(&format!("ok       {what}"));
                }
            }
        }
        rank.say(&format!(
            "         in {:.1?}, {:.1?} of it for epochs",
            began.elapsed(),
            rank.connecting - connecting
        ));
    }
    failed
}
