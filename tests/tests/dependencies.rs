//! Who may depend on whom, read from `cargo metadata`: the direction that ARCHITECTURE.md draws, what the router's core
//! may name, and the licences of everything that is linked.
//!
//! Proves invariants D1 and D2 of ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use conclave_tests::data;
use serde_json::Value;

/// The resolved graph of normal dependencies (no build or test dependencies), by package name.
struct Graph {
    edges: BTreeMap<String, BTreeSet<String>>,
    licences: BTreeMap<String, String>,
}

impl Graph {
    fn read() -> Graph {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
        let output = Command::new(cargo)
            .args(["metadata", "--format-version", "1", "--locked", "--offline"])
            .args(["--filter-platform", "x86_64-unknown-linux-gnu", "--all-features"])
            .arg("--manifest-path")
            .arg(data::root().join("Cargo.toml"))
            .output()
            .expect("cargo runs");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut names = BTreeMap::new();
        let mut licences = BTreeMap::new();
        for package in list(&metadata["packages"]) {
            names.insert(text(&package["id"]), text(&package["name"]));
            licences.insert(text(&package["name"]), text(&package["license"]));
        }
        let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for node in list(&metadata["resolve"]["nodes"]) {
            let normal = list(&node["deps"])
                .iter()
                .filter(|dep| list(&dep["dep_kinds"]).iter().any(|kind| kind["kind"].is_null()));
            let targets = normal.map(|dep| names[&text(&dep["pkg"])].clone());
            edges
                .entry(names[&text(&node["id"])].clone())
                .or_default()
                .extend(targets);
        }
        Graph { edges, licences }
    }

    fn direct(&self, package: &str) -> BTreeSet<&str> {
        self.edges[package].iter().map(String::as_str).collect()
    }

    /// Everything that `package` is linked with.
    fn reach(&self, package: &str) -> BTreeSet<&str> {
        let mut found = BTreeSet::new();
        let mut open = vec![package];
        while let Some(next) = open.pop() {
            for target in self.direct(next) {
                if found.insert(target) {
                    open.push(target);
                }
            }
        }
        found
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn ours(packages: BTreeSet<&str>) -> Vec<&str> {
    packages
        .into_iter()
        .filter(|name| name.starts_with("conclave"))
        .collect()
}

#[test]
fn each_crate_reaches_only_what_it_may() {
    let graph = Graph::read();
    let allowed: [(&str, &[&str]); 9] = [
        ("conclave-proto", &[]),
        ("conclave-plan", &[]),
        ("conclave-text", &[]),
        ("conclave-kernels", &["conclave-plan"]),
        ("conclave-router-core", &["conclave-plan"]),
        (
            "conclave-worker",
            &["conclave-kernels", "conclave-plan", "conclave-proto"],
        ),
        (
            "conclave-router",
            &[
                "conclave-plan",
                "conclave-proto",
                "conclave-router-core",
                "conclave-text",
            ],
        ),
        ("conclave-gateway", &["conclave-proto"]),
        // The tests speak to processes and their public APIs only, of which the .proto files are one.
        ("conclave-tests", &["conclave-proto"]),
    ];
    for (package, may) in allowed {
        for found in ours(graph.reach(package)) {
            assert!(
                may.contains(&found),
                "{package} reaches {found}; it may reach {may:?}"
            );
        }
    }
}

#[test]
fn the_core_depends_on_plan_alone_and_names_nothing_of_the_outside() {
    let graph = Graph::read();
    assert_eq!(
        graph.direct("conclave-router-core"),
        BTreeSet::from(["conclave-plan"])
    );
    let reach = graph.reach("conclave-router-core");
    for outside in [
        "tokio",
        "mio",
        "socket2",
        "rand",
        "getrandom",
        "chrono",
        "time",
        "libc",
        "tracing",
    ] {
        assert!(!reach.contains(outside), "conclave-router-core reaches {outside}");
    }
    let banned = [
        "std::net",
        "std::fs",
        "std::io",
        "std::process",
        "std::thread",
        "std::env",
        "Instant",
        "SystemTime",
        "async fn",
        "unsafe",
        "RandomState",
        "HashMap",
        "HashSet",
        "println!",
        "eprintln!",
    ];
    let mut files = Vec::new();
    rust_files(&data::root().join("router/core/src"), &mut files);
    // The simulator stands around the core, is built for tests alone, and is told by the environment which seeds to run.
    files.retain(|file| !file.components().any(|part| part.as_os_str() == "sim"));
    assert!(!files.is_empty());
    for file in files {
        let text = fs::read_to_string(&file).expect("source");
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for name in banned {
                let named = code.match_indices(name).any(|(at, _)| {
                    let before = code[..at].chars().next_back();
                    let after = code[at + name.len()..].chars().next();
                    let inside_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
                    !inside_word(before) && !inside_word(after)
                });
                assert!(
                    !named,
                    "{}:{}: the core may not name {name}",
                    file.display(),
                    number + 1
                );
            }
        }
    }
}

fn rust_files(directory: &Path, files: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(directory).expect("directory") {
        let path = entry.expect("entry").path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn every_licence_is_on_the_list() {
    let graph = Graph::read();
    let deny = fs::read_to_string(data::root().join("deny.toml")).expect("deny.toml");
    let line = deny
        .lines()
        .find(|line| line.starts_with("allow = ["))
        .expect("the allowed licences");
    let allowed: Vec<&str> = line.split('"').skip(1).step_by(2).collect();
    // `(A OR B) AND C`: every part must offer one that is allowed.
    let passes = |expression: &str| {
        expression.split(" AND ").all(|part| {
            let part = part
                .replace(['(', ')'], "")
                .replace(" / ", " OR ")
                .replace('/', " OR ");
            part.split(" OR ")
                .any(|licence| allowed.contains(&licence.trim()))
        })
    };
    for (package, licence) in &graph.licences {
        assert!(
            passes(licence),
            "{package} has licence {licence:?}; allowed are {allowed:?} (deny.toml)"
        );
    }
}
