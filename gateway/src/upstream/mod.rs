//! Calls to routers over gRPC `conclave.v1`: one router or many, by model, prefix and load.
//!
//! What must stay true: every call has a bound on what it receives; a call ends when its caller drops it; a
//! stream that ends without the router's last word is an error, never an end; a call is repeated at another
//! router only while nothing of its answer was given out.

mod choose;
mod link;
mod pool;
mod prefix;
mod status;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use conclave_proto::v1;
use futures::future::join_all;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Code;

pub(crate) use self::link::State;
use self::link::{Link, PROBE_TIMEOUT};
use self::pool::Pool;
pub(crate) use self::stream::{Event, GenerateStream};
use crate::http::context::RequestContext;
use crate::http::error::{ApiError, ApiResult};
use crate::metrics::{Metrics, RouterLabels};

/// Tokenizing a long prompt is the slowest of the unary calls.
const UNARY_TIMEOUT: Duration = Duration::from_secs(60);
/// Routers that are asked to take one request.
const TRIES_MAX: usize = 3;

/// The routers this gateway stands before.
pub(crate) struct Upstream {
    pool: Arc<Pool>,
    metrics: Arc<Metrics>,
    cut: watch::Receiver<bool>,
}

impl Upstream {
    pub(crate) fn new(
        addresses: &[String],
        metrics: Arc<Metrics>,
        cut: watch::Receiver<bool>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            pool: Arc::new(Pool::new(addresses)?),
            metrics,
            cut,
        })
    }

    /// Watches the routers until the tasks are dropped.
    pub(crate) fn spawn_watch(&self, tasks: &mut JoinSet<()>) {
        tasks.spawn(self.pool.clone().watch());
    }

    /// Starts one Generate call. The router's refusal may come here or as the stream's first item.
    pub(crate) async fn generate(
        self: &Arc<Self>,
        request: v1::GenerateRequest,
        context: &RequestContext,
    ) -> ApiResult<GenerateStream> {
        let mut stream = GenerateStream::new(self.clone(), request, context.clone());
        stream.connect().await?;
        Ok(stream)
    }

    pub(crate) async fn tokenize(
        &self,
        request: v1::TokenizeRequest,
        context: &RequestContext,
    ) -> ApiResult<v1::TokenizeResponse> {
        self.unary(&request.model, |link| {
            let request = prepare(request.clone(), context, Some(UNARY_TIMEOUT));
            async move { link.client().tokenize(request).await }
        })
        .await
    }

    pub(crate) async fn detokenize(
        &self,
        request: v1::DetokenizeRequest,
        context: &RequestContext,
    ) -> ApiResult<v1::DetokenizeResponse> {
        self.unary(&request.model, |link| {
            let request = prepare(request.clone(), context, Some(UNARY_TIMEOUT));
            async move { link.client().detokenize(request).await }
        })
        .await
    }

    /// Asks routers that serve `model`, one after the other until one can be reached.
    async fn unary<T, F>(&self, model: &str, call: impl Fn(Arc<Link>) -> F) -> ApiResult<T>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let plan = self.pool.plan(&v1::GenerateRequest {
            model: model.to_owned(),
            ..Default::default()
        });
        let mut failed = None;
        for choice in plan.choices.into_iter().take(TRIES_MAX) {
            match call(choice.link).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) if status.code() == Code::Unavailable => failed = Some(status),
                Err(status) => return Err(status::to_api(&status)),
            }
        }
        let nobody = || tonic::Status::unavailable("no router is known");
        Err(status::to_api(&failed.unwrap_or_else(nobody)))
    }

    /// What each router that answers serves.
    ///
    /// # Errors
    /// None answered.
    pub(crate) async fn models(&self) -> ApiResult<Vec<v1::ModelInfoResponse>> {
        let mut infos = Vec::new();
        let mut failed = None;
        for answer in join_all(
            self.pool
                .links()
                .iter()
                .map(|link| link.model_info(PROBE_TIMEOUT)),
        )
        .await
        {
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
        join_all(self.pool.links().iter().map(|link| async {
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
        let links = self.pool.links();
        let texts = join_all(links.iter().map(|link| async {
            let text = link.metrics(PROBE_TIMEOUT).await.ok()?;
            Some((link.address.clone(), text))
        }));
        texts.await.into_iter().flatten().collect()
    }

    fn count(&self, link: &Link, outcome: &'static str) {
        let labels = RouterLabels {
            router: link.address.clone(),
            outcome,
        };
        self.metrics.router_calls.get_or_create(&labels).inc();
    }
}

fn prepare<T>(message: T, context: &RequestContext, timeout: Option<Duration>) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    context.trace.write(request.metadata_mut());
    let now = tokio::time::Instant::now();
    let left = context
        .deadline
        .map(|deadline| deadline.saturating_duration_since(now));
    let timeout = match (left, timeout) {
        (Some(left), Some(timeout)) => Some(left.min(timeout)),
        (left, timeout) => left.or(timeout),
    };
    if let Some(timeout) = timeout {
        request.set_timeout(timeout);
    }
    request
}

fn timed_out() -> ApiError {
    ApiError::new(
        http::StatusCode::GATEWAY_TIMEOUT,
        "the request took longer than this server allows",
    )
    .code("request_timeout")
}
