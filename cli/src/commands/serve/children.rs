//! The worker processes of `serve`: started, watched, started again when they die.
//!
//! A child that dies before the cluster has served ends the start, with its reason already on standard error; later it
//! is started again, after a pause that doubles up to [`MAX_BACKOFF`]. A child ends when its standard input closes, so
//! that none outlives this process, however that ends.

use std::net::SocketAddr;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use conclave_router::View;
use conclave_worker::Fault;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::arguments;
use super::places::Places;
use crate::load_bar::{LoadBar, LoadLine};
use crate::model_path::FoundModel;
use crate::settings::ServeSettings;

/// Pause before a worker that died is started again; doubles with each death in a row.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// A worker that ran for so long before it died is not counted as dying in a row.
const HEALTHY_AFTER: Duration = Duration::from_secs(30);
/// Told to end, a worker may take so long before it is killed.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// Lines of loading progress that wait to be drawn; more are skipped.
const PROGRESS_QUEUE: usize = 64;

/// What the children are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Running,
    /// The dead are left dead.
    Draining,
    /// End now.
    Closing,
}

/// How to start a worker.
#[derive(Clone, Debug)]
pub struct Plan {
    executable: std::path::PathBuf,
    arguments: Vec<Vec<String>>,
    token: String,
    /// Of the first worker's first start.
    fault: Option<Fault>,
}

impl Plan {
    pub fn new(
        settings: &ServeSettings,
        found: &FoundModel,
        router: SocketAddr,
        token: String,
        places: &Places,
    ) -> Result<Plan> {
        let executable = std::env::current_exe().context("the path of this executable is not known")?;
        let arguments =
            (0..places.workers).map(|rank| arguments::worker(settings, found, router, rank, places));
        Ok(Plan {
            executable,
            arguments: arguments.collect(),
            token,
            fault: settings.device.inject_fault,
        })
    }

    fn spawn(&self, rank: usize, is_first: bool) -> std::io::Result<Child> {
        let mut command = Command::new(&self.executable);
        // What was set for this process has been read and is passed on by flags.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with(crate::layers::PREFIX) {
                command.env_remove(name);
            }
        }
        let fault = self.fault.filter(|_| rank == 0 && is_first);
        command
            .arg("worker")
            .args(&self.arguments[rank])
            .args(fault.map(|fault| format!("--inject-fault={fault}")))
            .env("CONCLAVE_CLUSTER_TOKEN", &self.token)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C is for this process: it drains before the workers go.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
    }
}

/// The tasks that watch the children.
pub struct Children {
    watchers: JoinSet<()>,
    failures: mpsc::Receiver<String>,
}

impl Children {
    /// Completes with a reason when the cluster cannot come up.
    pub async fn failed(&mut self) -> String {
        match self.failures.recv().await {
            Some(reason) => reason,
            None => std::future::pending().await,
        }
    }

    /// Completes when every child has ended.
    pub async fn ended(mut self) {
        while self.watchers.join_next().await.is_some() {}
    }
}

pub fn start(plan: Plan, view: &watch::Receiver<View>, phase: &watch::Receiver<Phase>) -> Children {
    let (failures_in, failures) = mpsc::channel(1);
    let (progress_in, progress) = mpsc::channel(PROGRESS_QUEUE);
    let mut watchers = JoinSet::new();
    for rank in 0..plan.arguments.len() {
        let watcher = Watcher {
            plan: plan.clone(),
            rank,
            view: view.clone(),
            phase: phase.clone(),
            failures: failures_in.clone(),
            progress: progress_in.clone(),
        };
        watchers.spawn(watcher.run());
    }
    // Ends when the last watcher has.
    tokio::spawn(draw_progress(progress, plan.arguments.len()));
    Children { watchers, failures }
}

struct Watcher {
    plan: Plan,
    rank: usize,
    view: watch::Receiver<View>,
    phase: watch::Receiver<Phase>,
    failures: mpsc::Sender<String>,
    progress: mpsc::Sender<(usize, LoadLine)>,
}

impl Watcher {
    async fn run(mut self) {
        let mut backoff = FIRST_BACKOFF;
        let mut is_first = true;
        loop {
            let started = Instant::now();
            let died = match self.plan.spawn(self.rank, std::mem::take(&mut is_first)) {
                Ok(child) => match self.watch(child).await {
                    None => return,
                    Some(status) => format!("ended ({status})"),
                },
                Err(error) => format!("could not be started ({error})"),
            };
            if !self.view.borrow().has_served {
                let reason = format!(
                    "worker {} {died} before the cluster was up; its reason is above",
                    self.rank
                );
                // A full queue holds another worker's reason.
                let _ = self.failures.try_send(reason);
                return;
            }
            if started.elapsed() >= HEALTHY_AFTER {
                backoff = FIRST_BACKOFF;
            }
            tracing::warn!(
                worker = self.rank,
                "worker {died}; it is started again in {backoff:?}"
            );
            tokio::select! {
                () = left(&mut self.phase, Phase::Running) => return,
                () = tokio::time::sleep(backoff) => {}
            }
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }

    /// Until the child has ended: `None` if it was to end.
    async fn watch(&mut self, mut child: Child) -> Option<ExitStatus> {
        let stdin = child.stdin.take();
        if let Some(stdout) = child.stdout.take() {
            tokio::spawn(read_progress(stdout, self.rank, self.progress.clone()));
        }
        let mut phase = self.phase.clone();
        let ended = tokio::select! {
            status = child.wait() => status,
            () = reached(&mut phase, Phase::Closing) => {
                drop(stdin);
                if timeout(END_TIMEOUT, child.wait()).await.is_err() {
                    tracing::warn!(worker = self.rank, "worker did not end by itself and is killed");
                    // An error means that it has ended meanwhile.
                    let _ = child.kill().await;
                }
                return None;
            }
        };
        if *self.phase.borrow() != Phase::Running {
            return None;
        }
        match ended {
            Ok(status) => Some(status),
            Err(error) => {
                tracing::error!(worker = self.rank, %error, "worker cannot be watched");
                None
            }
        }
    }
}

async fn left(phase: &mut watch::Receiver<Phase>, from: Phase) {
    // A dropped sender means that everything ends.
    let _ = phase.wait_for(|&now| now != from).await;
}

async fn reached(phase: &mut watch::Receiver<Phase>, wanted: Phase) {
    let _ = phase.wait_for(|&now| now == wanted).await;
}

async fn read_progress(stdout: ChildStdout, rank: usize, progress: mpsc::Sender<(usize, LoadLine)>) {
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Ok(line) = serde_json::from_str(&line) {
            // A full queue: a later line says the same and more.
            let _ = progress.try_send((rank, line));
        }
    }
}

async fn draw_progress(mut progress: mpsc::Receiver<(usize, LoadLine)>, workers: usize) {
    let mut latest = vec![LoadLine::default(); workers];
    let mut bar = LoadBar::default();
    while let Some((rank, line)) = progress.recv().await {
        latest[rank] = line;
        let sum = latest.iter().fold(LoadLine::default(), |sum, line| LoadLine {
            bytes_done: sum.bytes_done + line.bytes_done,
            bytes_total: sum.bytes_total + line.bytes_total,
        });
        bar.show(sum);
    }
}
