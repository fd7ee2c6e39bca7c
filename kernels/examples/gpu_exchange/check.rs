//! The contract of an exchange: results for random and extreme routings and repeated epochs, then ranks at fault.

use std::time::{Duration, Instant};

use conclave_kernels::cuda::exchange::station::{Family, Until};
use conclave_kernels::cuda::exchange::{ExchangeShape, Wire};

use crate::cases::{Holding, Routing, Tokens, compare, placement};
use crate::faults::{faults, forged};
use crate::late::late;
use crate::rank::Rank;

/// How long ranks that are well wait for each other.
pub const PATIENT: Duration = Duration::from_secs(5);

/// One way of carrying rows, and how far results may be from exact ones.
pub struct Mode {
    pub name: &'static str,
    pub family: Family,
    exact: bool,
    deterministic: bool,
    wire: Wire,
    pub tolerance: f64,
}

pub const MODES: [Mode; 6] = [
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
    // Threads of one process are paused together; over NCCL they keep their messages.
    let apart = rank.ranks > 1 && rank.ranks <= rank.options.gpus;
    if "late rows".contains(&rank.options.only)
        && apart
        && (!rank.options.nccl || rank.options.child.is_some())
    {
        failed += late(rank);
    }
    // Counted once for all ranks.
    if rank.rank == 0 { failed } else { 0 }
}

/// Of an epoch in which ranks exchange in that way.
pub fn shape(rank: &Rank, mode: &Mode, (hidden, top_k, _): (usize, usize, usize)) -> ExchangeShape {
    ExchangeShape {
        exact: mode.exact,
        deterministic: mode.deterministic,
        wire: mode.wire,
        // More than the blocks that add results sum ahead of what comes.
        many_tokens: if mode.family == Family::Few { 0 } else { 1152 },
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
    let counts: [(&str, Count, Routing); 9] = [
        ("one token each", |_, _, _, _| 1, Routing::Uniform),
        ("some", |r, _, some, _| some + r % 3, Routing::Uniform),
        (
            "only the last rank has tokens",
            |r, last, some, _| if r == last { some } else { 0 },
            Routing::Uniform,
        ),
        (
            "only the last rank has tokens, at capacity",
            |r, last, _, capacity| if r == last { capacity } else { 0 },
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
