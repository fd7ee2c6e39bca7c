//! The progress bar of loading: bytes, bytes per second. Drawn on a terminal only; a worker's log has the exact figures.

use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

/// How far loading is; as JSON, a line of a worker's standard output under `serve`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadLine {
    pub bytes_done: u64,
    pub bytes_total: u64,
}

/// A bar for each time that something is loaded: at the start, and when the group has changed.
#[derive(Default)]
pub struct LoadBar {
    bar: Option<ProgressBar>,
}

impl LoadBar {
    pub fn show(&mut self, now: LoadLine) {
        let is_full = now.bytes_done >= now.bytes_total;
        if is_full {
            if let Some(bar) = self.bar.take() {
                bar.finish_and_clear();
            }
            return;
        }
        let bar = self.bar.get_or_insert_with(draw);
        bar.set_length(now.bytes_total);
        bar.set_position(now.bytes_done);
    }
}

fn draw() -> ProgressBar {
    // Hidden by itself where standard error is no terminal.
    let bar = ProgressBar::new(0);
    let style = "loading [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}
