//! The contract of an exchange where a rank is at fault: it is missing before, inside or after an exchange, and every wait for it ends by
//! its deadline or by abort; or it announces more than its places hold. The next epoch must work.

use std::time::{Duration, Instant};

use conclave_kernels::backend::KernelError;
use conclave_kernels::cuda::exchange::FaultReason;
use conclave_kernels::cuda::exchange::station::{Family, StationGraph, Until};

use crate::cases::{Holding, Routing, Tokens, compare, placement};
use crate::check::{MODES, PATIENT, shape};
use crate::rank::Rank;

/// The last rank announces more tokens than its places: nobody believes it.
pub fn forged(rank: &mut Rank) -> usize {
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

/// Deadline of a wait for a rank that stops.
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
pub fn faults(rank: &mut Rank) -> usize {
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
                let shape = shape(rank, mode, SIZES);
                // As many as there is room for, so that an exchange lasts.
                let count = if mode.family == Family::Many {
                    shape.many_tokens
                } else {
                    16
                };
                let tokens = Tokens::new(rank.rank as u64, count, SIZES, Routing::Uniform, rank.ranks);
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
                let wrong = rank.gather_said(&wrong);
                let what = format!(
                    "{}: a rank stops {phase:?}, {}",
                    mode.name,
                    if abort { "abort" } else { "deadline" }
                );
                // The devices and the mappings are as good as before.
                rank.connect(shape, &placement, PATIENT);
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
