//! A scripted router: a real tonic server of `conclave.v1`, whose answers a test writes down.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use conclave_gateway::{Gateway, GatewayConfig};
use conclave_proto::v1;
use conclave_proto::v1::conclave_server::{Conclave, ConclaveServer};
use conclave_proto::v1::generate_response::Event;
use conclave_proto::v1::health_response::State;
use futures::Stream;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::client::Client;

/// What the router does next on a Generate call.
#[derive(Clone, Debug)]
pub enum Step {
    Say(Event),
    Wait(Duration),
    /// Ends the call with this status.
    Fail(Status),
    /// Says nothing more until the caller goes away.
    Hang,
}

type Script = dyn Fn(&v1::GenerateRequest) -> Result<Vec<Step>, Status> + Send + Sync;

/// What tests look at afterwards.
#[derive(Default)]
pub struct Seen {
    pub generate: Mutex<Vec<v1::GenerateRequest>>,
    pub tokenize: Mutex<Vec<v1::TokenizeRequest>>,
    pub metadata: Mutex<Vec<MetadataMap>>,
    /// Calls that the caller dropped before their script was done.
    pub dropped: AtomicUsize,
    pub running: AtomicUsize,
    /// Times that its health was asked.
    pub probes: AtomicUsize,
    /// What it serves, if not the usual.
    pub names: Mutex<Vec<String>>,
}

impl Seen {
    /// The one Generate request that came.
    pub fn only(&self) -> v1::GenerateRequest {
        let requests = self.generate.lock().unwrap();
        assert_eq!(requests.len(), 1, "one request expected");
        requests[0].clone()
    }
}

pub struct Scripted {
    script: Arc<Script>,
    seen: Arc<Seen>,
    health: State,
}

#[tonic::async_trait]
impl Conclave for Scripted {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        self.seen
            .metadata
            .lock()
            .unwrap()
            .push(request.metadata().clone());
        let request = request.into_inner();
        let steps = (self.script)(&request);
        self.seen.generate.lock().unwrap().push(request);
        let steps = steps?;
        let (sender, receiver) = mpsc::channel(1);
        let seen = self.seen.clone();
        seen.running.fetch_add(1, Ordering::SeqCst);
        tokio::spawn(async move {
            for step in steps {
                let sent = match step {
                    Step::Say(event) => sender
                        .send(Ok(v1::GenerateResponse { event: Some(event) }))
                        .await
                        .is_ok(),
                    Step::Fail(status) => sender.send(Err(status)).await.is_ok(),
                    Step::Wait(pause) => {
                        tokio::select! {
                            () = sender.closed() => false,
                            () = tokio::time::sleep(pause) => true,
                        }
                    }
                    Step::Hang => {
                        sender.closed().await;
                        false
                    }
                };
                if !sent {
                    seen.dropped.fetch_add(1, Ordering::SeqCst);
                    break;
                }
            }
            seen.running.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let request = request.into_inner();
        let token_strs = if request.return_token_strs {
            vec![String::from("a"), String::from("b")]
        } else {
            vec![]
        };
        self.seen.tokenize.lock().unwrap().push(request);
        Ok(Response::new(v1::TokenizeResponse {
            token_ids: vec![5, 6],
            max_model_len: 4096,
            token_strs,
            text: String::new(),
        }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let text = request
            .into_inner()
            .token_ids
            .iter()
            .map(|id| format!("<{id}>"))
            .collect();
        Ok(Response::new(v1::DetokenizeResponse { text }))
    }

    async fn model_info(
        &self,
        _: Request<v1::ModelInfoRequest>,
    ) -> Result<Response<v1::ModelInfoResponse>, Status> {
        let mut names = self.seen.names.lock().unwrap().clone();
        if names.is_empty() {
            names = vec![String::from("demo"), String::from("org/alias")];
        }
        Ok(Response::new(v1::ModelInfoResponse {
            names,
            max_model_len: 4096,
            created: 1_700_000_000,
            ..Default::default()
        }))
    }

    async fn health(&self, _: Request<v1::HealthRequest>) -> Result<Response<v1::HealthResponse>, Status> {
        self.seen.probes.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(v1::HealthResponse {
            state: self.health.into(),
            workers: 2,
            ..Default::default()
        }))
    }

    async fn metrics(&self, _: Request<v1::MetricsRequest>) -> Result<Response<v1::MetricsResponse>, Status> {
        let text =
            String::from("# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 3\n# EOF\n");
        Ok(Response::new(v1::MetricsResponse { text }))
    }
}

/// A gateway in front of a scripted router. Both end when it is dropped.
pub struct Setup {
    pub client: Client,
    pub seen: Arc<Seen>,
    pub stop: Option<oneshot::Sender<()>>,
    pub served: tokio::task::JoinHandle<anyhow::Result<()>>,
    _router: oneshot::Sender<()>,
}

pub async fn serve_router(
    health: State,
    script: impl Fn(&v1::GenerateRequest) -> Result<Vec<Step>, Status> + Send + Sync + 'static,
) -> (SocketAddr, Arc<Seen>, oneshot::Sender<()>) {
    let seen = Arc::new(Seen::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (router, gone) = oneshot::channel::<()>();
    let service = ConclaveServer::new(Scripted {
        script: Arc::new(script),
        seen: seen.clone(),
        health,
    })
    .max_decoding_message_size(32 << 20);
    tokio::spawn(async move {
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::select! {
            ended = server.serve_with_incoming(TcpListenerStream::new(listener)) => ended.unwrap(),
            _ = gone => {}
        }
    });
    (address, seen, router)
}

/// [`start_with`] and the default configuration.
pub async fn start(
    script: impl Fn(&v1::GenerateRequest) -> Result<Vec<Step>, Status> + Send + Sync + 'static,
) -> Setup {
    start_with(|_| {}, script).await
}

/// A gateway whose router answers every request the same way.
pub async fn start_saying(events: Vec<Event>) -> Setup {
    start(move |_| Ok(say(events.clone()))).await
}

pub async fn start_with(
    configure: impl FnOnce(&mut GatewayConfig),
    script: impl Fn(&v1::GenerateRequest) -> Result<Vec<Step>, Status> + Send + Sync + 'static,
) -> Setup {
    let (router_address, seen, router) = serve_router(State::Serving, script).await;
    let mut config = GatewayConfig::new(
        SocketAddr::from(([127, 0, 0, 1], 0)),
        vec![format!("http://{router_address}")],
    );
    configure(&mut config);
    let gateway = Gateway::bind(config).await.unwrap();
    let client = Client::new(gateway.local_addr());
    let (stop, stopped) = oneshot::channel();
    let served = tokio::spawn(gateway.serve(async {
        // Also when the test is over and drops its end.
        stopped.await.unwrap_or(());
    }));
    Setup {
        client,
        seen,
        stop: Some(stop),
        served,
        _router: router,
    }
}

pub fn say(events: Vec<Event>) -> Vec<Step> {
    events.into_iter().map(Step::Say).collect()
}

pub fn started(prompt: &[u32]) -> Event {
    Event::Started(v1::Started {
        model: String::from("demo"),
        prompt_token_ids: prompt.to_vec(),
        ..Default::default()
    })
}

pub fn text(index: u32, text: &str, ids: &[u32]) -> Event {
    Event::Delta(v1::Delta {
        index,
        text: text.to_owned(),
        token_ids: ids.to_vec(),
        ..Default::default()
    })
}

/// Reasoning and text of the first choice.
pub fn piece(reasoning: &str, text: &str) -> Event {
    Event::Delta(v1::Delta {
        reasoning: reasoning.into(),
        text: text.into(),
        ..Default::default()
    })
}

/// A piece of a call of the first choice; id and name stand in the first one.
pub fn call(index: u32, id: &str, name: &str, arguments: &str) -> Event {
    let call = v1::ToolCallDelta {
        index,
        id: id.into(),
        name: name.into(),
        arguments: arguments.into(),
    };
    Event::Delta(v1::Delta {
        tool_calls: vec![call],
        ..Default::default()
    })
}

pub fn finished(index: u32, reason: v1::FinishReason) -> Event {
    Event::Finished(v1::Finished {
        index,
        reason: reason.into(),
        ..Default::default()
    })
}

pub fn usage(prompt: u32, completion: u32, cached: u32, reasoning: u32) -> Event {
    Event::Usage(v1::Usage {
        prompt_tokens: prompt,
        completion_tokens: completion,
        cached_tokens: cached,
        reasoning_tokens: reasoning,
    })
}

pub fn logprob(id: u32, token: &[u8], value: f32, rank: u32) -> v1::TokenLogprob {
    v1::TokenLogprob {
        token_id: id,
        logprob: value,
        token: token.to_vec().into(),
        rank,
    }
}

/// The shortest whole answer.
pub fn hello() -> Vec<Event> {
    vec![
        started(&[1, 2, 3]),
        text(0, "Hel", &[10]),
        text(0, "lo", &[11]),
        finished(0, v1::FinishReason::Stop),
        usage(3, 2, 1, 0),
    ]
}
