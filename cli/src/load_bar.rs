//! The progress bar of loading: bytes, bytes per second. Drawn on a terminal only; elsewhere the end is logged.

use std::time::Instant;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use crate::commands::worker::LoadLine;

pub struct LoadBar {
    bar: ProgressBar,
    started: Instant,
    finished: bool,
}

impl LoadBar {
    /// Loading begins now.
    pub fn start() -> LoadBar {
        // Hidden by itself where standard error is no terminal.
        let bar = ProgressBar::new(0);
        let style = "loading [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("=> "));
        }
        LoadBar {
            bar,
            started: Instant::now(),
            finished: false,
        }
    }

    pub fn show(&mut self, now: LoadLine) {
        let is_full = now.bytes_total > 0 && now.bytes_done >= now.bytes_total;
        if self.finished && !is_full {
            // More has to be loaded: the group has changed.
            *self = LoadBar::start();
        }
        self.bar.set_length(now.bytes_total);
        self.bar.set_position(now.bytes_done);
        if is_full && !self.finished {
            self.finished = true;
            self.bar.finish_and_clear();
            let seconds = self.started.elapsed().as_secs_f64();
            let rate = HumanBytes((now.bytes_total as f64 / seconds.max(1e-3)) as u64);
            tracing::info!(
                "loaded {} in {seconds:.2} s, {rate}/s",
                HumanBytes(now.bytes_total)
            );
        }
    }
}
