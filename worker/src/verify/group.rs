//! A whole group of ranks in one process, one thread each, connected over TCP on loopback or between their GPUs: the real
//! executor, slots and transport, without a router. For `conclave verify`, `conclave bench` and for tests.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use conclave_kernels::backend::{KvDtype, Limits};
use conclave_plan::placement::Placement;
use conclave_proto::cluster::v1 as wire;

use super::member::{self, Job, Looks, MAX_QUEUED, RankOutput};
use crate::device::{DeviceKind, MAX_IN_FLIGHT, Rank};
use crate::model::{Executor, KvShape, Modes};
use crate::slots::SlotLimits;
use crate::transport::nccl::{self, CommunicatorId};
use crate::transport::routing::Routes;
use crate::transport::tcp::{self, PeerAddress, TcpTransport};
use crate::transport::{Abort, LocalTransport, Transport, TransportKind, device, group};
use crate::weights::{Progress, WeightSource};

/// How the ranks of a group are made.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    pub ranks: u32,
    /// Per rank.
    pub threads: usize,
    pub kv_dtype: KvDtype,
    pub kv_pages: usize,
    pub page_tokens: usize,
    pub max_slots: usize,
    pub max_tokens: usize,
    /// `None`: even.
    pub placement: Option<Placement>,
    pub deadline: Duration,
    /// Where rank r runs: the r-th, and from the first again where there are fewer.
    pub devices: Vec<DeviceKind>,
    /// Between several ranks.
    pub transport: TransportKind,
    pub modes: Modes,
    /// On the CPU: what products read is rounded to BF16.
    pub rounds: bool,
    /// Rows of logits that one pass of the head gives.
    pub max_logit_rows: usize,
}

impl GroupConfig {
    /// Enough for a few sequences of a small model.
    pub fn new(ranks: u32) -> GroupConfig {
        GroupConfig {
            ranks,
            threads: 1,
            kv_dtype: KvDtype::F32,
            kv_pages: 256,
            page_tokens: 16,
            max_slots: 16,
            max_tokens: 512,
            placement: None,
            deadline: Duration::from_secs(60),
            devices: vec![DeviceKind::Cpu],
            transport: TransportKind::Tcp,
            modes: Modes::default(),
            rounds: false,
            max_logit_rows: 16,
        }
    }
}

/// A message says everything that is known: the threads are gone when it is read.
#[derive(Clone, Debug, thiserror::Error)]
#[error("rank {rank}: {problem}")]
pub struct GroupError {
    pub rank: u32,
    pub problem: String,
}

struct Member {
    steps: SyncSender<Job>,
    outputs: Receiver<Result<RankOutput, String>>,
    thread: Option<JoinHandle<()>>,
}

/// Ranks that run and wait for steps.
pub struct LocalGroup {
    members: Vec<Member>,
    step: u64,
}

impl LocalGroup {
    /// Loads the model on every rank and connects them.
    pub fn start(source: &Arc<WeightSource>, config: &GroupConfig) -> Result<LocalGroup, GroupError> {
        let failed = |problem: std::io::Error| GroupError {
            rank: 0,
            problem: problem.to_string(),
        };
        let listeners = (0..config.ranks)
            .map(|_| std::net::TcpListener::bind("127.0.0.1:0"))
            .collect::<Result<Vec<_>, _>>()
            .map_err(failed)?;
        let addresses = listeners
            .iter()
            .map(|listener| listener.local_addr().map(|address| address.to_string()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(failed)?;
        let communicator = match config.transport {
            TransportKind::Nccl if config.ranks > 1 => {
                let drawn = nccl::draw_id();
                Some(drawn.map_err(|problem| GroupError { rank: 0, problem })?)
            }
            _ => None,
        };
        let mut members = Vec::new();
        for (rank, listener) in (0..config.ranks).zip(listeners) {
            let (steps, step_queue) = sync_channel(MAX_QUEUED);
            let (output, outputs) = sync_channel(MAX_QUEUED + MAX_IN_FLIGHT);
            let (source, config, addresses) = (Arc::clone(source), config.clone(), addresses.clone());
            let thread = std::thread::spawn(move || {
                let links = (listener, addresses, communicator);
                let mut member = match start_rank(&source, &config, rank, links) {
                    Ok(member) => member,
                    Err(problem) => {
                        // Nobody listens if another rank failed first.
                        let _ = output.send(Err(problem));
                        return;
                    }
                };
                let _ = output.send(Ok(RankOutput::default()));
                member::run(&mut member, &step_queue, &output);
            });
            members.push(Member {
                steps,
                outputs,
                thread: Some(thread),
            });
        }
        let mut group = LocalGroup { members, step: 0 };
        group.collect()?;
        Ok(group)
    }

    pub fn ranks(&self) -> usize {
        self.members.len()
    }

    /// Runs one step on every rank; `steps[r]` is rank r's share. Epoch and number are filled in.
    pub fn step(&mut self, steps: Vec<wire::Step>, taps: bool) -> Result<Vec<RankOutput>, GroupError> {
        self.submit(steps, if taps { &Looks::Inside } else { &Looks::Nothing });
        self.collect()
    }

    /// Runs `work` on one rank's thread when no step is in flight.
    pub fn work(
        &mut self,
        rank: usize,
        work: impl FnOnce(&mut Rank) -> Result<(), String> + Send + 'static,
    ) -> Result<(), GroupError> {
        let member = &self.members[rank];
        // A rank that is gone says why in its outputs.
        let _ = member.steps.send(Job::Work(Box::new(work)));
        let gone = || Err("its thread is gone".into());
        let answer = member.outputs.recv().unwrap_or_else(|_| gone());
        answer.map(drop).map_err(|problem| GroupError {
            rank: rank as u32,
            problem,
        })
    }

    /// Sends one step to every rank; up to [`MAX_QUEUED`] may be sent ahead of what was collected.
    pub fn submit(&mut self, steps: Vec<wire::Step>, looks: &Looks) {
        let group_tokens = steps.iter().map(tokens_of).max().unwrap_or(0);
        for (member, step) in self.members.iter().zip(steps) {
            let step = wire::Step {
                epoch: 1,
                step: self.step,
                group_tokens,
                ..step
            };
            // A rank that is gone says why in its outputs.
            let _ = member.steps.send(Job::Step(Box::new(step), looks.clone()));
        }
        self.step += 1;
    }

    /// One answer of every rank. Of several errors the one that does not blame another rank is the cause.
    pub fn collect(&mut self) -> Result<Vec<RankOutput>, GroupError> {
        let answers: Vec<Result<RankOutput, String>> = self
            .members
            .iter()
            .map(|member| {
                member
                    .outputs
                    .recv()
                    .unwrap_or_else(|_| Err("its thread is gone".into()))
            })
            .collect();
        let mut outputs = Vec::with_capacity(answers.len());
        let mut errors = Vec::new();
        for (rank, answer) in (0u32..).zip(answers) {
            match answer {
                Ok(output) => outputs.push(output),
                Err(problem) => errors.push(GroupError { rank, problem }),
            }
        }
        let secondary = |error: &&GroupError| {
            error.problem.starts_with("connection to rank") || error.problem.contains("left the epoch")
        };
        match errors.iter().find(|error| !secondary(error)).or(errors.first()) {
            Some(error) => Err(error.clone()),
            None => Ok(outputs),
        }
    }
}

impl Drop for LocalGroup {
    fn drop(&mut self) {
        for member in &mut self.members {
            // Closing the queue ends the thread's loop.
            member.steps = sync_channel(0).0;
        }
        for member in &mut self.members {
            if let Some(thread) = member.thread.take() {
                let _ = thread.join();
            }
        }
    }
}

/// A run without tokens takes the one that was sampled last.
fn tokens_of(step: &wire::Step) -> u32 {
    step.runs.iter().map(|run| run.tokens.len().max(1) as u32).sum()
}

/// What a rank meets the others by.
type Links = (std::net::TcpListener, Vec<String>, Option<CommunicatorId>);

fn start_rank(source: &WeightSource, config: &GroupConfig, rank: u32, links: Links) -> Result<Rank, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let spec = source.spec().clone();
    let slot_limits = SlotLimits {
        max_slots: config.max_slots,
        max_tokens: config.max_tokens,
        kv_pages: config.kv_pages,
        page_tokens: config.page_tokens,
        vocab: spec.vocab,
        max_position: spec.max_position,
        layers: spec.layers.len(),
    };
    let limits = Limits {
        max_tokens: config.max_tokens,
        max_logit_rows: config.max_logit_rows,
        max_runs: config.max_slots,
        max_pages_per_run: slot_limits.max_pages_per_slot(),
        max_expert_rows: config.max_tokens
            * spec.layers.iter().map(|layer| layer.moe.top_k).max().unwrap_or(1),
        page_tokens: config.page_tokens,
    };
    let kv = KvShape {
        pages: config.kv_pages,
        page_tokens: config.page_tokens,
        dtype: config.kv_dtype,
    };
    let kind = config.devices.get(rank as usize % config.devices.len().max(1));
    let mut backend = kind
        .ok_or("no device is named")?
        .open(limits.clone(), config.threads)
        .map_err(|error| text(&error))?;
    backend
        .round_activations(config.rounds)
        .map_err(|error| text(&error))?;
    let mut executor = Executor::new(backend, spec, limits, config.modes).map_err(|error| text(&error))?;
    executor.allocate_kv(kv).map_err(|error| text(&error))?;
    let progress = Progress::new();
    let experts = executor
        .spec()
        .layers
        .iter()
        .map(|layer| layer.moe.experts)
        .max()
        .unwrap_or(0) as u32;
    let placement = config
        .placement
        .clone()
        .unwrap_or_else(|| Placement::even(experts, config.ranks));
    placement
        .check(executor.spec().layers.len())
        .map_err(|error| text(&error))?;
    executor
        .load_replicated(source, config.threads, &progress)
        .map_err(|error| text(&error))?;
    executor
        .load_experts(source, &placement, rank, config.threads, &progress, &|| false)
        .map_err(|error| text(&error))?;
    let transport = connect_rank(&mut executor, config, placement, rank, links)?;
    let exchanges = config.ranks > 1 && config.transport != TransportKind::Tcp;
    executor
        .choose_path(config.ranks == 1, exchanges)
        .map_err(|error| text(&error))?;
    let mut rank = Rank::new(executor, slot_limits);
    rank.begin_epoch(transport);
    Ok(rank)
}

/// This rank's end of what the configuration names, with all others.
fn connect_rank(
    executor: &mut Executor,
    config: &GroupConfig,
    placement: Placement,
    rank: u32,
    (listener, addresses, communicator): Links,
) -> Result<Box<dyn Transport>, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let layers = executor.spec().layers.len();
    if config.ranks == 1 {
        return Ok(Box::new(LocalTransport::new(Routes::new(
            &placement, rank, layers,
        ))));
    }
    let peers = (0u32..).zip(addresses).filter(|&(peer, _)| peer != rank);
    let greeted = tcp::Group {
        epoch: 1,
        rank,
        peers: peers
            .map(|(rank, address)| PeerAddress { rank, address })
            .collect(),
        secret: b"one process".to_vec(),
    };
    let streams = connect(listener, &greeted, config.deadline)?;
    let capacity = executor.capacity();
    if config.transport == TransportKind::Tcp {
        let routes = Routes::new(&placement, rank, layers);
        let transport = TcpTransport::new(routes, capacity, streams, config.deadline, Abort::new());
        return Ok(Box::new(transport.map_err(|error| text(&error))?));
    }
    let group = group::Group {
        kind: config.transport,
        epoch: 1,
        rank,
        ranks: config.ranks,
        placement: &placement,
        layers,
        capacity,
        deterministic: config.modes.deterministic,
        deadline: config.deadline,
        abort: Abort::new(),
        streams,
        communicator,
    };
    device::connect(executor.backend(), group).map_err(|error| text(&error))
}

/// The handshake is async; a thread of its own needs a runtime of its own.
fn connect(
    listener: std::net::TcpListener,
    group: &tcp::Group,
    deadline: Duration,
) -> Result<Vec<Option<std::net::TcpStream>>, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    runtime.block_on(async {
        listener
            .set_nonblocking(true)
            .map_err(|error| error.to_string())?;
        let listener = tokio::net::TcpListener::from_std(listener).map_err(|error| error.to_string())?;
        tcp::connect(&listener, group, deadline)
            .await
            .map_err(|error| error.to_string())
    })
}
