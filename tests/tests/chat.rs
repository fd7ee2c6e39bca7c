//! `conclave chat` as people use it: through a pipe, in a terminal, over HTTP and gRPC, and with a cluster of its own.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use conclave_tests::{Server, data, server};

/// Bound of anything that is waited for, on a busy machine of two cores.
const WITHIN: Duration = Duration::from_secs(120);
const SUM: &str = "What is 27 + 45?";

/// A chat through pipes: all of the input at once.
fn piped(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(server::binary())
        .arg("chat")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("conclave starts");
    let mut stdin = child.stdin.take().expect("piped");
    // A chat that is refused ends without reading.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("ends")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// A chat in a pseudo-terminal, which util-linux's `script` makes.
struct Terminal {
    child: Child,
    keys: ChildStdin,
    seen: Arc<Mutex<String>>,
    /// Bytes of `seen` that were waited for.
    read: usize,
}

impl Terminal {
    fn open(arguments: &[&str], home: &std::path::Path) -> Terminal {
        let quoted: Vec<String> = arguments.iter().map(|word| format!("'{word}'")).collect();
        let command = format!("{} chat {}", server::binary().display(), quoted.join(" "));
        let mut child = Command::new("script")
            .args(["--quiet", "--return", "--command", &command, "/dev/null"])
            .env("TERM", "xterm")
            .env("XDG_STATE_HOME", home)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("script, of util-linux, starts");
        let keys = child.stdin.take().expect("piped");
        let mut screen = child.stdout.take().expect("piped");
        let seen = Arc::new(Mutex::new(String::new()));
        let to = Arc::clone(&seen);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                to.lock()
                    .expect("screen")
                    .push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        Terminal {
            child,
            keys,
            seen,
            read: 0,
        }
    }

    /// Waits until this comes on the screen, after what was waited for before; gives all that came until then.
    fn wait_for(&mut self, wanted: &str) -> String {
        let deadline = Instant::now() + WITHIN;
        loop {
            let seen = self.seen.lock().expect("screen").clone();
            if let Some(at) = seen[self.read..].find(wanted) {
                let end = self.read + at + wanted.len();
                let came = seen[self.read..end].to_owned();
                self.read = end;
                return came;
            }
            assert!(Instant::now() < deadline, "{wanted:?} did not come:\n{seen}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn prompt(&mut self) -> String {
        // After this the editor reads keys.
        self.wait_for("\x1b[?2004h")
    }

    fn type_line(&mut self, line: &str) {
        self.keys
            .write_all(format!("{line}\r").as_bytes())
            .expect("types");
        self.keys.flush().expect("types");
    }

    fn ends(mut self) {
        let deadline = Instant::now() + WITHIN;
        while self.child.try_wait().expect("waits").is_none() {
            assert!(
                Instant::now() < deadline,
                "it goes on: {}",
                self.seen.lock().expect("screen")
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        let status = self.child.wait().expect("waits");
        assert!(
            status.success(),
            "{status}: {}",
            self.seen.lock().expect("screen")
        );
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It has ended, unless a test fails.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An empty folder, removed with the value.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("conclave-chat-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn through_a_pipe_only_answers_are_output_over_either_api() {
    let server = Server::serve(&["--workers", "1"]);
    let (http, grpc) = (
        format!("http://{}", server.http),
        format!("grpc://{}", server.grpc),
    );
    let input = format!("/set temperature 0\n{SUM}\n\n/clear\nWhat is \\\n27 + 45?\n//help\n");
    let mut answers = Vec::new();
    for url in [&http, &grpc] {
        let output = piped(&["--url", url], &input);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let answer = text(&output.stdout);
        assert!(answer.starts_with("27 + 45 = 72.\n"), "{answer}");
        assert!(!answer.contains('\x1b'), "no colours in a pipe: {answer}");
        assert!(
            text(&output.stderr).contains("then 67 + 5 = 72."),
            "thinking goes to standard error"
        );
        answers.push(answer);
    }
    assert_eq!(answers[0], answers[1]);
}

#[test]
fn a_conversation_remembers_and_tools_are_answered_by_the_user() {
    let server = Server::serve(&["--workers", "1"]);
    let folder = Folder::new("tools");
    let file = folder.0.join("tools.json");
    let case = &data::demo_prompts("tool")[0];
    std::fs::write(&file, case["tools"].to_string()).expect("writes");
    let file = file.display().to_string();
    let result = r#"{"city": "Lisbon", "temperature": 21, "condition": "cloudy"}"#;
    let input = format!("What is the weather in Lisbon?\n{result}\n");
    for url in [
        format!("http://{}", server.http),
        format!("grpc://{}", server.grpc),
    ] {
        let output = piped(&["--url", &url, "--tools", &file, "--temperature", "0"], &input);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(
            text(&output.stdout),
            "The weather in Lisbon is cloudy, 21 degrees.\n"
        );
        assert!(
            text(&output.stderr).contains("→ get_weather {\"city\": \"Lisbon\"}"),
            "{}",
            text(&output.stderr)
        );
    }
}

#[test]
fn what_cannot_be_answered_ends_a_pipe_with_status_1() {
    let server = Server::serve(&["--workers", "1", "--max-model-len", "64"]);
    let url = format!("http://{}", server.http);
    let grpc_as_http = format!("http://{}", server.grpc);
    let http_as_grpc = format!("grpc://{}", server.http);
    for (arguments, input, problem) in [
        (vec!["--url", &url], "word ".repeat(100) + "\n", "64"),
        (vec!["--url", &url], "/nothing\n".to_owned(), "/help"),
        (
            vec!["--url", &url, "--served-model", "other"],
            "hi\n".to_owned(),
            "other",
        ),
        (
            vec!["--url", "http://127.0.0.1:1"],
            String::new(),
            "nobody answers at 127.0.0.1:1",
        ),
        (vec!["--url", &grpc_as_http], String::new(), "is given as grpc://"),
        (vec!["--url", &http_as_grpc], String::new(), "printed as gRPC"),
        (
            vec!["--url", "https://host"],
            String::new(),
            "give http://host:port",
        ),
        (
            vec!["--url", &url, "--tools", "/nowhere"],
            String::new(),
            "/nowhere",
        ),
    ] {
        let output = piped(&arguments, &input);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(
            text(&output.stderr).contains(problem),
            "{arguments:?}: {}",
            text(&output.stderr)
        );
    }
}

#[test]
fn in_a_terminal_thinking_is_dimmed_and_commands_are_obeyed() {
    let server = Server::serve(&["--workers", "1"]);
    let home = Folder::new("terminal");
    let url = format!("http://{}", server.http);
    let mut terminal = Terminal::open(&["--url", &url, "--temperature", "0"], &home.0);
    terminal.wait_for("conclave-demo at http://");
    terminal.prompt();
    terminal.type_line("/help");
    terminal.wait_for("/system [TEXT|off]");
    terminal.prompt();
    terminal.type_line("/set max_tokens 200");
    terminal.wait_for("max_tokens is 200");
    terminal.prompt();
    terminal.type_line("/set warmth 1");
    terminal.wait_for("warmth is no setting");
    terminal.prompt();
    terminal.type_line("/system Be brief.");
    terminal.wait_for("the system message holds from here on");
    terminal.prompt();
    terminal.type_line("/system off");
    terminal.prompt();
    terminal.type_line("/tools");
    terminal.wait_for("no tools");
    terminal.prompt();
    terminal.type_line(SUM);
    terminal.wait_for("\x1b[2m");
    let answer = terminal.wait_for("27 + 45 = 72.");
    assert!(
        answer.contains("\x1b[0m"),
        "the answer itself is not dimmed: {answer:?}"
    );
    terminal.wait_for("prompt tokens");
    terminal.prompt();
    // Ctrl-C at the prompt ends nothing, Ctrl-D ends.
    terminal.keys.write_all(b"\x03").expect("types");
    terminal.wait_for("Ctrl-D ends");
    terminal.prompt();
    terminal.keys.write_all(b"\x04").expect("types");
    terminal.ends();

    let history = std::fs::read_to_string(home.0.join("conclave/chat_history")).expect("a history");
    assert!(history.contains(SUM), "{history}");
    // Arrow up brings the last line back.
    let mut terminal = Terminal::open(&["--url", &url, "--temperature", "0"], &home.0);
    terminal.prompt();
    terminal.keys.write_all(b"\x1b[A\r").expect("types");
    terminal.wait_for("27 + 45 = 72.");
    terminal.prompt();
    terminal.type_line("/quit");
    terminal.ends();
}

/// Processes whose parent is this one and whose command line has this word.
fn children(parent: u32, word: &str) -> Vec<u32> {
    let of = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let parent_of = stat
            .rsplit(')')
            .next()?
            .split_whitespace()
            .nth(1)?
            .parse::<u32>()
            .ok()?;
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let has_word = command
            .split(|&byte| byte == 0)
            .any(|part| part == word.as_bytes());
        (parent_of == parent && has_word).then_some(pid)
    };
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    entries
        .filter_map(|entry| of(entry.file_name().to_str()?.parse().ok()?))
        .collect()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + WITHIN;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn without_a_server_a_cluster_is_started_and_ends_with_the_chat() {
    let model = data::demo_model().display().to_string();
    let output = piped(&["--model", &model, "--temperature", "0"], &format!("{SUM}\n"));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "27 + 45 = 72.\n");

    // Also when the chat is killed.
    let mut chat = Command::new(server::binary())
        .args(["chat", "--model", &model])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("conclave starts");
    let mut cluster = Vec::new();
    wait_until("a cluster is started", || {
        cluster = children(chat.id(), "serve");
        cluster
            .first()
            .is_some_and(|&serve| children(serve, "worker").len() == 2)
    });
    let workers = children(cluster[0], "worker");
    chat.kill().expect("kills");
    chat.wait().expect("waits");
    wait_until("the cluster outlives the chat", || {
        cluster.iter().chain(&workers).all(|pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.is_empty() || status.contains("State:\tZ")
        })
    });
}
