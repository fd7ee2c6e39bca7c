//! Puts a router together, and takes it down in order: no new requests, running ones finish, workers are told, ports
//! close.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::{Duration, SystemTime};

use conclave_proto::cluster::v1::cluster_server::ClusterServer;
use conclave_proto::v1::conclave_server::ConclaveServer;
use conclave_router_core::api::CoreConfig;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::api::{ConclaveService, Context};
use crate::clock::{Clock, micros};
use crate::cluster::{ClusterService, Limits, Registry, Terms};
use crate::config::RouterConfig;
use crate::error::{Result, RouterError};
use crate::metrics::Metrics;
use crate::model::Model;
use crate::net::{self, Demand};
use crate::pool::TextPool;
use crate::sequencer::{Channels, Handle, Input, Machine, View, channels};
use crate::server;
use crate::strangers::Strangers;

/// Workers whose full slots the table of live sequences has room for.
const PLANNED_WORKERS: usize = 64;
/// After the last sequence has ended: so long for clients to read what is left, and for workers to be told.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// The fully qualified name for grpc.health.v1.
const SERVICE: &str = "conclave.v1.Conclave";

/// A router that runs.
pub struct Router {
    client_address: SocketAddr,
    cluster_address: SocketAddr,
    sequencer: Handle,
    drain_timeout: Duration,
    stop_api: oneshot::Sender<()>,
    api: JoinHandle<std::result::Result<(), tonic::transport::Error>>,
    sequencer_ended: oneshot::Receiver<()>,
}

/// Runs a router until `shutdown` completes, then drains it.
pub async fn run(config: RouterConfig, shutdown: impl Future<Output = ()>) -> Result<()> {
    let mut router = Router::start(config).await?;
    let failed = tokio::select! {
        () = shutdown => None,
        error = router.failed() => Some(error),
    };
    match failed {
        None => router.shut_down().await,
        Some(error) => Err(error),
    }
}

impl Router {
    /// Binds both ports and starts to serve; workers may attach from here on.
    pub async fn start(config: RouterConfig) -> Result<Router> {
        config.check()?;
        let model = Arc::new(Model::load(&config)?);
        let (client_listener, client_address) = net::bind("clients", config.listen)?;
        let (cluster_listener, cluster_address) = net::bind("workers", config.cluster_listen)?;

        let metrics = Arc::new(Metrics::new(model.name()));
        let max_live = config.max_waiting + PLANNED_WORKERS * config.max_num_seqs as usize;
        let (sequencer, channels) = channels(max_live);
        let registry = Arc::new(Registry::new(Terms {
            cluster_token: config.cluster_token.clone(),
            page_tokens: config.block_size,
            max_model_len: model.max_model_len,
            checkpoint_id: config.checkpoint_id.clone(),
            transport: config.transport.clone(),
            expert_bytes: model.expert_bytes,
        }));
        let context = Arc::new(Context {
            pool: TextPool::start(config.text_threads, max_live)?,
            model: model.clone(),
            sequencer: sequencer.clone(),
            registry: registry.clone(),
            metrics: metrics.clone(),
            next_sequence: AtomicU64::new(1),
            keep_alive_interval: config.keep_alive_interval,
            log_prompts: config.log_prompts,
            started: SystemTime::now(),
        });
        tokio::spawn(warm_grammars(context.clone()));
        let (stop_api, api_stopped) = oneshot::channel();
        let api = api_server(&config, context, client_listener, api_stopped)?;
        let sequencer_ended = start_sequencer(
            SequencerParts {
                core: core_config(&config, &model),
                model,
                metrics,
                channels,
                registry,
                inputs: sequencer.inputs.clone(),
                listener: cluster_listener,
            },
            &config,
        )?;
        tracing::info!(%client_address, %cluster_address, "router listens");
        Ok(Router {
            client_address,
            cluster_address,
            sequencer,
            drain_timeout: config.drain_timeout,
            stop_api,
            api,
            sequencer_ended,
        })
    }

    /// Where clients connect.
    pub fn client_address(&self) -> SocketAddr {
        self.client_address
    }

    /// Where workers connect.
    pub fn cluster_address(&self) -> SocketAddr {
        self.cluster_address
    }

    /// What the cluster looks like, now and whenever it changes.
    pub fn view(&self) -> watch::Receiver<View> {
        self.sequencer.view.clone()
    }

    /// Completes only if the router can serve no longer.
    pub async fn failed(&mut self) -> RouterError {
        tokio::select! {
            _ = &mut self.sequencer_ended => RouterError::SequencerGone,
            ended = &mut self.api => match ended {
                Ok(Err(source)) => RouterError::Server { purpose: "client", source },
                _ => RouterError::SequencerGone,
            },
        }
    }

    /// Drains: new requests are refused, running ones finish within the drain timeout, workers are told to shut
    /// down.
    pub async fn shut_down(self) -> Result<()> {
        let Router {
            sequencer,
            drain_timeout,
            stop_api,
            mut api,
            sequencer_ended,
            ..
        } = self;
        let (drained, all_ended) = oneshot::channel();
        if sequencer.inputs.send(Input::Drain(drained)).await.is_err() {
            return Err(RouterError::SequencerGone);
        }
        let left = sequencer.view.borrow().clone();
        tracing::info!(running = left.running, waiting = left.waiting, "draining");
        if timeout(drain_timeout, all_ended).await.is_err() {
            tracing::warn!(
                ?drain_timeout,
                "sequences still ran when the drain timeout ended; they are cut off"
            );
        }
        let reason = "the router shut down".to_owned();
        if sequencer.inputs.send(Input::Stop { reason }).await.is_err() {
            return Err(RouterError::SequencerGone);
        }
        // The API may have failed by itself meanwhile.
        let _ = stop_api.send(());
        if timeout(FLUSH_TIMEOUT, &mut api).await.is_err() {
            api.abort();
        }
        // An error is the sender dropped without a word, which is how the thread ends.
        let _ = timeout(FLUSH_TIMEOUT, sequencer_ended).await;
        tracing::info!("router stopped");
        Ok(())
    }
}

fn core_config(config: &RouterConfig, model: &Model) -> CoreConfig {
    CoreConfig {
        page_tokens: config.block_size,
        experts: model.experts,
        expected_workers: config.expected_workers,
        max_waiting: config.max_waiting,
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_model_len: model.max_model_len,
        enable_prefix_cache: config.enable_prefix_caching,
        steps_in_flight: config.steps_in_flight,
        collective_deadline_floor: micros(config.collective_deadline),
    }
}

fn api_server(
    config: &RouterConfig,
    context: Arc<Context>,
    listener: TcpListener,
    stop: oneshot::Receiver<()>,
) -> Result<JoinHandle<std::result::Result<(), tonic::transport::Error>>> {
    let (reporter, health) = tonic_health::server::health_reporter();
    tokio::spawn(report_health(reporter, context.sequencer.view.clone()));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(conclave_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name(SERVICE)
        .with_service_name("grpc.health.v1.Health")
        .build_v1()
        .map_err(|error| RouterError::Start {
            what: "gRPC reflection",
            source: std::io::Error::other(error),
        })?;
    let service = ConclaveServer::new(ConclaveService::new(context))
        .max_decoding_message_size(server::MAX_REQUEST_BYTES)
        .max_encoding_message_size(server::MAX_RESPONSE_BYTES);
    let preface = Demand::Preface(net::HANDSHAKE_TIMEOUT);
    let incoming = net::incoming(listener, server::MAX_CLIENT_CONNECTIONS, preface)?;
    let server = server::for_clients(config.max_connection_age)
        .add_service(service)
        .add_service(health)
        .add_service(reflection)
        .serve_with_incoming_shutdown(incoming, async {
            // A dropped sender means the same.
            let _ = stop.await;
        });
    Ok(tokio::spawn(server))
}

/// Makes the compiler of grammars, so that no request has to wait for it.
async fn warm_grammars(context: Arc<Context>) {
    let shared = context.clone();
    let make = move || {
        if let Some(text) = &shared.model.text
            && let Err(error) = text.grammars()
        {
            tracing::warn!(%error, "output of this model cannot be constrained");
        }
        Ok(())
    };
    // The queue is empty at the start; without it, the first request makes the compiler.
    let _ = context.pool.grammar(make).await;
}

/// Serving from the first epoch on, whatever the cluster goes through: requests wait, they are not refused.
async fn report_health(reporter: HealthReporter, mut view: watch::Receiver<View>) {
    loop {
        let status = {
            let view = view.borrow_and_update();
            if view.has_served && !view.draining {
                ServingStatus::Serving
            } else {
                ServingStatus::NotServing
            }
        };
        reporter.set_service_status("", status).await;
        reporter.set_service_status(SERVICE, status).await;
        if view.changed().await.is_err() {
            return;
        }
    }
}

struct SequencerParts {
    core: CoreConfig,
    model: Arc<Model>,
    metrics: Arc<Metrics>,
    channels: Channels,
    registry: Arc<Registry>,
    inputs: mpsc::Sender<Input>,
    listener: TcpListener,
}

/// The sequencer and the workers' streams share one thread with a runtime of its own: a step's result reaches the
/// core without changing threads, and no client can keep it from running.
fn start_sequencer(parts: SequencerParts, config: &RouterConfig) -> Result<oneshot::Receiver<()>> {
    let failed = |source| RouterError::Start {
        what: "the sequencer's thread",
        source,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    let clock = Clock::start();
    let limits = Limits {
        heartbeat_timeout: config.heartbeat_timeout,
        vocab: parts.model.vocab,
        max_model_len: parts.model.max_model_len,
    };
    let service = ClusterService::new(
        parts.registry,
        parts.inputs,
        clock,
        limits,
        config.heartbeat_interval,
        config.expected_workers,
    );
    let service = ClusterServer::new(service)
        .max_decoding_message_size(server::MAX_WORKER_MESSAGE_BYTES)
        .max_encoding_message_size(server::MAX_STEP_BYTES);
    let machine = Machine::new(
        parts.core,
        parts.model.layers,
        config.transport.clone(),
        clock,
        parts.metrics,
        parts.channels,
    );
    let incoming = {
        let _inside = runtime.enter();
        let strangers = Strangers::new(server::MAX_STRANGERS, net::HANDSHAKE_TIMEOUT);
        net::incoming(
            parts.listener,
            server::MAX_WORKER_CONNECTIONS + server::MAX_STRANGERS,
            Demand::Proof(strangers),
        )?
    };
    let (ended, has_ended) = oneshot::channel();
    let body = move || {
        // Dropped when the thread ends, also by a panic.
        let _ended: oneshot::Sender<()> = ended;
        runtime.block_on(async {
            let (stop, stopped) = oneshot::channel::<()>();
            let server = server::for_workers()
                .add_service(service)
                .serve_with_incoming_shutdown(incoming, async {
                    let _ = stopped.await;
                });
            let server = tokio::spawn(server);
            machine.run().await;
            drop(stop);
            // Let the workers' last messages out.
            if timeout(FLUSH_TIMEOUT, server).await.is_err() {
                tracing::warn!("workers kept their streams open after they were told to shut down");
            }
        });
    };
    thread::Builder::new()
        .name("sequencer".into())
        .spawn(body)
        .map_err(failed)?;
    Ok(has_ended)
}
