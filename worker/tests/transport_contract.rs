//! The contract of a transport, as one suite for every implementation.
//!
//! An implementation brings a [`Fabric`], which connects the ranks of an epoch, and a line in `mod` at the end. The
//! "experts" here are plain arithmetic on the host, so that the only thing under test is where rows go.
//!
//! Proves invariants E1 and E2 of ARCHITECTURE.md.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use conclave_kernels::backend::{Backend, Buffer, Limits};
use conclave_kernels::cpu::CpuBackend;
use conclave_plan::placement::{LayerPlacement, Placement};
use conclave_worker::transport::routing::Routes;
use conclave_worker::transport::tcp::{self, Group, PeerAddress, TcpTransport};
use conclave_worker::transport::{Abort, Capacity, Input, LocalTransport, Tokens, Transport, TransportError};

const HIDDEN: usize = 24;
const TOP_K: usize = 3;
const MAX_TOKENS: usize = 12;
const LAYERS: usize = 2;
const CAPACITY: Capacity = Capacity {
    max_tokens: MAX_TOKENS,
    max_top_k: TOP_K,
    hidden: HIDDEN,
};

/// Connects the ranks of an epoch.
trait Fabric: Sync {
    /// Called by every rank on its own thread.
    fn connect(&self, epoch: u64, routes: Routes, deadline: Duration, abort: Abort) -> Box<dyn Transport>;
}

/// One process, loopback.
struct Tcp {
    listeners: Vec<std::net::TcpListener>,
}

impl Tcp {
    fn new(ranks: usize) -> Tcp {
        Tcp {
            listeners: (0..ranks)
                .map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
                .collect(),
        }
    }
}

impl Fabric for Tcp {
    fn connect(&self, epoch: u64, routes: Routes, deadline: Duration, abort: Abort) -> Box<dyn Transport> {
        let address = |rank: usize| PeerAddress {
            rank: rank as u32,
            address: self.listeners[rank].local_addr().unwrap().to_string(),
        };
        let group = Group {
            epoch,
            rank: routes.rank,
            peers: (0..self.listeners.len())
                .filter(|&rank| rank as u32 != routes.rank)
                .map(address)
                .collect(),
            secret: b"contract".to_vec(),
        };
        let listener = self.listeners[routes.rank as usize].try_clone().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let streams = runtime.block_on(async {
            listener.set_nonblocking(true).unwrap();
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            tcp::connect(&listener, &group, Duration::from_secs(20))
                .await
                .unwrap()
        });
        Box::new(TcpTransport::new(routes, CAPACITY, streams, deadline, abort).unwrap())
    }
}

struct Local;

impl Fabric for Local {
    fn connect(&self, _: u64, routes: Routes, _: Duration, _: Abort) -> Box<dyn Transport> {
        Box::new(LocalTransport::new(routes))
    }
}

/// Small, seeded, and the same on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % bound
    }
}

/// One rank's tokens of one layer: rows and the experts of each.
#[derive(Clone, Debug, Default)]
struct Load {
    rows: Vec<f32>,
    experts: Vec<u32>,
}

impl Load {
    /// Different rows for every rank and token; distinct experts per token.
    fn random(random: &mut Random, tokens: usize, experts: u32) -> Load {
        let mut load = Load::default();
        for _ in 0..tokens {
            load.rows
                .extend((0..HIDDEN).map(|_| random.below(1000) as f32 / 7.0 - 70.0));
            let mut chosen: Vec<u32> = Vec::new();
            while chosen.len() < TOP_K {
                let expert = random.below(experts as usize) as u32;
                if !chosen.contains(&expert) {
                    chosen.push(expert);
                }
            }
            load.experts.extend(chosen);
        }
        load
    }

    fn tokens(&self) -> usize {
        self.rows.len() / HIDDEN
    }

    /// `[tokens * top_k, hidden]`.
    fn expected(&self, layer: usize) -> Vec<f32> {
        let rows = self.experts.iter().enumerate().flat_map(|(index, &expert)| {
            let row = &self.rows[index / TOP_K * HIDDEN..][..HIDDEN];
            row.iter()
                .map(move |&x| compute(x, layer, expert))
                .collect::<Vec<_>>()
        });
        rows.collect()
    }
}

/// What an expert does to a value.
fn compute(x: f32, layer: usize, expert: u32) -> f32 {
    x * (expert as f32 + 1.5) + layer as f32
}

/// A rank under test: a backend for its buffers, and a transport.
struct Rank {
    backend: CpuBackend,
    transport: Box<dyn Transport>,
    held: Vec<Vec<u32>>,
    rows: Buffer,
    experts: Buffer,
    staging: Buffer,
    out: Buffer,
    y: Buffer,
}

impl Rank {
    fn new(transport: Box<dyn Transport>, placement: &Placement, rank: u32) -> Rank {
        let limits = Limits {
            max_tokens: MAX_TOKENS,
            max_logit_rows: 1,
            max_runs: 1,
            max_pages_per_run: 1,
            max_expert_rows: CAPACITY.max_work_rows(),
            page_tokens: 16,
        };
        let mut backend = CpuBackend::new(limits, 1, None).unwrap();
        let mut alloc = |values: usize| backend.alloc(values * 4, "test").unwrap();
        Rank {
            rows: alloc(MAX_TOKENS * HIDDEN),
            experts: alloc(MAX_TOKENS * TOP_K),
            staging: alloc(MAX_TOKENS * HIDDEN),
            out: alloc(CAPACITY.max_work_rows() * HIDDEN),
            y: alloc(CAPACITY.max_work_rows() * HIDDEN),
            held: (0..LAYERS)
                .map(|layer| placement.experts_of(layer, rank))
                .collect(),
            backend,
            transport,
        }
    }

    fn dispatch(&mut self, layer: usize, load: &Load) -> Result<(), TransportError> {
        let bytes: Vec<u8> = load.rows.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.backend.write(&self.rows, 0, &bytes).unwrap();
        let bytes: Vec<u8> = load
            .experts
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        self.backend.write(&self.experts, 0, &bytes).unwrap();
        let tokens = Tokens {
            layer,
            count: load.tokens(),
            top_k: TOP_K,
            rows: &self.rows,
            experts: &self.experts,
        };
        self.transport.dispatch(&mut self.backend, tokens)
    }

    /// Computes everything that came in. The number of pieces it came in.
    fn work(&mut self, layer: usize) -> Result<usize, TransportError> {
        let mut pieces = 0;
        while let Some(work) = self.transport.next(&mut self.backend, &self.staging)? {
            pieces += 1;
            assert!(work.rows.len() <= CAPACITY.max_work_rows());
            let (from, to) = match work.input {
                Input::Own => (&self.rows, &self.y),
                Input::Staged => (&self.staging, &self.out),
            };
            let input = floats(&mut self.backend, from, MAX_TOKENS * HIDDEN);
            let out: Vec<u8> = work
                .rows
                .iter()
                .flat_map(|row| {
                    let expert = self.held[layer][row.expert as usize];
                    let values = &input[row.row as usize * HIDDEN..][..HIDDEN];
                    values
                        .iter()
                        .flat_map(move |&x| compute(x, layer, expert).to_le_bytes())
                        .collect::<Vec<_>>()
                })
                .collect();
            let staged = work.input == Input::Staged;
            self.backend.write(to, 0, &out).unwrap();
            if staged {
                self.transport.give(&mut self.backend, &self.out)?;
            }
        }
        Ok(pieces)
    }

    fn combine(&mut self, load: &Load) -> Result<Vec<f32>, TransportError> {
        self.transport.combine(&mut self.backend, &self.y)?;
        Ok(floats(&mut self.backend, &self.y, load.experts.len() * HIDDEN))
    }

    fn layer(&mut self, layer: usize, load: &Load) -> Result<usize, TransportError> {
        self.dispatch(layer, load)?;
        let pieces = self.work(layer)?;
        assert_eq!(self.combine(load)?, load.expected(layer));
        Ok(pieces)
    }
}

fn floats(backend: &mut CpuBackend, buffer: &Buffer, values: usize) -> Vec<f32> {
    let mut bytes = vec![0; values * 4];
    backend.read(buffer, 0, &mut bytes).unwrap();
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|&value| f32::from_le_bytes(value))
        .collect()
}

/// Runs `body` for every rank on a thread of its own.
fn on_ranks<R: Send>(ranks: u32, body: impl Fn(u32) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks)
            .map(|rank| {
                scope.spawn({
                    let body = &body;
                    move || body(rank)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

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
fn a_rank_that_stands_still_is_suspected(fabric: &dyn Fabric, ranks: u32) {
    let deadline = Duration::from_millis(150);
    for (epoch, phase) in (1..).zip(PHASES) {
        let placement = Placement::even(8, ranks);
        let done = Arc::new(std::sync::Barrier::new(ranks as usize));
        let suspects = on_ranks(ranks, |rank| {
            let routes = Routes::new(&placement, rank, LAYERS);
            let mut member = Rank::new(
                fabric.connect(epoch, routes, deadline, Abort::new()),
                &placement,
                rank,
            );
            let result = until(&mut member, rank, phase, &|| {});
            let error = result.err();
            // Rank 0 keeps its connections open and says nothing until all others have given up.
            if rank != 0 {
                drop(member);
                done.wait();
            } else {
                done.wait();
                drop(member);
            }
            error.map(|error| error.suspect())
        });
        assert_eq!(suspects[0], None, "{phase:?}");
        let named = suspects[1..]
            .iter()
            .map(|suspect| suspect.expect("it ended with an error"));
        assert!(
            named.clone().any(|suspect| suspect == Some(0)),
            "{phase:?}: {suspects:?}"
        );
        assert!(
            named.clone().all(|suspect| suspect.is_some()),
            "{phase:?}: {suspects:?}"
        );
    }
}

/// An abort from another thread ends every wait at once, whatever the deadline.
fn an_abort_ends_every_wait(fabric: &dyn Fabric, ranks: u32) {
    for (epoch, phase) in (1..).zip(PHASES) {
        let placement = Placement::even(8, ranks);
        let aborts: Vec<Abort> = (0..ranks).map(|_| Abort::new()).collect();
        let (stand_still, stood) = std::sync::mpsc::channel();
        let times = on_ranks(ranks, |rank| {
            let routes = Routes::new(&placement, rank, LAYERS);
            let abort = aborts[rank as usize].clone();
            let mut member = Rank::new(fabric.connect(epoch, routes, LONG * 10, abort), &placement, rank);
            let all = aborts.clone();
            let stand_still = stand_still.clone();
            let result = until(&mut member, rank, phase, &|| {
                // The others are in their waits by then, or will come into them.
                std::thread::sleep(Duration::from_millis(50));
                all.iter().for_each(Abort::abort);
                stand_still.send(Instant::now()).unwrap();
                std::thread::sleep(Duration::from_millis(300));
            });
            let ended = Instant::now();
            assert!(
                matches!(result, Ok(()) | Err(TransportError::Aborted)),
                "rank {rank}: {result:?}"
            );
            ended
        });
        let aborted = stood.recv().unwrap();
        for ended in &times[1..] {
            assert!(
                ended.duration_since(aborted) < Duration::from_millis(250),
                "{phase:?}"
            );
        }
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
        an_abort_ends_every_wait,
    ]
);
