//! `conclave worker`: one rank, in this process.
//!
//! Under `serve` it is a child: it then says how loading goes as JSON lines on standard output, and ends when standard
//! input closes, because its parent is gone.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use conclave_worker::weights::Progress;
use tokio::time::interval;

use crate::load_bar::{LoadBar, LoadLine};
use crate::settings::WorkerSettings;
use crate::{model_path, parent, parts, signals};

const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

pub async fn run(settings: &WorkerSettings) -> Result<()> {
    let shutdown = signals::shutdown()?;
    let found = model_path::find(&settings.model)?;
    let config = parts::worker(settings, &found)?;
    let progress = tokio::spawn(show_progress(config.progress.clone(), settings.child));
    let is_child = settings.child;
    let ended = conclave_worker::run(config, async move {
        tokio::select! {
            () = shutdown.asked() => {}
            () = parent::gone(), if is_child => {}
        }
    });
    let ended = ended.await;
    progress.abort();
    Ok(ended?)
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
