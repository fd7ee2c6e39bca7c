//! A `conclave serve` of this executable, started for one command (`chat`, `bench`) and ended with it.
//!
//! Must stay true: it ends when this process does, however that ends, because its standard input closes then; a signal
//! from the terminal to this process's group does not reach it.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::timeout;

use crate::settings::{LoadFormat, ModelSettings};

/// It must be ready within this time: large models load for a while.
const READY_TIMEOUT: Duration = Duration::from_secs(600);
const STOP_TIMEOUT: Duration = Duration::from_secs(40);

pub struct LocalCluster {
    child: Child,
    /// Open as long as the cluster should live.
    input: Option<ChildStdin>,
    /// host:port
    pub http: String,
    /// host:port or with a scheme.
    pub grpc: String,
}

impl LocalCluster {
    /// Starts it on free ports with a model and further flags of `serve`; returns when it serves.
    pub async fn start(model: &ModelSettings, flags: &[String]) -> Result<LocalCluster> {
        let executable = std::env::current_exe().context("the path of this executable is not known")?;
        let mut command = Command::new(executable);
        command.args(["serve", "--child", "--port=0", "--grpc-port=0", "--log=warn"]);
        command.args(flags);
        if let Some(path) = model.checkpoint.path() {
            command.arg(path);
        }
        if let Some(overrides) = &model.hf_overrides {
            command.arg(format!("--hf-overrides={overrides}"));
        }
        if model.load_format == LoadFormat::Dummy {
            command.arg("--load-format=dummy");
            command.arg(format!("--dummy-seed={}", model.dummy_seed));
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .context("`conclave serve` cannot be started")?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("its output cannot be read")?;
        let mut lines = BufReader::new(output).lines();
        let ready = timeout(READY_TIMEOUT, async {
            let (mut http, mut grpc) = (None, None);
            while let Some(line) = lines.next_line().await? {
                if let Some(address) = line.strip_prefix("  HTTP  http://") {
                    http = Some(address.to_owned());
                } else if let Some(address) = line.strip_prefix("  gRPC  ") {
                    grpc = Some(address.to_owned());
                } else if line.starts_with("  try ") {
                    break;
                }
            }
            anyhow::Ok(http.zip(grpc))
        });
        let ready = ready.await.context("the cluster was not ready in time")??;
        let (http, grpc) = ready.context("the cluster did not come up; its reason is above")?;
        // What it prints later is of no interest, but it must not block on a full pipe.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(LocalCluster {
            child,
            input,
            http,
            grpc,
        })
    }

    /// Asks it to end, and waits for that.
    pub async fn end(mut self) -> Result<()> {
        drop(self.input.take());
        if timeout(STOP_TIMEOUT, self.child.wait()).await.is_err() {
            self.child.kill().await?;
            bail!("the cluster did not end within {STOP_TIMEOUT:?} and was killed");
        }
        Ok(())
    }
}
