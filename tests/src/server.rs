//! A `conclave` process started for one test.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// How long a server may take until it says that it serves, on a busy machine of two cores.
const READY_WITHIN: Duration = Duration::from_secs(180);
/// How long it may take to stop after SIGTERM.
const STOPPED_WITHIN: Duration = Duration::from_secs(120);
/// How long what it printed may take to arrive once it has ended: its children may hold its output open.
const READ_WITHIN: Duration = Duration::from_secs(10);
/// Lines of output kept: more than come while a test that waits for one of them stands still.
const LINES_KEPT: usize = 4000;

/// Environment of a cluster in which no machine is so busy that a worker seems lost: for tests of what workers keep.
pub const PATIENT: [(&str, &str); 2] = [
    ("CONCLAVE_HEARTBEAT_TIMEOUT", "120s"),
    ("CONCLAVE_COLLECTIVE_DEADLINE", "120s"),
];

/// What router and workers of a cluster share, where a test starts them one by one.
pub const TOKEN: (&str, &str) = ("CONCLAVE_CLUSTER_TOKEN", "a secret of this test");

struct Output {
    lines: VecDeque<String>,
    /// Of standard output and standard error, those that have not ended.
    open: usize,
}

/// A running process; killed when dropped.
pub struct Server {
    child: Child,
    output: Arc<(Mutex<Output>, Condvar)>,
    /// `host:port` of the HTTP API, once ready.
    pub http: String,
    /// `host:port` of the gRPC API, once ready.
    pub grpc: String,
}

/// The binary under test, built beside the test's own executable.
pub fn binary() -> PathBuf {
    let own = std::env::current_exe().expect("path of the test executable");
    let profile = own
        .parent()
        .and_then(|deps| deps.parent())
        .expect("target/<profile>/deps");
    let binary = profile.join("conclave");
    assert!(
        binary.exists(),
        "{} is missing: run the tests with `cargo test --release --workspace`",
        binary.display()
    );
    binary
}

impl Server {
    /// `conclave serve ARGS` on free ports; returns when it is ready.
    pub fn serve(args: &[&str]) -> Server {
        Server::serve_with(args, &[])
    }

    /// The same with environment variables.
    pub fn serve_with(args: &[&str], env: &[(&str, &str)]) -> Server {
        let mut all = vec!["serve", "--port", "0", "--grpc-port", "0"];
        all.extend(args);
        let mut server = Server::spawn(&all, env);
        server.http = server.wait_for_address("HTTP");
        server.grpc = server.wait_for_address("gRPC");
        server
    }

    /// `conclave router ARGS` on free ports, for workers with [`TOKEN`].
    pub fn router(args: &[&str]) -> Server {
        let ports = ["router", "--grpc-port", "0", "--cluster-port", "0"];
        Server::spawn(&[&ports, args].concat(), &[TOKEN])
    }

    /// `conclave worker ARGS` of one thread, for a router of [`Server::router`]; `router` is its address for workers.
    pub fn worker(router: &str, args: &[&str]) -> Server {
        let start = ["worker", "--router", router, "--threads", "1"];
        Server::spawn(&[&start, args].concat(), &[TOKEN])
    }

    /// `conclave gateway` on a free port, in front of these routers.
    pub fn gateway(routers: &[&str]) -> Server {
        let start = ["gateway", "--port", "0", "--router"];
        Server::spawn(&[&start, routers].concat(), &[])
    }

    /// Any `conclave` command; its output is collected and nothing is waited for.
    pub fn spawn(args: &[&str], env: &[(&str, &str)]) -> Server {
        let mut command = Command::new(binary());
        command.args(args).envs(env.iter().copied()).stdin(Stdio::null());
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start conclave");
        let (lines, open) = (VecDeque::new(), 2);
        let output = Arc::new((Mutex::new(Output { lines, open }), Condvar::new()));
        let (stdout, stderr) = (
            child.stdout.take().expect("piped"),
            child.stderr.take().expect("piped"),
        );
        collect(stdout, &output);
        collect(stderr, &output);
        Server {
            child,
            output,
            http: String::new(),
            grpc: String::new(),
        }
    }

    /// Waits for a line that holds `text`; panics with the output if it does not come.
    pub fn wait_for_line(&self, text: &str) -> String {
        let (lock, changed) = &*self.output;
        let deadline = Instant::now() + READY_WITHIN;
        let mut output = lock.lock().expect("output");
        loop {
            if let Some(line) = output.lines.iter().find(|line| line.contains(text)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let ended = output.open == 0;
            if ended || left.is_zero() {
                let lines: Vec<_> = output.lines.iter().map(String::as_str).collect();
                panic!(
                    "no line with {text:?} (process ended: {ended}); output:\n{}",
                    lines.join("\n")
                );
            }
            output = changed.wait_timeout(output, left).expect("output").0;
        }
    }

    /// The ready block prints one line per API: `  HTTP  http://127.0.0.1:8000`.
    fn wait_for_address(&self, api: &str) -> String {
        let line = self.wait_for_line(&format!("  {api}  http://"));
        let address = line
            .split("://")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next());
        address
            .unwrap_or_else(|| panic!("no address in {line:?}"))
            .trim_end_matches('/')
            .to_string()
    }

    /// The address behind a label that a part prints at start, such as `  gRPC     http://127.0.0.1:50051`.
    pub fn address(&self, label: &str) -> String {
        let line = self.wait_for_line(&format!("  {label} "));
        line.split("://")
            .nth(1)
            .unwrap_or_else(|| panic!("no address in {line:?}"))
            .trim()
            .to_string()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Processor time that it has used, without its children: what a bound on work is measured in, so that other work on
    /// the machine does not count.
    pub fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("it runs");
        let fields = stat.rsplit(')').next().expect("fields").split_whitespace();
        // In user and in kernel mode, as of proc(5).
        let ticks: u64 = fields
            .skip(11)
            .take(2)
            .map(|field| field.parse::<u64>().expect("ticks"))
            .sum();
        // SAFETY: sysconf takes a number and touches no memory of ours.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
        Duration::from_secs_f64(ticks as f64 / per_second as f64)
    }

    /// Process ids of the worker children, oldest first.
    pub fn worker_pids(&self) -> Vec<u32> {
        let mut pids = Vec::new();
        for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<u32>().ok())
            else {
                continue;
            };
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let parent = stat
                .rsplit(')')
                .next()
                .and_then(|rest| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let is_worker = command.split(|&b| b == 0).nth(1) == Some(b"worker".as_slice());
            if parent == Some(self.pid()) && is_worker {
                pids.push(pid);
            }
        }
        pids.sort_unstable();
        pids
    }

    /// Everything printed so far (the last lines of it).
    pub fn output(&self) -> String {
        let output = self.output.0.lock().expect("output");
        output
            .lines
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// SIGTERM, then the exit status.
    pub fn stop(mut self) -> ExitStatus {
        signal(self.pid(), libc::SIGTERM);
        self.wait(STOPPED_WITHIN)
    }

    /// Waits for the process to end by itself, and for what it printed.
    pub fn wait(&mut self, within: Duration) -> ExitStatus {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait for conclave") {
                let (lock, changed) = &*self.output;
                let output = lock.lock().expect("output");
                drop(changed.wait_timeout_while(output, READ_WITHIN, |output| output.open > 0));
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "still running after {within:?}; output:\n{}",
                self.output()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.try_wait().ok().flatten().is_none() {
            for worker in self.worker_pids() {
                signal(worker, libc::SIGKILL);
            }
            signal(self.pid(), libc::SIGKILL);
            // The process may already be gone; then there is nothing to reap.
            let _ = self.child.wait();
        }
    }
}

/// Sends a signal to a process that this test started.
pub fn signal(pid: u32, signal: i32) {
    // SAFETY: kill takes two integers and touches no memory of ours.
    unsafe { libc::kill(pid as i32, signal) };
}

fn collect(stream: impl Read + Send + 'static, output: &Arc<(Mutex<Output>, Condvar)>) {
    let output = Arc::clone(output);
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let mut kept = output.0.lock().expect("output");
            if kept.lines.len() == LINES_KEPT {
                kept.lines.pop_front();
            }
            kept.lines.push_back(line);
            output.1.notify_all();
        }
        output.0.lock().expect("output").open -= 1;
        output.1.notify_all();
    });
}
