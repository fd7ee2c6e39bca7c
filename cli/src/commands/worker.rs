//! `conclave worker`: one rank, in this process.
//!
//! Under `serve` it is a child: it then says how loading goes as JSON lines on standard output, and ends when standard
//! input closes, because its parent is gone.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use conclave_worker::weights::Progress;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::time::interval;

use crate::load_bar::LoadBar;
use crate::settings::WorkerSettings;
use crate::{model_path, parts, signals};

const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// One line of a child's standard output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadLine {
    pub bytes_done: u64,
    pub bytes_total: u64,
}

pub async fn run(settings: &WorkerSettings) -> Result<()> {
    let shutdown = signals::shutdown()?;
    let found = model_path::find(&settings.model)?;
    let config = parts::worker(settings, &found)?;
    let progress = tokio::spawn(show_progress(config.progress.clone(), settings.child));
    let is_child = settings.child;
    let ended = conclave_worker::run(config, async move {
        tokio::select! {
            () = shutdown.asked() => {}
            () = parent_gone(), if is_child => {}
        }
    });
    let ended = ended.await;
    progress.abort();
    Ok(ended?)
}

/// Completes when standard input is closed. A thread of its own reads it: such a read cannot be cancelled.
async fn parent_gone() {
    let (closed, is_closed) = oneshot::channel();
    let reader = std::thread::Builder::new().name("parent".into()).spawn(move || {
        let mut ignored = [0u8; 64];
        while matches!(std::io::stdin().read(&mut ignored), Ok(read) if read > 0) {}
        // The receiver is gone if the worker ends for another reason.
        let _ = closed.send(());
    });
    if let Err(error) = reader {
        tracing::warn!(%error, "the parent process cannot be watched");
        std::future::pending::<()>().await;
    }
    // A dropped sender is a thread that ended, too.
    let _ = is_closed.await;
    tracing::debug!("standard input is closed: the parent process ended, or wants this one to");
}

/// Follows loading until this task is aborted.
async fn show_progress(progress: Arc<Progress>, is_child: bool) {
    let mut ticks = interval(PROGRESS_INTERVAL);
    let mut shown = LoadLine::default();
    let mut bar = LoadBar::default();
    loop {
        ticks.tick().await;
        let (bytes_done, bytes_total) = progress.get();
        let now = LoadLine {
            bytes_done,
            bytes_total,
        };
        if now == shown {
            continue;
        }
        shown = now;
        if is_child {
            say(&now);
        } else {
            bar.show(now);
        }
    }
}

/// To a parent that may be gone: then nobody listens.
fn say(line: &LoadLine) {
    if let Ok(text) = serde_json::to_string(line) {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{text}").and_then(|()| out.flush());
    }
}
