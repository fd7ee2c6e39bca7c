//! SIGTERM and SIGINT as a future.

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Exit status after a second signal, as a shell reports SIGINT.
const INTERRUPTED: i32 = 130;

/// Becomes true at the first SIGTERM or SIGINT. A second one ends the process at once.
pub fn shutdown() -> Result<Shutdown> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        for first in [true, false] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if first {
                tracing::info!("shutting down; a second signal ends this process at once");
                sender.send_replace(true);
            } else {
                std::process::exit(INTERRUPTED);
            }
        }
    });
    Ok(Shutdown { receiver })
}

/// Tells that the process was asked to end; cheap to clone.
#[derive(Clone, Debug)]
pub struct Shutdown {
    receiver: watch::Receiver<bool>,
}

impl Shutdown {
    /// Completes when the process was asked to end.
    pub async fn asked(&self) {
        let mut receiver = self.receiver.clone();
        // The sender lives as long as the runtime.
        if receiver.wait_for(|&asked| asked).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
