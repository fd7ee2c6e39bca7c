//! Flags > environment > file > defaults, and errors that name a setting and where it came from; on the real binary.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

fn conclave(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_conclave"))
        .args(arguments)
        .env_remove("CONCLAVE_CONFIG")
        .envs(environment.iter().copied())
        .output()
        .expect("runs")
}

/// What `plan --json` says with these settings.
fn plan(arguments: &[&str], environment: &[(&str, &str)]) -> Value {
    let all: Vec<&str> = ["plan", "--json"].iter().chain(arguments).copied().collect();
    let output = conclave(&all, environment);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The message and exit status of a run that must fail.
fn refused(arguments: &[&str], environment: &[(&str, &str)]) -> (String, Option<i32>) {
    let output = conclave(arguments, environment);
    assert!(
        !output.status.success(),
        "{arguments:?} {environment:?} was accepted"
    );
    (
        String::from_utf8_lossy(&output.stderr).into_owned(),
        output.status.code(),
    )
}

struct ConfigFile {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

impl ConfigFile {
    fn new(text: &str) -> ConfigFile {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("conclave.toml");
        fs::write(&path, text).expect("writes");
        ConfigFile {
            _directory: directory,
            path,
        }
    }

    fn name(&self) -> &str {
        self.path.to_str().expect("UTF-8")
    }
}

#[test]
fn each_layer_hides_the_one_below() {
    let file = ConfigFile::new(
        "workers = 2\ngpu = \"h100\"\nport = 9000\n[plan]\nworkers = 3\n[serve]\nworkers = 4\n",
    );
    let group = |arguments: &[&str], environment: &[(&str, &str)]| {
        let report = plan(arguments, environment);
        (report["group"]["workers"].clone(), report["group"]["gpu"].clone())
    };
    assert_eq!(group(&[], &[]), (1.into(), "h200".into()), "defaults");
    let with_file = ["--config", file.name()];
    assert_eq!(
        group(&with_file, &[]),
        (3.into(), "h100".into()),
        "the subcommand's table over the top level"
    );
    let environment = [("CONCLAVE_WORKERS", "5")];
    assert_eq!(
        group(&with_file, &environment),
        (5.into(), "h100".into()),
        "environment over file"
    );
    let flags = ["--config", file.name(), "--workers", "6", "--gpu=h200"];
    assert_eq!(
        group(&flags, &environment),
        (6.into(), "h200".into()),
        "flags over environment"
    );
    let by_environment = [("CONCLAVE_CONFIG", file.name())];
    assert_eq!(
        group(&[], &by_environment),
        (3.into(), "h100".into()),
        "the file itself from the environment"
    );
}

#[test]
fn tables_lists_and_switches_are_understood() {
    let file = ConfigFile::new(
        "hf_overrides = { num_hidden_layers = 2 }\nserved_model_name = [\"a\", \"b\"]\njson = true\n",
    );
    assert_eq!(plan(&["--config", file.name()], &[])["layers"], 2);
    let environment = [("CONCLAVE_HF_OVERRIDES", "{\"num_hidden_layers\":3}")];
    assert_eq!(plan(&[], &environment)["layers"], 3);
    let switched = conclave(&["plan"], &[("CONCLAVE_JSON", "yes")]);
    assert_eq!(switched.stdout.first(), Some(&b'{'));
    let off = conclave(&["plan", "--json=false"], &[("CONCLAVE_JSON", "1")]);
    assert_ne!(off.stdout.first(), Some(&b'{'));
}

#[test]
fn a_model_named_by_flag_wins_over_the_environment() {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo");
    let report = plan(&[demo], &[("CONCLAVE_MODEL", "/nowhere")]);
    assert_eq!(report["model"], demo);
    let (message, _) = refused(&["plan"], &[("CONCLAVE_MODEL", "/nowhere")]);
    assert!(
        message.contains("model /nowhere: there is no such directory"),
        "{message}"
    );
}

#[test]
fn an_unknown_key_is_named_with_its_source_and_a_suggestion() {
    let file = ConfigFile::new("wrokers = 2\n");
    let (message, code) = refused(&["plan", "--config", file.name()], &[]);
    assert_eq!(
        message,
        format!(
            "conclave: {}: wrokers is not a setting; did you mean workers?\n",
            file.name()
        )
    );
    assert_eq!(code, Some(2));

    let file = ConfigFile::new("[serve]\ncolour = 1\n");
    let (message, _) = refused(&["plan", "--config", file.name()], &[]);
    assert!(
        message.contains("conclave.toml [serve]: colour is not a setting"),
        "{message}"
    );

    let (message, _) = refused(&["plan"], &[("CONCLAVE_WORKRES", "2")]);
    assert!(
        message.contains("CONCLAVE_WORKRES is not a setting; did you mean CONCLAVE_WORKERS?"),
        "{message}"
    );

    let (message, _) = refused(&["plan", "--wrokers", "2"], &[]);
    assert!(
        message.contains("--wrokers") && message.contains("--workers"),
        "{message}"
    );
}

#[test]
fn what_kubernetes_tells_of_services_is_no_setting() {
    let links = [
        ("CONCLAVE_SERVICE_HOST", "10.0.0.1"),
        ("CONCLAVE_SERVICE_PORT", "8000"),
        ("CONCLAVE_SERVICE_PORT_HTTP", "8000"),
        ("CONCLAVE_PORT", "tcp://10.0.0.1:8000"),
        ("CONCLAVE_PORT_8000_TCP", "tcp://10.0.0.1:8000"),
        ("CONCLAVE_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("CONCLAVE_ROUTER_SERVICE_HOST", "10.0.0.2"),
        ("CONCLAVE_ROUTER_SERVICE_PORT_CLUSTER", "50052"),
        ("CONCLAVE_ROUTER_PORT", "tcp://10.0.0.2:50051"),
        ("CONCLAVE_ROUTER_PORT_50051_TCP_PROTO", "tcp"),
        ("CONCLAVE_WORKERS", "3"),
    ];
    assert_eq!(plan(&[], &links)["group"]["workers"], 3);
    let (message, _) = refused(&["plan"], &[("CONCLAVE_PORT_8000_TCP", "tcp://10.0.0.1:8000")]);
    assert!(
        message.contains("CONCLAVE_PORT_8000_TCP is not a setting"),
        "{message}"
    );
}

#[test]
fn a_bad_value_is_named_with_its_source() {
    let (message, _) = refused(&["plan"], &[("CONCLAVE_WORKERS", "two")]);
    assert!(
        message.starts_with(
            "conclave: environment variable CONCLAVE_WORKERS: workers is \"two\": it must be a whole number"
        ),
        "{message}"
    );

    let (message, _) = refused(&["plan", "--workers", "two"], &[]);
    assert!(
        message
            .starts_with("error: invalid value 'two' for '--workers <WORKERS>': it must be a whole number\n"),
        "{message}"
    );

    let file = ConfigFile::new("gpu = \"h1\"\n");
    let (message, _) = refused(&["plan", "--config", file.name()], &[]);
    assert!(
        message.contains("conclave.toml: gpu is \"h1\": not known; known: h100, h200"),
        "{message}"
    );

    let file = ConfigFile::new("log_format = \"xml\"\n");
    let (message, _) = refused(&["plan", "--config", file.name()], &[]);
    assert!(
        message.contains("log_format is \"xml\"") && message.contains("pretty, json"),
        "{message}"
    );

    let file = ConfigFile::new("workers = [1, 2]\n");
    let (message, _) = refused(&["plan", "--config", file.name()], &[]);
    assert!(message.contains("workers"), "{message}");

    let file = ConfigFile::new("gpu = \n");
    let (message, _) = refused(&["plan", "--config", file.name()], &[]);
    assert!(
        message.contains("conclave.toml") && message.contains("line 1"),
        "{message}"
    );

    let (message, _) = refused(&["plan", "--config", "/nowhere.toml"], &[]);
    assert!(
        message.contains("--config /nowhere.toml: there is no such file"),
        "{message}"
    );

    let (message, _) = refused(&["plan", "--gpu-memory-utilization", "NaN"], &[]);
    assert!(message.contains("above 0 and at most 1"), "{message}");
}

#[test]
fn the_files_of_deploy_say_flags_that_exist() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy");
    let help = |part: &&str| String::from_utf8(conclave(&[part, "--help"], &[]).stdout).expect("UTF-8");
    let known: String = ["serve", "router", "worker", "gateway"]
        .iter()
        .map(help)
        .collect();
    for name in ["compose.yaml", "kubernetes.yaml", "conclave.service"] {
        let text = fs::read_to_string(format!("{folder}/{name}")).expect(name);
        let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        let words = lines.flat_map(|line| line.split([' ', '[', ']', ',', '=', '"']));
        let flags: Vec<&str> = words
            .filter(|word| word.starts_with("--") && *word != "---")
            .collect();
        assert!(!flags.is_empty(), "{name}");
        for flag in flags {
            assert!(known.contains(&format!("{flag} ")), "{name}: {flag}");
        }
    }
}
