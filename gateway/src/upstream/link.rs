//! One router: its channel and what is known about it.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use anyhow::Context as _;
use conclave_proto::v1;
use conclave_proto::v1::conclave_client::ConclaveClient;
use tonic::transport::{Channel, Endpoint};

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
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// One router's address, channel and last known state.
pub(super) struct Link {
    pub(super) address: String,
    client: ConclaveClient<Channel>,
    /// `None` until the first probe, and after one that failed.
    health: RwLock<Option<v1::HealthResponse>>,
}

impl Link {
    /// Connects lazily: the router may come later, and come back.
    pub(super) fn new(address: &str) -> anyhow::Result<Self> {
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
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .connect_lazy();
        let client = ConclaveClient::new(channel).max_decoding_message_size(RECEIVE_BYTES_MAX);
        Ok(Self {
            address: address.to_owned(),
            client,
            health: RwLock::new(None),
        })
    }

    pub(super) fn client(&self) -> ConclaveClient<Channel> {
        self.client.clone()
    }

    /// Looks after the router until dropped.
    pub(super) async fn watch(self: Arc<Self>) {
        let mut was_well = None;
        loop {
            let health = self.health(PROBE_TIMEOUT).await;
            let is_well = health.is_ok();
            if was_well != Some(is_well) {
                match &health {
                    Ok(health) => {
                        tracing::info!(router = self.address, state = ?health.state(), "router answers");
                    }
                    Err(error) => {
                        tracing::warn!(
                            router = self.address,
                            error = error.message(),
                            "router does not answer"
                        );
                    }
                }
                was_well = Some(is_well);
            }
            *self
                .health
                .write()
                .unwrap_or_else(std::sync::PoisonError::into_inner) = health.ok();
            tokio::time::sleep(PROBE_INTERVAL).await;
        }
    }

    pub(super) async fn health(&self, timeout: Duration) -> Result<v1::HealthResponse, tonic::Status> {
        let call = async { self.client().health(v1::HealthRequest {}).await };
        within(timeout, call).await
    }

    pub(super) async fn model_info(&self, timeout: Duration) -> Result<v1::ModelInfoResponse, tonic::Status> {
        let call = async { self.client().model_info(v1::ModelInfoRequest {}).await };
        within(timeout, call).await
    }

    pub(super) async fn metrics(&self, timeout: Duration) -> Result<String, tonic::Status> {
        let call = async { self.client().metrics(v1::MetricsRequest {}).await };
        within(timeout, call).await.map(|response| response.text)
    }
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
