//! The cluster under load: one that runs already, or one that is started for the run.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use conclave_proto::v1::conclave_client::ConclaveClient;
use conclave_proto::v1::{MetricsRequest, ModelInfoRequest};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::time::timeout;
use tonic::transport::Channel;

use super::http;
use crate::commands::generate::connect;
use crate::settings::{Backend, BenchSettings, LoadFormat};

/// A cluster that was started must be ready within this time: large models load for a while.
const READY_TIMEOUT: Duration = Duration::from_secs(600);
const STOP_TIMEOUT: Duration = Duration::from_secs(40);
/// Ids below this are drawn where the vocabulary's size cannot be asked for.
const SMALL_VOCAB: u32 = 256;

pub struct Target {
    /// host:port
    http: Option<String>,
    grpc: Option<ConclaveClient<Channel>>,
    pub vocab: u32,
    child: Mutex<Option<Child>>,
}

/// Seconds that the workers' devices ran steps, and stood still between them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BusyIdle {
    busy: f64,
    idle: f64,
}

impl BusyIdle {
    /// Sums over all workers, out of Prometheus text.
    fn read(text: &str) -> Option<BusyIdle> {
        let sum = |name: &str| {
            let values = text
                .lines()
                .filter(|line| line.starts_with(name))
                .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
            values.reduce(|a, b| a + b)
        };
        Some(BusyIdle {
            busy: sum("conclave:worker_busy_seconds")?,
            idle: sum("conclave:worker_idle_seconds")?,
        })
    }

    pub fn idle_share_since(&self, before: &BusyIdle) -> Option<f64> {
        let (busy, idle) = (self.busy - before.busy, self.idle - before.idle);
        (busy + idle > 0.0).then(|| idle / (busy + idle))
    }
}

impl Target {
    pub async fn reach(settings: &BenchSettings) -> Result<Arc<Target>> {
        let mut target = Target {
            http: None,
            grpc: None,
            vocab: SMALL_VOCAB,
            child: Mutex::new(None),
        };
        let grpc = match (&settings.load.base_url, settings.load.backend) {
            (None, _) => Some(target.start(settings).await?),
            (Some(url), Backend::Grpc) => Some(url.clone()),
            (Some(url), Backend::Openai) => {
                let Some(address) = url.strip_prefix("http://") else {
                    bail!("base_url is {url:?}: give http://host:port");
                };
                target.http = Some(address.trim_end_matches('/').to_owned());
                None
            }
        };
        if let Some(grpc) = grpc {
            let mut client = connect(&grpc).await?;
            target.vocab = client
                .model_info(ModelInfoRequest {})
                .await?
                .into_inner()
                .vocab_size;
            target.grpc = Some(client);
        }
        Ok(Arc::new(target))
    }

    /// Starts `serve` on free ports with the bench's model, workers and threads; gives its gRPC address.
    async fn start(&mut self, settings: &BenchSettings) -> Result<String> {
        let executable = std::env::current_exe().context("the path of this executable is not known")?;
        let mut command = Command::new(executable);
        command.args(["serve", "--port=0", "--grpc-port=0", "--log=warn"]);
        command.arg(format!("--workers={}", settings.workers));
        command.arg(format!("--threads={}", super::super::threads(settings)));
        let model = &settings.model;
        if let Some(path) = model.model_position.as_ref().or(model.model.as_ref()) {
            command.arg(path);
        }
        if let Some(overrides) = &model.hf_overrides {
            command.arg(format!("--hf-overrides={overrides}"));
        }
        if model.load_format == LoadFormat::Dummy {
            command.args(["--load-format=dummy", "--skip-tokenizer-init"]);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("`conclave serve` cannot be started")?;
        let output = child.stdout.take().context("its output cannot be read")?;
        *self.child.get_mut() = Some(child);
        let mut lines = BufReader::new(output).lines();
        let ready = timeout(READY_TIMEOUT, async {
            let mut grpc = None;
            while let Some(line) = lines.next_line().await? {
                if let Some(address) = line.strip_prefix("  HTTP  http://") {
                    self.http = Some(address.to_owned());
                } else if let Some(address) = line.strip_prefix("  gRPC  ") {
                    grpc = Some(address.to_owned());
                } else if line.starts_with("  try ") {
                    break;
                }
            }
            anyhow::Ok(grpc)
        });
        let grpc = ready.await.context("the cluster was not ready in time")??;
        // What it prints later is of no interest, but it must not block on a full pipe.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        grpc.context("the cluster did not come up; its reason is above")
    }

    pub fn http(&self) -> Result<String> {
        self.http
            .clone()
            .context("no HTTP address is known; give --base-url, or --backend grpc")
    }

    pub fn grpc(&self) -> Result<ConclaveClient<Channel>> {
        self.grpc
            .clone()
            .context("no gRPC address is known; give --base-url")
    }

    /// `None` where the cluster does not tell.
    pub async fn busy_and_idle(&self) -> Option<BusyIdle> {
        let text = match &self.grpc {
            Some(client) => {
                client
                    .clone()
                    .metrics(MetricsRequest {})
                    .await
                    .ok()?
                    .into_inner()
                    .text
            }
            None => http::get(self.http.as_ref()?, "/metrics").await.ok()?,
        };
        BusyIdle::read(&text)
    }

    /// Ends a cluster that was started.
    pub async fn end(&self) -> Result<()> {
        let Some(mut child) = self.child.lock().await.take() else {
            return Ok(());
        };
        if let Some(id) = child.id() {
            terminate(id)?;
        }
        if timeout(STOP_TIMEOUT, child.wait()).await.is_err() {
            child.kill().await?;
            bail!("the cluster did not end within {STOP_TIMEOUT:?} and was killed");
        }
        Ok(())
    }
}

fn terminate(id: u32) -> Result<()> {
    let status = std::process::Command::new("kill")
        .arg("-TERM")
        .arg(id.to_string())
        .status();
    if !status.context("`kill` cannot be run")?.success() {
        bail!("the cluster's process {id} cannot be asked to end");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::BusyIdle;

    #[test]
    fn idle_share_is_over_all_workers_and_since_the_start() {
        let text = |busy: [f64; 2], idle: [f64; 2]| {
            format!(
                "# TYPE conclave:worker_busy_seconds counter\n\
                 conclave:worker_busy_seconds_total{{rank=\"0\"}} {}\nconclave:worker_busy_seconds_total{{rank=\"1\"}} {}\n\
                 conclave:worker_idle_seconds_total{{rank=\"0\"}} {}\nconclave:worker_idle_seconds_total{{rank=\"1\"}} {}\n",
                busy[0], busy[1], idle[0], idle[1]
            )
        };
        let before = BusyIdle::read(&text([1.0, 1.0], [5.0, 5.0])).expect("figures");
        let after = BusyIdle::read(&text([2.5, 2.5], [5.5, 5.5])).expect("figures");
        assert_eq!(after.idle_share_since(&before), Some(0.25));
        assert_eq!(after.idle_share_since(&after), None);
        assert_eq!(BusyIdle::read("nothing"), None);
    }
}
