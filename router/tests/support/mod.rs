//! A router on loopback, clients of it, and a scripted worker that speaks the true `Attach` protocol: only its
//! token function is made up. Shared by all test files of this crate.
#![allow(dead_code, reason = "each test file uses its own part")]

pub mod worker;

use std::path::PathBuf;
use std::time::Duration;

use conclave_proto::v1::conclave_client::ConclaveClient;
use conclave_proto::v1::generate_response::Event;
use conclave_proto::v1::{self as pb, generate_request::Prompt};
use conclave_router::{Router, RouterConfig};
use tonic::transport::Channel;
use tonic::{Status, Streaming};

pub use worker::{Script, ScriptedWorker, next_token};

pub const TOKEN: &str = "a secret of the tests";
/// Facts of the tiny checkpoint.
pub const VOCAB: u32 = 384;
pub const MODEL_LEN: u32 = 4096;
pub const EOS: u32 = 2;

pub fn tiny() -> PathBuf {
    PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/data/minimax-m2/tiny-hd64/bf16"
    ))
}

/// Nothing in these tests takes longer, on a busy machine either, unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A configuration without a tokenizer, in which no machine is so busy that a worker seems lost.
pub fn config() -> RouterConfig {
    RouterConfig {
        heartbeat_timeout: 2 * PATIENCE,
        skip_tokenizer_init: true,
        cluster_token: TOKEN.into(),
        served_model_name: vec!["tiny".into(), "tiny-alias".into()],
        max_num_seqs: 8,
        max_num_batched_tokens: 256,
        max_waiting: 64,
        ..RouterConfig::new(tiny())
    }
}

pub struct Cluster {
    pub router: Router,
    pub client: ConclaveClient<Channel>,
    pub address: String,
}

impl Cluster {
    pub async fn start(config: RouterConfig) -> Cluster {
        let router = Router::start(config).await.unwrap();
        let address = format!("http://{}", router.client_address());
        let client = ConclaveClient::connect(address.clone()).await.unwrap();
        let client = client.max_decoding_message_size(128 << 20);
        Cluster {
            router,
            client,
            address,
        }
    }

    pub async fn with_worker(config: RouterConfig, script: Script) -> (Cluster, ScriptedWorker) {
        let cluster = Cluster::start(config).await;
        let worker = cluster.attach(script).await;
        cluster.serving().await;
        (cluster, worker)
    }

    pub async fn attach(&self, script: Script) -> ScriptedWorker {
        ScriptedWorker::attach(self.cluster_address(), script)
            .await
            .unwrap()
    }

    pub fn cluster_address(&self) -> String {
        format!("http://{}", self.router.cluster_address())
    }

    pub async fn serving(&self) {
        self.until(|view| {
            matches!(
                view.state,
                conclave_router_core::api::ClusterState::Serving { .. }
            )
        })
        .await;
    }

    /// Waits until the router's view of the cluster is as wanted.
    pub async fn until(&self, wanted: impl FnMut(&conclave_router::View) -> bool) {
        let mut view = self.router.view();
        let waited = tokio::time::timeout(PATIENCE, view.wait_for(wanted)).await;
        if waited.is_err() {
            panic!(
                "not within {PATIENCE:?}; the view is {:?}",
                self.router.view().borrow()
            );
        }
    }

    pub async fn generate(
        &self,
        request: pb::GenerateRequest,
    ) -> Result<Streaming<pb::GenerateResponse>, Status> {
        self.client
            .clone()
            .generate(request)
            .await
            .map(tonic::Response::into_inner)
    }

    pub async fn metric(&self, name: &str) -> f64 {
        let text = self
            .client
            .clone()
            .metrics(pb::MetricsRequest {})
            .await
            .unwrap()
            .into_inner()
            .text;
        let matching = |line: &&str| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        };
        let values: Vec<f64> = text
            .lines()
            .filter(matching)
            .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
            .collect();
        assert!(!values.is_empty(), "{name} is not in\n{text}");
        values.iter().sum()
    }
}

/// A request for `max_tokens` tokens after a prompt of token ids.
pub fn request(prompt: &[u32], max_tokens: i64) -> pb::GenerateRequest {
    pb::GenerateRequest {
        prompt: Some(Prompt::TokenIds(pb::TokenIds { ids: prompt.to_vec() })),
        sampling: Some(pb::SamplingParams {
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A request's sampling parameters, to be changed.
pub fn sampling(request: &mut pb::GenerateRequest) -> &mut pb::SamplingParams {
    request.sampling.get_or_insert_default()
}

/// The status of a request that must be refused.
pub async fn refused(cluster: &Cluster, request: pb::GenerateRequest) -> Status {
    match cluster.generate(request).await {
        Ok(_) => panic!("the request was accepted"),
        Err(status) => status,
    }
}

/// A whole answer.
#[derive(Debug, Default)]
pub struct Answer {
    pub started: Option<pb::Started>,
    /// By choice.
    pub tokens: Vec<Vec<u32>>,
    pub text: Vec<String>,
    pub reasoning: Vec<String>,
    /// Name and arguments.
    pub calls: Vec<Vec<(String, String)>>,
    pub logprobs: Vec<Vec<pb::TokenLogprobs>>,
    pub finished: Vec<Option<pb::Finished>>,
    pub usage: Option<pb::Usage>,
    pub keep_alives: usize,
    pub error: Option<Status>,
}

impl Answer {
    /// Reads a stream to its end.
    pub async fn read(stream: Streaming<pb::GenerateResponse>) -> Answer {
        Answer::default().rest(stream).await
    }

    /// The same, after what came already.
    pub async fn rest(self, mut stream: Streaming<pb::GenerateResponse>) -> Answer {
        let mut answer = self;
        loop {
            match stream.message().await {
                Ok(Some(response)) => answer.add(response.event.unwrap()),
                Ok(None) => return answer,
                Err(status) => {
                    answer.error = Some(status);
                    return answer;
                }
            }
        }
    }

    pub fn add(&mut self, event: Event) {
        match event {
            Event::Started(started) => {
                assert!(self.started.replace(started).is_none(), "two Started");
            }
            Event::Delta(delta) => {
                assert!(self.started.is_some(), "a delta before Started");
                let choice = self.choice(delta.index);
                assert!(self.finished[choice].is_none(), "a delta after Finished");
                self.tokens[choice].extend(delta.token_ids);
                self.text[choice].push_str(&delta.text);
                self.reasoning[choice].push_str(&delta.reasoning);
                self.logprobs[choice].extend(delta.logprobs);
                for call in delta.tool_calls {
                    let calls = &mut self.calls[choice];
                    if !call.id.is_empty() {
                        assert_eq!(call.index as usize, calls.len());
                        calls.push((call.name, String::new()));
                    }
                    calls[call.index as usize].1.push_str(&call.arguments);
                }
            }
            Event::Finished(finished) => {
                let choice = self.choice(finished.index);
                assert!(self.finished[choice].replace(finished).is_none(), "two Finished");
            }
            Event::Usage(usage) => assert!(self.usage.replace(usage).is_none(), "two Usage"),
            Event::KeepAlive(_) => self.keep_alives += 1,
        }
    }

    fn choice(&mut self, index: u32) -> usize {
        let choice = index as usize;
        while self.tokens.len() <= choice {
            self.tokens.push(Vec::new());
            self.text.push(String::new());
            self.reasoning.push(String::new());
            self.calls.push(Vec::new());
            self.logprobs.push(Vec::new());
            self.finished.push(None);
        }
        choice
    }

    pub fn reason(&self, choice: usize) -> pb::FinishReason {
        self.finished[choice].as_ref().unwrap().reason()
    }
}

/// What the scripted worker's tokens after `prompt` are.
pub fn expected(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut last = *prompt.last().unwrap();
    let first = u32::try_from(prompt.len()).unwrap();
    (first..)
        .take(count)
        .map(|position| {
            last = next_token(last, position);
            last
        })
        .collect()
}
