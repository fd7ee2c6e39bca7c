//! The cluster under load: one that runs already, or one that is started for the run.

use std::sync::Arc;

use anyhow::{Context, Result};
use conclave_proto::v1::conclave_client::ConclaveClient;
use conclave_proto::v1::{MetricsRequest, ModelInfoRequest};
use tokio::sync::Mutex;
use tonic::transport::Channel;

use crate::commands::serve::name_of;
use crate::grpc_client::connect;
use crate::http_client;
use crate::local_cluster::LocalCluster;
use crate::settings::{Backend, BenchSettings, LoadFormat, Scenario};

/// Ids below this are drawn where the vocabulary's size cannot be asked for.
const SMALL_VOCAB: u32 = 256;

pub struct Target {
    /// host:port
    http: Option<String>,
    grpc: Option<ConclaveClient<Channel>>,
    grpc_address: Option<String>,
    pub vocab: u32,
    cluster: Mutex<Option<LocalCluster>>,
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
        Some(BusyIdle {
            busy: sum(text, "conclave:worker_busy_seconds", "")?,
            idle: sum(text, "conclave:worker_idle_seconds", "")?,
        })
    }

    pub fn idle_share_since(&self, before: &BusyIdle) -> Option<f64> {
        let (busy, idle) = (self.busy - before.busy, self.idle - before.idle);
        (busy + idle > 0.0).then(|| idle / (busy + idle))
    }
}

/// Over all lines of this name that hold `label`.
fn sum(text: &str, name: &str, label: &str) -> Option<f64> {
    let values = text
        .lines()
        .filter(|line| line.starts_with(name) && line.contains(label))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    values.reduce(|a, b| a + b)
}

impl Target {
    pub async fn reach(settings: &BenchSettings) -> Result<Arc<Target>> {
        let mut target = Target {
            http: None,
            grpc: None,
            grpc_address: None,
            vocab: SMALL_VOCAB,
            cluster: Mutex::new(None),
        };
        let grpc = match (&settings.load.base_url, settings.load.backend) {
            (None, _) => Some(target.start(settings).await?),
            (Some(url), Backend::Grpc) => Some(url.clone()),
            (Some(url), Backend::Openai) => {
                target.http = Some(http_client::address("base_url", url)?);
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
            target.grpc_address = Some(grpc);
        }
        Ok(Arc::new(target))
    }

    /// Starts `serve` with the bench's model, workers and threads; gives its gRPC address.
    async fn start(&mut self, settings: &BenchSettings) -> Result<String> {
        let mut flags = vec![
            format!("--workers={}", settings.workers),
            format!("--threads={}", super::super::threads(settings)),
        ];
        let device = &settings.device;
        flags.push(format!("--device={}", device.device));
        flags.push(format!("--kv-cache-dtype={}", name_of(&device.kv_cache_dtype)));
        flags.push(format!(
            "--gpu-memory-utilization={}",
            device.gpu_memory_utilization
        ));
        flags.push(format!("--deterministic={}", device.deterministic));
        flags.push(format!("--fp8-activations={}", name_of(&device.fp8_activations)));
        flags.extend(
            device
                .kv_cache_memory_bytes
                .map(|bytes| format!("--kv-cache-memory-bytes={bytes}")),
        );
        flags.extend(device.inject_fault.map(|fault| format!("--inject-fault={fault}")));
        let further = settings.load.serve_args.as_deref().unwrap_or_default();
        flags.extend(further.split_whitespace().map(str::to_owned));
        if settings.model.load_format == LoadFormat::Dummy && settings.scenario != Some(Scenario::Text) {
            flags.push("--skip-tokenizer-init".to_owned());
        }
        let cluster = LocalCluster::start(&settings.model, &flags).await?;
        self.http = Some(cluster.http.clone());
        let grpc = cluster.grpc.clone();
        *self.cluster.get_mut() = Some(cluster);
        Ok(grpc)
    }

    pub fn http(&self) -> Result<String> {
        self.http
            .clone()
            .context("no HTTP address is known; give --base-url, or --backend grpc")
    }

    /// A client with a connection of its own, as every HTTP call has one.
    pub async fn grpc(&self) -> Result<ConclaveClient<Channel>> {
        let address = self.grpc_address.as_deref();
        connect(address.context("no gRPC address is known; give --base-url")?).await
    }

    /// `None` where the cluster does not tell.
    pub async fn busy_and_idle(&self) -> Option<BusyIdle> {
        BusyIdle::read(&self.metrics().await?)
    }

    /// The sum of a metric over all its labels.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        self.metric_of(name, "").await
    }

    /// The same over those that hold `label`.
    pub async fn metric_of(&self, name: &str, label: &str) -> Option<f64> {
        sum(&self.metrics().await?, name, label)
    }

    async fn metrics(&self) -> Option<String> {
        match &self.grpc {
            Some(client) => {
                let answer = client.clone().metrics(MetricsRequest {}).await.ok()?;
                Some(answer.into_inner().text)
            }
            None => http_client::get(self.http.as_ref()?, None, "/metrics").await.ok(),
        }
    }

    /// Ends a cluster that was started.
    pub async fn end(&self) -> Result<()> {
        match self.cluster.lock().await.take() {
            Some(cluster) => cluster.end().await,
            None => Ok(()),
        }
    }
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
