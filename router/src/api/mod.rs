//! The clients' side: `conclave.v1.Conclave`.
//!
//! Must stay true: every request is checked before anything is done for it; text work happens on the pool; a client
//! that goes away is noticed by its future or its stream being dropped, and that ends its sequences.

pub mod chat;
pub mod errors;
mod generate;
mod limits;
mod prompt;
mod validate;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use conclave_proto::v1 as pb;
use conclave_proto::v1::conclave_server::Conclave;
use conclave_router_core::api::ClusterState;
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use crate::cluster::Registry;
use crate::metrics::Metrics;
use crate::model::Model;
use crate::pool::TextPool;
use crate::sequencer::{self, Input};
use crate::stream::ResponseStream;

/// What all calls share.
pub struct Context {
    pub model: Arc<Model>,
    pub sequencer: sequencer::Handle,
    pub registry: Arc<Registry>,
    pub pool: TextPool,
    pub metrics: Arc<Metrics>,
    pub next_sequence: AtomicU64,
    pub keep_alive_interval: Duration,
    pub log_prompts: bool,
    pub started: SystemTime,
}

/// The `conclave.v1.Conclave` service.
#[derive(Clone)]
pub struct ConclaveService {
    context: Arc<Context>,
}

impl ConclaveService {
    pub fn new(context: Arc<Context>) -> ConclaveService {
        ConclaveService { context }
    }

    fn check_model(&self, name: &str) -> Result<(), Status> {
        let model = &self.context.model;
        if model.serves(name) {
            return Ok(());
        }
        Err(errors::unknown_model(name, &model.names))
    }
}

#[tonic::async_trait]
impl Conclave for ConclaveService {
    type GenerateStream = ResponseStream;

    async fn generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let result = generate::generate(&self.context, request).await;
        if let Err(status) = &result {
            self.context.metrics.refused(status.code());
        }
        result.map(Response::new)
    }

    async fn tokenize(
        &self,
        request: Request<pb::TokenizeRequest>,
    ) -> Result<Response<pb::TokenizeResponse>, Status> {
        let request = request.into_inner();
        self.check_model(&request.model)?;
        prompt::tokenize(&self.context, request).await.map(Response::new)
    }

    async fn detokenize(
        &self,
        request: Request<pb::DetokenizeRequest>,
    ) -> Result<Response<pb::DetokenizeResponse>, Status> {
        let request = request.into_inner();
        self.check_model(&request.model)?;
        prompt::detokenize(&self.context, request)
            .await
            .map(Response::new)
    }

    async fn model_info(
        &self,
        _request: Request<pb::ModelInfoRequest>,
    ) -> Result<Response<pb::ModelInfoResponse>, Status> {
        let context = &self.context;
        let model = &context.model;
        let created = context.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Response::new(pb::ModelInfoResponse {
            names: model.names.clone(),
            max_model_len: model.max_model_len,
            vocab_size: model.vocab,
            family: model.spec.family.clone(),
            checkpoint_id: context.registry.checkpoint_id().unwrap_or_default(),
            has_tokenizer: model.text.is_some(),
            workers: context.sequencer.view.borrow().workers,
            version: env!("CARGO_PKG_VERSION").into(),
            created: i64::try_from(created.as_secs()).unwrap_or(i64::MAX),
        }))
    }

    async fn health(
        &self,
        _request: Request<pb::HealthRequest>,
    ) -> Result<Response<pb::HealthResponse>, Status> {
        use pb::health_response::State;
        let view = self.context.sequencer.view.borrow().clone();
        let state = match view.state {
            _ if view.draining => State::Draining,
            ClusterState::Starting => State::Starting,
            // The first epoch: nothing has been served yet.
            ClusterState::Forming { .. } if !view.has_served => State::Starting,
            ClusterState::Forming { .. } | ClusterState::Serving { .. } => State::Serving,
            ClusterState::Parked => State::Parked,
        };
        Ok(Response::new(pb::HealthResponse {
            state: state.into(),
            epoch: view.epoch.0,
            workers: view.workers,
            running: view.running,
            waiting: view.waiting,
            detail: self.context.registry.describe(),
        }))
    }

    async fn metrics(
        &self,
        _request: Request<pb::MetricsRequest>,
    ) -> Result<Response<pb::MetricsResponse>, Status> {
        let (reply, answer) = oneshot::channel();
        let inputs = &self.context.sequencer.inputs;
        if inputs.send(Input::Inspect(reply)).await.is_err() {
            return Err(errors::draining());
        }
        let inspection = answer.await.map_err(|_| errors::draining())?;
        let text = self.context.metrics.text_with(&inspection);
        Ok(Response::new(pb::MetricsResponse { text }))
    }
}
