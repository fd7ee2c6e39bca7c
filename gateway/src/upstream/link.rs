//! One router: its channel, and what is known about it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use conclave_proto::v1;
use conclave_proto::v1::conclave_client::ConclaveClient;
use tonic::transport::{Channel, Endpoint};

use super::choose::{Fading, REQUEST_BYTES, Tier};
use super::status;

pub(crate) use v1::health_response::State;

/// A prompt of 200,000 tokens with 20 log-probabilities each comes in one message of about 80 MB.
const RECEIVE_BYTES_MAX: usize = 128 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A router whose machine vanished is noticed within two of these.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Calls share one connection: its window must hold more than one stream's.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Probes and descriptions are small; a router that takes longer is not well.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// One router.
pub(super) struct Link {
    /// As configured, or one of the addresses that a configured name stands for.
    pub(super) address: String,
    /// Its bit in the prefix table.
    pub(super) slot: u8,
    client: ConclaveClient<Channel>,
    known: Mutex<Known>,
    /// Calls that run there.
    in_flight: AtomicUsize,
}

struct Known {
    tier: Tier,
    /// Names of the models it serves; `None` until it said so.
    models: Option<Vec<String>>,
    /// Requests in its queue, of all its clients.
    waiting: u32,
    work: Fading,
    /// Its start, by which a restarted router is known.
    created: i64,
}

impl Link {
    /// Connects lazily: the router may come later, and come back.
    pub(super) fn new(address: &str, slot: u8) -> anyhow::Result<Self> {
        let channel = endpoint(address)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .connect_lazy();
        let client = ConclaveClient::new(channel).max_decoding_message_size(RECEIVE_BYTES_MAX);
        let work = Fading::new(Instant::now());
        let known = Known {
            tier: Tier::Unknown,
            models: None,
            waiting: 0,
            work,
            created: 0,
        };
        Ok(Self {
            address: address.to_owned(),
            slot,
            client,
            known: Mutex::new(known),
            in_flight: AtomicUsize::new(0),
        })
    }

    pub(super) fn client(&self) -> ConclaveClient<Channel> {
        self.client.clone()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tier(&self) -> Tier {
        self.known().tier
    }

    /// Work done lately and work at hand, in bytes.
    pub(super) fn load(&self, now: Instant) -> f64 {
        let known = self.known();
        let at_hand = self.in_flight.load(Ordering::Relaxed) as f64 + f64::from(known.waiting);
        known.work.value(now) + at_hand * REQUEST_BYTES
    }

    /// Whether it serves a model of this name, as far as is known.
    pub(super) fn may_serve(&self, model: &str) -> bool {
        let known = self.known();
        known
            .models
            .as_ref()
            .is_none_or(|names| names.iter().any(|name| name == model))
    }

    /// A call could not reach it: it is away until a probe says otherwise.
    pub(super) fn set_away(&self) {
        self.known().tier = Tier::Away;
    }

    /// Counts a call's work, until the guard is dropped as work at hand.
    pub(super) fn begin(self: &Arc<Self>, bytes: u64) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        self.known()
            .work
            .add(Instant::now(), bytes as f64 + REQUEST_BYTES);
        InFlight(self.clone())
    }

    /// Looks after the router until dropped. Calls `restarted` when it lost its memory.
    pub(super) async fn watch(self: Arc<Self>, restarted: impl Fn(u8) + Send) {
        loop {
            let health = self.health(PROBE_TIMEOUT).await;
            // Each time: a router may restart, with other models, between two probes.
            let info = match &health {
                Ok(_) => self.model_info(PROBE_TIMEOUT).await.ok(),
                Err(_) => None,
            };
            if let Some(info) = info {
                let mut known = self.known();
                if known.created != 0 && known.created != info.created {
                    restarted(self.slot);
                }
                known.created = info.created;
                known.models = Some(info.names);
            }
            self.learn(health);
            tokio::time::sleep(PROBE_INTERVAL).await;
        }
    }

    fn learn(&self, health: Result<v1::HealthResponse, tonic::Status>) {
        let (tier, waiting, reason) = match health {
            Ok(health) => {
                let tier = match health.state() {
                    State::Serving => Tier::Serving,
                    State::Starting | State::Parked | State::Unspecified => Tier::Waiting,
                    State::Draining => Tier::Away,
                };
                (tier, health.waiting, health.detail)
            }
            Err(status) => (Tier::Away, 0, status::message(&status)),
        };
        let mut known = self.known();
        let before = std::mem::replace(&mut known.tier, tier);
        known.waiting = waiting;
        drop(known);
        if before != tier {
            tracing::info!(router = self.address, ?before, now = ?tier, reason, "router changed");
        }
    }

    pub(super) async fn health(&self, timeout: Duration) -> Result<v1::HealthResponse, tonic::Status> {
        within(timeout, async {
            self.client().health(v1::HealthRequest {}).await
        })
        .await
    }

    pub(super) async fn model_info(&self, timeout: Duration) -> Result<v1::ModelInfoResponse, tonic::Status> {
        within(timeout, async {
            self.client().model_info(v1::ModelInfoRequest {}).await
        })
        .await
    }

    pub(super) async fn metrics(&self, timeout: Duration) -> Result<String, tonic::Status> {
        let call = async { self.client().metrics(v1::MetricsRequest {}).await };
        within(timeout, call).await.map(|response| response.text)
    }
}

/// A call's share of a router's load.
pub(super) struct InFlight(Arc<Link>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Checks an address: `host:port`, with or without `http://`.
pub(super) fn endpoint(address: &str) -> anyhow::Result<Endpoint> {
    let with_scheme = if address.contains("://") {
        address.to_owned()
    } else {
        format!("http://{address}")
    };
    let endpoint = Endpoint::from_shared(with_scheme)
        .with_context(|| format!("router {address:?}: not an address like http://host:port"))?;
    anyhow::ensure!(
        endpoint.uri().port().is_some(),
        "router {address:?}: the port is missing (http://host:port)"
    );
    anyhow::ensure!(
        endpoint.uri().scheme_str() == Some("http"),
        "router {address:?}: only http:// is served between gateway and router"
    );
    Ok(endpoint)
}

async fn within<T>(
    timeout: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, tonic::Status> {
    match tokio::time::timeout(timeout, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(tonic::Status::unavailable(format!(
            "the router did not answer within {timeout:?}"
        ))),
    }
}
