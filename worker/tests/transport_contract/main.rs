//! The contract of a transport, as one suite for every implementation.
//!
//! An implementation brings a [`Fabric`], which connects the ranks of an epoch, and a line in `contract!` at the end.
//!
//! Proves invariants E1 and E2 of ARCHITECTURE.md.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod fabric;
mod rank;

use std::sync::Arc;
use std::time::{Duration, Instant};

use conclave_plan::placement::{LayerPlacement, Placement};
use conclave_worker::transport::routing::Routes;
use conclave_worker::transport::{Abort, TransportError};
use fabric::{Fabric, Local, Tcp};
use rank::{LAYERS, Load, MAX_TOKENS, Random, Rank, on_ranks};

const LONG: Duration = Duration::from_secs(60);

/// Uneven, with replicas, and different in every layer.
fn random_placement(random: &mut Random, ranks: u32, experts: u32) -> Placement {
    let layers = (0..LAYERS).map(|_| LayerPlacement {
        owners: (0..experts)
            .map(|_| {
                let first = random.below(ranks as usize) as u32;
                let second = random.below(ranks as usize) as u32;
                let mut owners = if random.below(3) == 0 {
                    vec![first, second]
                } else {
                    vec![first]
                };
                owners.sort_unstable();
                owners.dedup();
                owners
            })
            .collect(),
    });
    Placement {
        ranks,
        experts,
        layers: layers.collect(),
    }
}

/// Random routings, some ranks with no tokens at all, over repeated epochs of the same ranks.
fn rows_come_back_where_they_belong(fabric: &dyn Fabric, ranks: u32) {
    for epoch in 1..=4 {
        let mut random = Random(epoch * 77 + u64::from(ranks));
        let placement = random_placement(&mut random, ranks, 9);
        placement.check(LAYERS).unwrap();
        on_ranks(ranks, |rank| {
            let routes = Routes::new(&placement, rank, LAYERS);
            let mut member = Rank::new(
                fabric.connect(epoch, routes, LONG, Abort::new()),
                &placement,
                rank,
            );
            let mut random = Random(epoch * 1000 + u64::from(rank));
            for step in 0..12 {
                member.transport.begin_step(step).unwrap();
                for layer in 0..LAYERS {
                    let tokens = if random.below(4) == 0 {
                        0
                    } else {
                        random.below(MAX_TOKENS + 1)
                    };
                    member
                        .layer(layer, &Load::random(&mut random, tokens, 9))
                        .unwrap();
                }
            }
        });
    }
}

/// Every rank sends as much as it may to the one rank that has all experts: work in pieces.
fn everything_goes_to_one_rank(fabric: &dyn Fabric, ranks: u32) {
    let owners = vec![vec![ranks - 1]; 5];
    let placement = Placement {
        ranks,
        experts: 5,
        layers: vec![LayerPlacement { owners }],
    };
    let pieces = on_ranks(ranks, |rank| {
        let routes = Routes::new(&placement, rank, LAYERS);
        let mut member = Rank::new(fabric.connect(1, routes, LONG, Abort::new()), &placement, rank);
        member.transport.begin_step(0).unwrap();
        let load = Load::random(&mut Random(u64::from(rank)), MAX_TOKENS, 5);
        (0..LAYERS)
            .map(|layer| member.layer(layer, &load).unwrap())
            .max()
            .unwrap()
    });
    // The staging buffer holds the rows of one full rank.
    assert_eq!(pieces[ranks as usize - 1], ranks as usize);
}

/// No rank has a token, for many layers.
fn empty_steps_pass(fabric: &dyn Fabric, ranks: u32) {
    let placement = Placement::even(8, ranks);
    on_ranks(ranks, |rank| {
        let routes = Routes::new(&placement, rank, LAYERS);
        let mut member = Rank::new(fabric.connect(1, routes, LONG, Abort::new()), &placement, rank);
        for step in 0..50 {
            member.transport.begin_step(step).unwrap();
            for layer in 0..LAYERS {
                assert_eq!(member.layer(layer, &Load::default()).unwrap(), 0);
            }
        }
    });
}

/// Right before which call of a layer it happens.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Dispatch,
    Work,
    Combine,
}

const PHASES: [Phase; 3] = [Phase::Dispatch, Phase::Work, Phase::Combine];

/// Runs layers until something fails; rank 0 does `stop` at `phase` of the second step. How the others end.
fn until(member: &mut Rank, rank: u32, phase: Phase, stop: &dyn Fn()) -> Result<(), TransportError> {
    let mut random = Random(u64::from(rank) + 5);
    for step in 0..1000 {
        member.transport.begin_step(step)?;
        for layer in 0..LAYERS {
            let stops = |at: Phase| rank == 0 && step == 1 && at == phase;
            let load = Load::random(&mut random, 4, 8);
            if stops(Phase::Dispatch) {
                stop();
                return Ok(());
            }
            member.dispatch(layer, &load)?;
            if stops(Phase::Work) {
                stop();
                return Ok(());
            }
            member.work(layer)?;
            if stops(Phase::Combine) {
                stop();
                return Ok(());
            }
            member.combine(&load)?;
        }
    }
    panic!("nothing ended the epoch");
}

/// A rank that dies takes nobody with it: all others end at once, and blame it or each other, never nobody.
fn a_rank_that_dies_ends_the_epoch_for_all(fabric: &dyn Fabric, ranks: u32) {
    for (epoch, phase) in (1..).zip(PHASES) {
        let placement = Placement::even(8, ranks);
        let begin = Instant::now();
        on_ranks(ranks, |rank| {
            let routes = Routes::new(&placement, rank, LAYERS);
            let mut member = Rank::new(
                fabric.connect(epoch, routes, LONG, Abort::new()),
                &placement,
                rank,
            );
            let result = until(&mut member, rank, phase, &|| {});
            // Dropping the member is its death.
            match result {
                Ok(()) => assert_eq!(rank, 0),
                Err(TransportError::Peer { .. } | TransportError::HungUp { .. }) => assert_ne!(rank, 0),
                Err(other) => panic!("rank {rank}, {phase:?}: {other}"),
            }
        });
        assert!(begin.elapsed() < LONG / 2, "{phase:?}");
    }
}

/// A rank that stands still is named by the others after the deadline, and they do not wait longer.
///
/// On a busy machine others stand still as well, and longer than a short deadline: it is doubled until rank 0 is the
/// only one.
fn a_rank_that_stands_still_is_suspected(fabric: &dyn Fabric, ranks: u32) {
    let mut deadline = Duration::from_millis(150);
    let mut epoch = 0;
    for phase in PHASES {
        loop {
            epoch += 1;
            let suspects = suspects(fabric, ranks, (epoch, phase), deadline);
            let (first, others) = (suspects[0], &suspects[1..]);
            let named = |suspect: &Option<Option<u32>>| *suspect == Some(Some(0));
            if first.is_none() && others.iter().any(named) {
                // Some blame those who left because of rank 0, none nobody.
                assert!(
                    others.iter().all(|other| other.flatten().is_some()),
                    "{suspects:?}"
                );
                break;
            }
            deadline *= 2;
            assert!(deadline < LONG, "{phase:?}: {suspects:?}");
        }
    }
}

/// A step may say that a rank needs longer, and the steps behind it may be as impatient as those before.
fn a_step_may_take_longer_than_the_epochs_deadline(fabric: &dyn Fabric, ranks: u32) {
    let placement = Placement::even(8, ranks);
    let deadline = Duration::from_millis(100);
    let done = std::sync::Barrier::new(ranks as usize);
    for (epoch, phase) in (1..).zip(PHASES) {
        on_ranks(ranks, |rank| {
            let routes = Routes::new(&placement, rank, LAYERS);
            let transport = fabric.connect(epoch, routes, deadline, Abort::new());
            let mut member = Rank::new(transport, &placement, rank);
            member.transport.set_patience(LONG);
            let load = Load::random(&mut Random(u64::from(rank) + 5), 4, 8);
            let pause = |at: Phase, layer: usize| {
                if rank == 0 && at == phase && layer == 1 {
                    std::thread::sleep(deadline * 5);
                }
            };
            for step in 0..3 {
                member.transport.begin_step(step).unwrap();
                for layer in 0..LAYERS {
                    pause(Phase::Dispatch, layer);
                    member.dispatch(layer, &load).unwrap();
                    pause(Phase::Work, layer);
                    member.work(layer).unwrap();
                    pause(Phase::Combine, layer);
                    member.combine(&load).unwrap();
                }
            }
            if rank == 0 {
                // Nobody comes any more.
                let begin = Instant::now();
                member.transport.set_patience(Duration::ZERO);
                member.transport.begin_step(3).unwrap();
                let result = member.dispatch(0, &load).and_then(|()| member.work(0));
                assert!(
                    matches!(result, Err(TransportError::Deadline { .. })),
                    "{result:?}"
                );
                assert!(begin.elapsed() < LONG / 2);
            }
            done.wait();
        });
    }
}

/// Rank 0 stands still at `phase`. Who ended with an error, and whom it suspects.
fn suspects(
    fabric: &dyn Fabric,
    ranks: u32,
    (epoch, phase): (u64, Phase),
    deadline: Duration,
) -> Vec<Option<Option<u32>>> {
    let placement = Placement::even(8, ranks);
    let done = Arc::new(std::sync::Barrier::new(ranks as usize));
    on_ranks(ranks, |rank| {
        let routes = Routes::new(&placement, rank, LAYERS);
        let mut member = Rank::new(
            fabric.connect(epoch, routes, deadline, Abort::new()),
            &placement,
            rank,
        );
        let error = until(&mut member, rank, phase, &|| {}).err();
        // Rank 0 keeps its connections open and says nothing until all others have given up.
        if rank == 0 && error.is_none() {
            done.wait();
            drop(member);
        } else {
            drop(member);
            done.wait();
        }
        error.map(|error| error.suspect())
    })
}

/// An abort from another thread ends every wait at once, whatever the deadline.
fn an_abort_ends_every_wait(fabric: &dyn Fabric, ranks: u32) {
    for (epoch, phase) in (1..).zip(PHASES) {
        let placement = Placement::even(8, ranks);
        let aborts: Vec<Abort> = (0..ranks).map(|_| Abort::new()).collect();
        let (ended, others) = std::sync::mpsc::channel();
        let others = std::sync::Mutex::new(others);
        on_ranks(ranks, |rank| {
            let routes = Routes::new(&placement, rank, LAYERS);
            let abort = aborts[rank as usize].clone();
            let mut member = Rank::new(fabric.connect(epoch, routes, LONG * 10, abort), &placement, rank);
            let all = aborts.clone();
            let ended = ended.clone();
            let result = until(&mut member, rank, phase, &|| {
                // The others are in their waits by then, or will come into them.
                std::thread::sleep(Duration::from_millis(50));
                all.iter().for_each(Abort::abort);
                // Rank 0 leaves only when all others have ended, which the deadline does not make them do.
                let others = others.lock().unwrap();
                for _ in 1..ranks {
                    others.recv_timeout(LONG).unwrap();
                }
            });
            assert!(
                matches!(result, Ok(()) | Err(TransportError::Aborted)),
                "rank {rank}: {result:?}"
            );
            if rank > 0 {
                ended.send(()).unwrap();
            }
        });
    }
}

macro_rules! contract {
    ($name:ident, $fabric:expr, $ranks:expr, [$($test:ident),* $(,)?]) => {
        mod $name {
            use super::*;

            $(
                #[test]
                fn $test() {
                    for ranks in $ranks {
                        super::$test(&$fabric(ranks as usize), ranks);
                    }
                }
            )*
        }
    };
}

contract!(
    local,
    |_: usize| Local,
    [1],
    [rows_come_back_where_they_belong, empty_steps_pass]
);
contract!(
    tcp_ranks,
    Tcp::new,
    [2, 3, 5],
    [
        rows_come_back_where_they_belong,
        everything_goes_to_one_rank,
        empty_steps_pass,
        a_rank_that_dies_ends_the_epoch_for_all,
        a_rank_that_stands_still_is_suspected,
        a_step_may_take_longer_than_the_epochs_deadline,
        an_abort_ends_every_wait,
    ]
);
