//! A gateway's life: bind, serve, drain, end.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use crate::app::App;
use crate::config::GatewayConfig;
use crate::http::auth::{self, Keys};
use crate::http::body::BodyBudget;
use crate::http::edge;
use crate::metrics::Metrics;
use crate::net::{self, Connections, Tls, accept_loop};
use crate::responses::Store;
use crate::routes;
use crate::upstream::Upstream;

/// Streams that are cut at the end of the drain get so long to take their last event.
const FAREWELL: Duration = Duration::from_secs(2);

/// A gateway that has its port and does not serve yet.
pub struct Gateway {
    listener: TcpListener,
    address: SocketAddr,
    app: Arc<App>,
    tls: Option<Arc<Tls>>,
    draining: watch::Sender<bool>,
    /// True when running requests must end.
    cut: watch::Sender<bool>,
}

impl Gateway {
    /// Takes the port and checks the configuration. Routers need not answer yet.
    ///
    /// # Errors
    /// An address in use, a router address or a key file that is no good; the message names it.
    pub async fn bind(config: GatewayConfig) -> anyhow::Result<Self> {
        let metrics = Arc::new(Metrics::new());
        let (draining, draining_seen) = watch::channel(false);
        let (cut, cut_seen) = watch::channel(false);
        let upstream = Arc::new(Upstream::new(&config.routers, metrics.clone(), cut_seen)?);
        let keys = Keys::new(&config.api_keys, config.api_key_file.clone(), config.key_limits)?;
        for origin in &config.cors_origins {
            http::HeaderValue::from_str(origin)
                .with_context(|| format!("cors origin {origin:?}: not valid"))?;
        }
        let tls = match &config.tls {
            None => None,
            Some(files) => Some(Arc::new(Tls::new(files.clone())?)),
        };
        let listener = TcpListener::bind(config.listen).await.with_context(|| {
            format!(
                "cannot listen on {} for HTTP; choose another --host or --port, or port 0 for any free one",
                config.listen
            )
        })?;
        let address = listener
            .local_addr()
            .context("listen: the socket has no address")?;
        let bodies = BodyBudget::new(&config.limits);
        let responses = Store::new(&config.limits);
        let app = Arc::new(App {
            config,
            upstream,
            keys,
            bodies,
            responses,
            metrics,
            draining: draining_seen,
        });
        Ok(Self {
            listener,
            address,
            app,
            tls,
            draining,
            cut,
        })
    }

    /// Where the gateway listens, with the port the system chose.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` resolves and what ran then has ended, or the drain time is over.
    ///
    /// # Errors
    /// The accept loop failed, which is a defect.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        let Self {
            listener,
            address,
            app,
            tls,
            draining,
            cut,
        } = self;
        let mut background = JoinSet::new();
        background.spawn(watch_keys(app.clone()));
        if let Some(tls) = tls.clone() {
            background.spawn(watch_tls(tls));
        }
        app.upstream.spawn_watch(&mut background);
        let connections = Arc::new(Connections {
            service: service(app.clone()),
            limits: app.config.limits.clone(),
            tls,
            metrics: app.metrics.clone(),
        });
        tracing::info!(%address, routers = ?app.config.routers, keys = !app.keys.open(), "gateway serves HTTP");
        let (stop, stopped) = oneshot::channel::<()>();
        let mut accepting = tokio::spawn(accept_loop(listener, connections, async {
            // A dropped sender means the same as a sent word.
            stopped.await.unwrap_or_default();
        }));
        tokio::select! {
            () = shutdown => {}
            ended = &mut accepting => return ended.context("the accept loop failed"),
        }
        tracing::info!(timeout = ?app.config.drain_timeout, "gateway drains");
        draining.send_replace(true);
        drop(stop);
        if tokio::time::timeout(app.config.drain_timeout, &mut accepting)
            .await
            .is_err()
        {
            tracing::warn!("requests were still running at the end of the drain time");
            cut.send_replace(true);
            if tokio::time::timeout(FAREWELL, &mut accepting).await.is_err() {
                accepting.abort();
            }
        }
        Ok(())
    }
}

/// [`Gateway::bind`] and [`Gateway::serve`] in one.
///
/// # Errors
/// Those of the two.
pub async fn run(config: GatewayConfig, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    Gateway::bind(config).await?.serve(shutdown).await
}

/// What stands behind every connection: the routes, and around each what [`edge`] does.
fn service(app: Arc<App>) -> axum::Router {
    let around = axum::middleware::from_fn_with_state(app.clone(), edge::around);
    let router = routes::router().layer(around);
    let router = match edge::cors(&app.config.cors_origins) {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router.with_state(app)
}

async fn watch_keys(app: Arc<App>) {
    loop {
        tokio::time::sleep(auth::RELOAD_INTERVAL).await;
        if let Err(error) = app.keys.reload() {
            // The keys in force stay: a file that is being replaced must not lock everybody out.
            tracing::warn!(error = format!("{error:#}"), "api keys not reloaded");
        }
    }
}

async fn watch_tls(tls: Arc<Tls>) {
    loop {
        tokio::time::sleep(net::RELOAD_INTERVAL).await;
        if let Err(error) = tls.reload() {
            // The certificate in force stays: the two files are seldom replaced at one instant.
            tracing::warn!(error = format!("{error:#}"), "certificate not reloaded");
        }
    }
}
