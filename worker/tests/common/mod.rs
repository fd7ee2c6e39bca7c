//! A router as a script: the cluster protocol's server side, driven step by step by a test, so that a real worker can
//! be put through every turn of the protocol.

#![allow(dead_code, reason = "each test file uses its part")]

pub mod sharded;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use conclave_plan::placement::Placement;
use conclave_proto::cluster::v1 as wire;
use conclave_proto::cluster::v1::cluster_server::{Cluster, ClusterServer};
use conclave_proto::cluster::v1::from_worker::Message;
use conclave_proto::cluster::v1::to_worker;
use conclave_worker::{WorkerConfig, WorkerError};
use tokio::net::TcpSocket;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

pub fn tiny() -> PathBuf {
    repository().join("tests/data/minimax-m2/tiny-hd64/bf16")
}

/// A free port, that nobody else gets while no router listens on it: a bound socket holds it, and beside that one
/// only those that say SO_REUSEADDR may be bound to it by its number.
pub struct Port(TcpSocket);

impl Port {
    pub fn new() -> Port {
        Port(bound("127.0.0.1:0".parse().unwrap()))
    }
}

fn bound(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    socket
}

/// A router that listens.
pub struct Router {
    pub address: SocketAddr,
    port: Port,
    attached: mpsc::Receiver<Attached>,
    stop: Option<oneshot::Sender<()>>,
    server: JoinHandle<()>,
}

/// A worker's stream, after Hello.
pub struct Attached {
    pub hello: wire::Hello,
    to_worker: mpsc::Sender<Result<wire::ToWorker, Status>>,
    from_worker: Streaming<wire::FromWorker>,
    pub heartbeats: usize,
    pub progress: Vec<wire::LoadProgress>,
}

struct Service {
    attached: mpsc::Sender<Attached>,
    /// `Err`: every worker is refused.
    answer: Result<u64, Status>,
}

#[tonic::async_trait]
impl Cluster for Service {
    type AttachStream = ReceiverStream<Result<wire::ToWorker, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<wire::FromWorker>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut from_worker = request.into_inner();
        let (to_worker, stream) = mpsc::channel(64);
        let (attached, answer) = (self.attached.clone(), self.answer.clone());
        tokio::spawn(async move {
            let first = from_worker.message().await.unwrap().unwrap();
            let Some(Message::Hello(hello)) = first.message else {
                panic!("{first:?}")
            };
            match answer {
                Err(status) => to_worker.send(Err(status)).await.unwrap(),
                Ok(heartbeat_interval_ms) => {
                    let welcome = wire::Welcome {
                        heartbeat_interval_ms,
                        expected_workers: 1,
                    };
                    let welcome = to_worker::Message::Welcome(welcome);
                    to_worker
                        .send(Ok(wire::ToWorker {
                            message: Some(welcome),
                        }))
                        .await
                        .unwrap();
                    let worker = Attached {
                        hello,
                        to_worker,
                        from_worker,
                        heartbeats: 0,
                        progress: Vec::new(),
                    };
                    attached.send(worker).await.ok().unwrap();
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

impl Router {
    pub async fn start() -> Router {
        Router::listen(Port::new(), Ok(20))
    }

    pub fn listen(port: Port, answer: Result<u64, Status>) -> Router {
        let address = port.0.local_addr().unwrap();
        let listener = bound(address).listen(16).unwrap();
        let (attached, workers) = mpsc::channel(16);
        let (stop, stopped) = oneshot::channel::<()>();
        let service = ClusterServer::new(Service { attached, answer });
        let server = tonic::transport::Server::builder().add_service(service);
        let server = tokio::spawn(async move {
            tokio::select! {
                result = server.serve_with_incoming(TcpListenerStream::new(listener)) => result.unwrap(),
                _ = stopped => {}
            }
        });
        Router {
            address,
            port,
            attached: workers,
            stop: Some(stop),
            server,
        }
    }

    pub async fn attached(&mut self) -> Attached {
        timeout(PATIENCE, self.attached.recv()).await.unwrap().unwrap()
    }

    /// Nobody listens on the port any more.
    pub async fn stop(mut self) -> Port {
        self.stop.take().unwrap().send(()).unwrap();
        self.server.await.unwrap();
        self.port
    }
}

impl Attached {
    pub async fn send(&self, message: to_worker::Message) {
        self.to_worker
            .send(Ok(wire::ToWorker {
                message: Some(message),
            }))
            .await
            .unwrap();
    }

    /// The next message that is no heartbeat and no progress; `None`: the stream has ended.
    pub async fn next(&mut self) -> Option<Message> {
        loop {
            let message = timeout(PATIENCE, self.from_worker.message())
                .await
                .expect("the worker is silent");
            match message.ok().flatten()?.message.unwrap() {
                Message::Heartbeat(_) => self.heartbeats += 1,
                Message::LoadProgress(progress) => self.progress.push(progress),
                other => return Some(other),
            }
        }
    }

    pub async fn epoch_start(&mut self, start: wire::EpochStart) {
        self.send(to_worker::Message::EpochStart(start)).await;
    }

    /// Failed steps of epochs before are passed over, as the router does: a rank whose peers hear of an abort
    /// before it does has to take their leaving for a failure.
    pub async fn ready(&mut self, epoch: u64) -> wire::EpochReady {
        loop {
            match self.next().await {
                Some(Message::EpochReady(ready)) if ready.epoch == epoch => return ready,
                Some(Message::StepFailed(failed)) if failed.epoch < epoch => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub async fn step(&mut self, step: wire::Step) {
        self.send(to_worker::Message::Step(step)).await;
    }

    pub async fn result(&mut self) -> wire::StepResult {
        match self.next().await {
            Some(Message::StepResult(result)) => result,
            other => panic!("{other:?}"),
        }
    }

    pub async fn failed(&mut self) -> wire::StepFailed {
        match self.next().await {
            Some(Message::StepFailed(failed)) => failed,
            other => panic!("{other:?}"),
        }
    }

    pub async fn abort(&mut self, epoch: u64) {
        let abort = wire::EpochAbort {
            epoch,
            reason: "a test".into(),
        };
        self.send(to_worker::Message::EpochAbort(abort)).await;
    }
}

/// A small worker of the tiny checkpoint.
pub fn config(router: &Router) -> WorkerConfig {
    let mut config = WorkerConfig::new(router.address.to_string(), tiny());
    config.threads = 1;
    config.kv_pages = Some(64);
    config.max_slots = 4;
    config.max_batched_tokens = 64;
    config.drain_timeout = Duration::from_secs(20);
    config
}

/// A worker in this process; `stop` asks it to end, dropping the task kills it.
pub struct Worker {
    pub stop: Option<oneshot::Sender<()>>,
    pub task: JoinHandle<Result<(), WorkerError>>,
}

pub fn spawn(config: WorkerConfig) -> Worker {
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(conclave_worker::run(config, async {
        if stopped.await.is_err() {
            std::future::pending::<()>().await;
        }
    }));
    Worker {
        stop: Some(stop),
        task,
    }
}

/// Even placement over these workers.
pub fn epoch_start(epoch: u64, rank: u32, workers: &[&wire::Hello], deadline_ms: u64) -> wire::EpochStart {
    let ranks = workers.len() as u32;
    let placement = Placement::even(6, ranks);
    let owners = |owners: &Vec<u32>| wire::Ranks {
        ranks: owners.clone(),
    };
    wire::EpochStart {
        epoch,
        rank,
        peers: (0u32..)
            .zip(workers)
            .map(|(rank, hello)| wire::Peer {
                rank,
                worker_id: hello.worker_id.clone(),
                peer_address: hello.peer_address.clone(),
            })
            .collect(),
        placement: Some(wire::Placement {
            experts: 6,
            layers: placement
                .layers
                .iter()
                .map(|layer| wire::LayerPlacement {
                    owners: layer.owners.iter().map(owners).collect(),
                })
                .collect(),
        }),
        collective_deadline_ms: deadline_ms,
        keep_kv: true,
        transport: if ranks == 1 { "local".into() } else { "tcp".into() },
        peer_secret: b"a secret of this epoch".to_vec().into(),
    }
}

/// Starts an epoch of all `workers`, in order of rank, and waits until they are ready.
pub async fn form(epoch: u64, workers: &mut [&mut Attached], deadline_ms: u64) {
    let hellos: Vec<wire::Hello> = workers.iter().map(|worker| worker.hello.clone()).collect();
    let hellos: Vec<&wire::Hello> = hellos.iter().collect();
    for (rank, worker) in (0u32..).zip(workers.iter_mut()) {
        worker
            .epoch_start(epoch_start(epoch, rank, &hellos, deadline_ms))
            .await;
    }
    for worker in workers {
        worker.ready(epoch).await;
    }
}

pub fn empty(epoch: u64, step: u64) -> wire::Step {
    wire::Step {
        epoch,
        step,
        ..wire::Step::default()
    }
}

/// Prompt and greedy continuation of the tiny checkpoint.
pub struct Expected {
    pub prompt: Vec<u32>,
    pub greedy: Vec<u32>,
}

pub fn expected() -> Expected {
    let reference =
        conclave_worker::verify::Reference::read(&tiny().join("reference.safetensors"), 384).unwrap();
    Expected {
        prompt: reference.input_ids,
        greedy: reference.greedy_ids,
    }
}

/// Steps of one epoch that generate `count` greedy tokens on slot 0, as a router sends them.
pub fn generation(epoch: u64, prompt: &[u32], count: usize) -> Vec<wire::Step> {
    use conclave_worker::verify::{greedy, run, start};
    let pages = (0..(prompt.len() + count).div_ceil(16) as u32).collect();
    let mut steps = vec![wire::Step {
        start_slots: vec![start(0, pages, prompt.len(), greedy())],
        runs: vec![run(0, 0, prompt, true)],
        ..empty(epoch, 0)
    }];
    for index in 1..count {
        steps.push(wire::Step {
            runs: vec![run(0, prompt.len() + index - 1, &[], true)],
            ..empty(epoch, index as u64)
        });
    }
    steps
}
