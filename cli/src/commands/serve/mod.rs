//! `conclave serve`: router and gateway in this process, workers as its children.
//!
//! Must stay true: the ports are taken before anything is loaded, so that a port in use is told at once; after SIGTERM
//! what runs finishes within `--drain-timeout`, the workers are gone, and the exit status is 0.

mod arguments;
mod children;
mod places;
mod ready;
mod token;

use std::net::SocketAddr;
use std::pin::pin;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use conclave_gateway::Gateway;
use conclave_router::Router;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::model_path::{self, FoundModel};
use crate::settings::ServeSettings;
use crate::signals::{self, Shutdown};
use crate::{parent, parts};
pub use arguments::name_of;
use children::{Children, Phase};
use places::Places;

pub async fn run(settings: &ServeSettings) -> Result<()> {
    let shutdown = signals::shutdown()?;
    let found = model_path::find(&settings.model)?;
    let mut cluster = Cluster::start(settings, &found).await?;
    let ended = cluster.serve(settings, &found, &shutdown).await;
    let stopped = cluster.stop().await;
    ended.and(stopped)
}

/// All parts, running.
struct Cluster {
    started: Instant,
    router: Router,
    http: SocketAddr,
    gateway: JoinHandle<Result<()>>,
    children: Children,
    phase: watch::Sender<Phase>,
}

impl Cluster {
    async fn start(settings: &ServeSettings, found: &FoundModel) -> Result<Cluster> {
        let started = Instant::now();
        let (workers, note) = settings.parallel.asked().map_err(|problem| anyhow!(problem))?;
        if let Some(note) = note {
            tracing::info!("{note}");
        }
        if let Some(workers) = workers {
            check_workers(workers, settings, found)?;
        }
        let places = Places::choose(&settings.device.device, workers)?;
        let workers = places.workers;
        let token = token::draw()?;
        let mut config = parts::router(
            &settings.model,
            found,
            &settings.engine,
            &settings.cluster,
            &settings.drain,
        )?;
        config.listen = parts::socket_address("grpc_host", settings.grpc_host(), settings.grpc_port)?;
        if settings.http.needs_key() && !config.listen.ip().is_loopback() {
            tracing::warn!(
                grpc_host = settings.grpc_host(),
                "whoever reaches the gRPC port needs no key; keep it to a network of your own"
            );
        }
        config.cluster_token = token.clone();
        config.expected_workers = workers;
        let router = Router::start(config).await?;

        let own_router = format!("http://{}", reachable(router.client_address()));
        let gateway = parts::gateway(&settings.http, &settings.drain, vec![own_router])?;
        let gateway = Gateway::bind(gateway).await?;
        let http = gateway.local_addr();
        let (phase, phases) = watch::channel(Phase::Running);
        let mut gateway_phase = phases.clone();
        let gateway = tokio::spawn(gateway.serve(async move {
            // A dropped sender means the same.
            let _ = gateway_phase.wait_for(|&phase| phase != Phase::Running).await;
        }));
        let plan = children::Plan::new(settings, found, router.cluster_address(), token, &places)?;
        let children = children::start(plan, &router.view(), &phases);
        Ok(Cluster {
            started,
            router,
            http,
            gateway,
            children,
            phase,
        })
    }

    /// Until the process was asked to end, or cannot go on.
    async fn serve(
        &mut self,
        settings: &ServeSettings,
        found: &FoundModel,
        shutdown: &Shutdown,
    ) -> Result<()> {
        let mut view = self.router.view();
        let mut is_ready = false;
        let mut parent_gone = pin!(parent::gone());
        loop {
            tokio::select! {
                () = shutdown.asked() => return Ok(()),
                () = &mut parent_gone, if settings.child => return Ok(()),
                error = self.router.failed() => return Err(error.into()),
                reason = self.children.failed() => return Err(anyhow!(reason)),
                served = view.wait_for(|view| view.has_served), if !is_ready => {
                    let workers = served.context("the router ended")?.workers;
                    is_ready = true;
                    self.print_ready(settings, found, workers);
                }
            }
        }
    }

    fn print_ready(&self, settings: &ServeSettings, found: &FoundModel, workers: u32) {
        let name = settings.engine.served_model_name.first().unwrap_or(&found.name);
        ready::print(&ready::Ready {
            model: name,
            workers,
            seconds: self.started.elapsed().as_secs_f64(),
            http: self.http,
            grpc: self.router.client_address(),
            tls: settings.http.tls_cert.is_some(),
            needs_key: settings.http.needs_key(),
            needs_ids: settings.engine.skip_tokenizer_init,
        });
    }

    /// Gateway and router drain side by side, then the workers end.
    async fn stop(self) -> Result<()> {
        self.phase.send_replace(Phase::Draining);
        let (gateway, router) = tokio::join!(self.gateway, self.router.shut_down());
        self.phase.send_replace(Phase::Closing);
        self.children.ended().await;
        gateway.context("the gateway panicked")??;
        Ok(router?)
    }
}

/// Each worker holds some of the experts: more workers than experts would stand by and hold memory.
fn check_workers(workers: u32, settings: &ServeSettings, found: &FoundModel) -> Result<()> {
    let read = conclave_plan::config::read(&found.path, settings.model.hf_overrides.as_ref())?;
    let experts = read.spec.layers.iter().map(|layer| layer.moe.experts).max();
    let most = experts.unwrap_or(1);
    if workers as usize > most {
        bail!(
            "workers is {workers}: the model has {most} experts in a layer, and a worker without one has nothing to do; give at most {most}"
        );
    }
    Ok(())
}

/// Where this process reaches a port it listens on.
fn reachable(address: SocketAddr) -> SocketAddr {
    let mut address = address;
    if address.ip().is_unspecified() {
        let loopback = match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        };
        address.set_ip(loopback);
    }
    address
}
