//! Calls to routers over gRPC `conclave.v1`.
//!
//! What must stay true: every call has a bound on what it receives; a call ends when its caller drops it; a
//! stream that ends without the router's last word is an error, never an end.

mod link;
mod status;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use conclave_proto::v1;
use futures::future::join_all;
use tokio::sync::watch;
use tokio::task::JoinSet;

use self::link::Link;
pub(crate) use self::link::State;
pub(crate) use self::stream::{Event, GenerateStream};
use crate::http::context::RequestContext;
use crate::http::error::{ApiError, ApiResult};
use crate::metrics::Metrics;

/// Tokenizing a long prompt is the slowest of the unary calls.
const UNARY_TIMEOUT: Duration = Duration::from_secs(60);
/// Probes and descriptions are small; a router that takes longer is not well.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// The routers this gateway stands before.
pub(crate) struct Upstream {
    links: Vec<Arc<Link>>,
    metrics: Arc<Metrics>,
    cut: watch::Receiver<bool>,
}

impl Upstream {
    pub(crate) fn new(
        addresses: &[String],
        metrics: Arc<Metrics>,
        cut: watch::Receiver<bool>,
    ) -> anyhow::Result<Self> {
        anyhow::ensure!(!addresses.is_empty(), "router: at least one address is needed");
        let links = addresses
            .iter()
            .map(|address| Link::new(address).map(Arc::new))
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self { links, metrics, cut })
    }

    /// Starts one watcher per router.
    pub(crate) fn spawn_probes(&self, tasks: &mut JoinSet<()>) {
        for link in &self.links {
            tasks.spawn(link.clone().watch());
        }
    }

    fn link(&self) -> &Arc<Link> {
        &self.links[0]
    }

    /// Starts one Generate call. The router's refusal may come here or as the stream's first item.
    pub(crate) async fn generate(
        &self,
        request: v1::GenerateRequest,
        context: &RequestContext,
    ) -> ApiResult<GenerateStream> {
        let mut client = self.link().client();
        let call = client.generate(self.prepare(request, context, None));
        let response = bounded(context.deadline, call)
            .await?
            .map_err(|status| status::to_api(&status))?;
        Ok(GenerateStream::new(
            response.into_inner(),
            context.deadline,
            self.cut.clone(),
            self.metrics.clone(),
        ))
    }

    pub(crate) async fn tokenize(
        &self,
        request: v1::TokenizeRequest,
        context: &RequestContext,
    ) -> ApiResult<v1::TokenizeResponse> {
        let request = self.prepare(request, context, Some(UNARY_TIMEOUT));
        let response = self.link().client().tokenize(request).await;
        response
            .map(tonic::Response::into_inner)
            .map_err(|status| status::to_api(&status))
    }

    pub(crate) async fn detokenize(
        &self,
        request: v1::DetokenizeRequest,
        context: &RequestContext,
    ) -> ApiResult<v1::DetokenizeResponse> {
        let request = self.prepare(request, context, Some(UNARY_TIMEOUT));
        let response = self.link().client().detokenize(request).await;
        response
            .map(tonic::Response::into_inner)
            .map_err(|status| status::to_api(&status))
    }

    /// What each router that answers serves.
    ///
    /// # Errors
    /// None answered.
    pub(crate) async fn models(&self) -> ApiResult<Vec<v1::ModelInfoResponse>> {
        let mut infos = Vec::new();
        let mut failed = None;
        for answer in join_all(self.links.iter().map(|link| link.model_info(PROBE_TIMEOUT))).await {
            match answer {
                Ok(info) => infos.push(info),
                Err(status) => failed = Some(status::to_api(&status)),
            }
        }
        match failed {
            Some(error) if infos.is_empty() => Err(error),
            _ => Ok(infos),
        }
    }

    /// Each router's address and state, asked now.
    pub(crate) async fn health(&self) -> Vec<(String, Result<v1::HealthResponse, String>)> {
        join_all(self.links.iter().map(|link| async {
            let health = link.health(PROBE_TIMEOUT).await;
            (
                link.address.clone(),
                health.map_err(|status| status.message().to_owned()),
            )
        }))
        .await
    }

    /// Prometheus text of each router that answers.
    pub(crate) async fn metrics_texts(&self) -> Vec<(String, String)> {
        let texts = join_all(self.links.iter().map(|link| async {
            let text = link.metrics(PROBE_TIMEOUT).await.ok()?;
            Some((link.address.clone(), text))
        }));
        texts.await.into_iter().flatten().collect()
    }

    fn prepare<T>(
        &self,
        message: T,
        context: &RequestContext,
        timeout: Option<Duration>,
    ) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        context.trace.write(request.metadata_mut());
        let left = context
            .deadline
            .map(|deadline| deadline.saturating_duration_since(tokio::time::Instant::now()));
        let timeout = match (left, timeout) {
            (Some(left), Some(timeout)) => Some(left.min(timeout)),
            (left, timeout) => left.or(timeout),
        };
        if let Some(timeout) = timeout {
            request.set_timeout(timeout);
        }
        request
    }
}

/// Waits for `work` until `deadline`.
async fn bounded<T>(deadline: Option<tokio::time::Instant>, work: impl Future<Output = T>) -> ApiResult<T> {
    match deadline {
        None => Ok(work.await),
        Some(deadline) => tokio::time::timeout_at(deadline, work)
            .await
            .map_err(|_| timed_out()),
    }
}

fn timed_out() -> ApiError {
    ApiError::new(
        http::StatusCode::GATEWAY_TIMEOUT,
        "the request took longer than this server allows",
    )
    .code("request_timeout")
}
