//! The clients that people have, against the real binary: the official Python and npm packages of OpenAI and Anthropic,
//! and curl as the README writes it.
//!
//! The packages are installed into the target folder. Where that fails (no network, no Python) a test says so on
//! standard error and passes, unless CLIENT_TESTS is `required`, as it is in CI.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;

use conclave_tests::{Server, data, server};

/// Bound of an installation and of one suite, in seconds.
const WITHIN: &str = "900";
/// As the suites give it.
const KEY: &str = "key of the tests";
/// The npm packages ask for it.
const OLDEST_NODE: u32 = 20;

/// Installations take turns: the tests of this file run side by side.
static INSTALLING: Mutex<()> = Mutex::new(());

fn sources() -> PathBuf {
    data::root().join("tests/clients")
}

/// `target/clients`
fn folder() -> PathBuf {
    let binary = server::binary();
    let target = binary.ancestors().nth(2).expect("target/release/conclave");
    target.join("clients")
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command
        .output()
        .map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{command:?}: {}", shown(&output)))
}

fn shown(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!(
        "{}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    )
}

fn bounded(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new("timeout");
    command.arg(WITHIN).arg(program.as_ref());
    command
}

/// Whether what was installed is what the given text asks for; `done` remembers it.
struct Stamp(PathBuf, String);

impl Stamp {
    fn of(name: &str, wanted: &str) -> Stamp {
        Stamp(folder().join(format!("{name}.installed")), wanted.to_owned())
    }

    fn holds(&self) -> bool {
        fs::read_to_string(&self.0).is_ok_and(|found| found == self.1)
    }

    fn done(&self) -> Result<(), String> {
        fs::write(&self.0, &self.1).map_err(|error| error.to_string())
    }
}

/// Python in a virtual environment with these requirements; the file's name becomes the environment's.
fn python(requirements: &str) -> Result<PathBuf, String> {
    let _turn = INSTALLING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let file = sources().join(requirements);
    let wanted = fs::read_to_string(&file).map_err(|error| error.to_string())?;
    let environment = folder().join(requirements.trim_end_matches(".txt"));
    let python = environment.join("bin/python");
    let stamp = Stamp::of(requirements, &wanted);
    if !stamp.holds() {
        fs::create_dir_all(folder()).map_err(|error| error.to_string())?;
        run(bounded("python3").args(["-m", "venv"]).arg(&environment))?;
        let quiet = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-r",
        ];
        run(bounded(&python).args(quiet).arg(&file))?;
        stamp.done()?;
    }
    Ok(python)
}

/// The folder of node and npm out of a Python wheel; `None` where the machine's own are new enough.
fn node() -> Result<Option<PathBuf>, String> {
    let version = run(Command::new("node").arg("--version")).unwrap_or_default();
    let major = version.trim_start_matches('v').split('.').next();
    let is_new = major
        .and_then(|major| major.parse().ok())
        .is_some_and(|major: u32| major >= OLDEST_NODE);
    if is_new && run(Command::new("npm").arg("--version")).is_ok() {
        return Ok(None);
    }
    let python = python("node-requirements.txt")?;
    Ok(python.parent().map(Path::to_owned))
}

/// A folder with the npm packages and the suites, and the PATH that finds node.
fn npm_packages() -> Result<(PathBuf, String), String> {
    let node = node()?;
    let _turn = INSTALLING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let path = std::env::var("PATH").unwrap_or_default();
    let path = match node {
        Some(folder) => format!("{}:{path}", folder.display()),
        None => path,
    };
    let modules = folder().join("npm");
    fs::create_dir_all(&modules).map_err(|error| error.to_string())?;
    let wanted = fs::read_to_string(sources().join("package.json")).map_err(|error| error.to_string())?;
    for entry in fs::read_dir(sources())
        .map_err(|error| error.to_string())?
        .flatten()
    {
        let name = entry.file_name();
        if [".mjs", ".json"]
            .iter()
            .any(|end| name.to_string_lossy().ends_with(end))
        {
            fs::copy(entry.path(), modules.join(&name)).map_err(|error| error.to_string())?;
        }
    }
    let stamp = Stamp::of("npm", &wanted);
    if !stamp.holds() {
        let quiet = [
            "install",
            "--silent",
            "--no-audit",
            "--no-fund",
            "--no-package-lock",
        ];
        run(bounded("npm")
            .args(quiet)
            .current_dir(&modules)
            .env("PATH", &path))?;
        stamp.done()?;
    }
    Ok((modules, path))
}

/// What was installed; `None`, with a word to people, where it cannot be and need not.
fn installed<T>(what: &str, result: Result<T, String>) -> Option<T> {
    match result {
        Ok(found) => Some(found),
        Err(problem) if std::env::var("CLIENT_TESTS").is_ok_and(|word| word == "required") => {
            panic!("{what} cannot be installed: {problem}")
        }
        Err(problem) => {
            // The test runner does not capture this.
            let _ = writeln!(
                std::io::stderr(),
                "NOT RUN: {what} cannot be installed here; CLIENT_TESTS=required makes that a failure: {problem}"
            );
            None
        }
    }
}

/// One server that is open to all, and one that wants a key.
fn servers() -> [Server; 2] {
    [
        Server::serve_with(&["--workers", "2"], &server::PATIENT),
        Server::serve_with(&["--workers", "1", "--api-key", KEY], &server::PATIENT),
    ]
}

fn suite(command: &mut Command) {
    let [open, keyed] = servers();
    command
        .env("CONCLAVE_URL", format!("http://{}", open.http))
        .env("CONCLAVE_KEYED_URL", format!("http://{}", keyed.http));
    let output = command.output().expect("the suite starts");
    assert!(output.status.success(), "{}", shown(&output));
}

#[test]
fn python_clients_and_the_agent_of_the_examples() {
    let Some(python) = installed("the Python clients", python("requirements.txt")) else {
        return;
    };
    let options = [
        "-B",
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "--tb=short",
    ];
    suite(bounded(python).args(options).current_dir(sources()));
}

#[test]
fn npm_clients() {
    let Some((folder, path)) = installed("the npm clients", npm_packages()) else {
        return;
    };
    suite(
        bounded("node")
            .args(["--test"])
            .current_dir(folder)
            .env("PATH", path),
    );
}

#[test]
fn the_curl_commands_of_the_readme_answer() {
    if installed("curl", run(Command::new("curl").arg("--version"))).is_none() {
        return;
    }
    let server = Server::serve(&[]);
    let readme = fs::read_to_string(data::root().join("README.md")).expect("README.md");
    let joined = readme.replace("\\\n", " ");
    let commands: Vec<&str> = joined
        .lines()
        .filter(|line| line.starts_with("    curl "))
        .collect();
    assert!(commands.len() >= 2, "the README shows curl");
    for command in commands {
        let here = command.replace("127.0.0.1:8000", &server.http);
        let answer =
            run(Command::new("sh").args(["-c", &here])).unwrap_or_else(|problem| panic!("{problem}"));
        let is_stream = command.contains("\"stream\":true");
        let wanted = if is_stream {
            "data: [DONE]"
        } else {
            "\"finish_reason\":\"stop\""
        };
        assert!(answer.contains(wanted), "{command}: {answer}");
    }
}
