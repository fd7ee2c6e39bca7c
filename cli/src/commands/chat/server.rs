//! Who answers: a server by URL, the one that runs at the usual place, or a local cluster started for this chat.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context, Result};
use conclave_proto::v1::conclave_client::ConclaveClient;
use conclave_proto::v1::{GenerateResponse, ModelInfoRequest};
use serde_json::Value;
use tokio::time::timeout;
use tonic::Streaming;
use tonic::transport::Channel;

use super::answer::Piece;
use super::conversation::Conversation;
use super::options::Options;
use super::{grpc, http};
use crate::grpc_client::{connect, refused};
use crate::http_client::{self, EventStream};
use crate::local_cluster::LocalCluster;
use crate::settings::ChatSettings;

/// Where `conclave serve` listens if nothing else is said.
const USUAL_ADDRESS: &str = "127.0.0.1:8000";
/// A server on this machine answers within this time, or is not there.
const USUAL_TIMEOUT: Duration = Duration::from_millis(500);

pub struct Server {
    link: Link,
    /// Asked for by name, if known.
    pub model: Option<String>,
    cluster: Option<LocalCluster>,
}

enum Link {
    /// host:port, and a key.
    Http(String, Option<String>),
    Grpc(String, ConclaveClient<Channel>),
}

impl Server {
    pub async fn reach(settings: &ChatSettings) -> Result<Server> {
        let key = settings.chat_api_key.clone();
        let (link, cluster) = match settings.url.as_deref() {
            Some(url) => match url.strip_prefix("grpc://") {
                Some(router) => (Link::Grpc(router.to_owned(), connect(router).await?), None),
                None => (Link::Http(http_client::address("url", url)?, key), None),
            },
            None if !gives_model(settings) && runs_at(USUAL_ADDRESS, key.as_deref()).await => {
                (Link::Http(USUAL_ADDRESS.to_owned(), key), None)
            }
            None => {
                eprintln!("starting a local cluster");
                let cluster = LocalCluster::start(&settings.model, &[]).await?;
                (Link::Http(cluster.http.clone(), None), Some(cluster))
            }
        };
        let mut server = Server {
            link,
            model: settings.served_model.clone(),
            cluster,
        };
        let first = server.first_model().await?;
        server.model = server.model.or(first);
        Ok(server)
    }

    /// The first served name, if the server tells.
    async fn first_model(&self) -> Result<Option<String>> {
        match &self.link {
            Link::Http(address, key) => {
                let text = http_client::get(address, key.as_deref(), "/v1/models").await?;
                let models: Value = serde_json::from_str(&text).context("/v1/models is no JSON")?;
                Ok(models["data"][0]["id"].as_str().map(str::to_owned))
            }
            Link::Grpc(_, client) => {
                let info = client.clone().model_info(ModelInfoRequest {}).await;
                let names = info.map_err(refused)?.into_inner().names;
                Ok(names.into_iter().next())
            }
        }
    }

    /// For people.
    pub fn place(&self) -> String {
        match &self.link {
            Link::Http(address, _) => format!("http://{address}"),
            Link::Grpc(address, _) => format!("grpc://{address}"),
        }
    }

    pub async fn answer(&self, conversation: &Conversation, options: &Options) -> Result<Pieces> {
        let source = match &self.link {
            Link::Http(address, key) => {
                Source::Http(http::answer(address, key.as_deref(), conversation, options).await?)
            }
            Link::Grpc(_, client) => Source::Grpc(grpc::answer(client, conversation, options).await?),
        };
        Ok(Pieces {
            source,
            ready: VecDeque::new(),
        })
    }

    /// Ends what was started for this chat.
    pub async fn end(self) -> Result<()> {
        match self.cluster {
            Some(cluster) => cluster.end().await,
            None => Ok(()),
        }
    }
}

fn gives_model(settings: &ChatSettings) -> bool {
    settings.model.checkpoint.path().is_some()
}

/// Whether a Conclave gateway answers there.
async fn runs_at(address: &str, key: Option<&str>) -> bool {
    let models = timeout(USUAL_TIMEOUT, http_client::get(address, key, "/v1/models")).await;
    let Ok(Ok(text)) = models else { return false };
    let models: Value = serde_json::from_str(&text).unwrap_or_default();
    models["data"][0]["owned_by"] == "conclave"
}

/// The pieces of one answer; dropping them cancels it.
pub struct Pieces {
    source: Source,
    ready: VecDeque<Piece>,
}

enum Source {
    Http(EventStream),
    Grpc(Streaming<GenerateResponse>),
}

impl Pieces {
    /// `None` at the end of a whole answer.
    pub async fn next(&mut self) -> Result<Option<Piece>> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Ok(Some(piece));
            }
            match &mut self.source {
                Source::Http(events) => match events.next().await? {
                    Some(event) => self.ready.extend(http::pieces(&event)),
                    None => return Ok(None),
                },
                Source::Grpc(stream) => match stream.message().await.map_err(refused)? {
                    Some(response) => self.ready.extend(grpc::pieces(response)?),
                    None => return Ok(None),
                },
            }
        }
    }
}
