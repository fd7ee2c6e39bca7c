//! The core computes and does nothing else: its source names no clock, no socket, no thread, no source of chance, no
//! file, no async runtime, and its manifest no dependency but `conclave-plan`.

use std::fs;
use std::path::{Path, PathBuf};

const FORBIDDEN: [&str; 14] = [
    "tokio",
    "std::time",
    "Instant",
    "SystemTime",
    "std::net",
    "std::fs",
    "std::io",
    "std::thread",
    "std::process",
    "rand::",
    "getrandom",
    "RandomState",
    "HashMap",
    "async ",
];

/// The simulator runs in tests only; it reads its settings from the environment, and uses threads.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("sim") {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn the_source_names_nothing_impure() {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    assert!(files.len() > 10, "the source is elsewhere: {files:?}");
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        for (number, line) in (1..).zip(code) {
            for word in FORBIDDEN {
                assert!(
                    !line.contains(word),
                    "{}:{number}: {word} in {line:?}",
                    file.display()
                );
            }
        }
    }
}

#[test]
fn the_manifest_names_plan_only() {
    let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    let after = manifest.split("[dependencies]").nth(1).unwrap();
    let dependencies: Vec<&str> = after
        .lines()
        .take_while(|line| !line.starts_with('['))
        .filter(|line| !line.trim().is_empty())
        .collect();
    assert_eq!(dependencies, ["conclave-plan.workspace = true"]);
    assert!(!manifest.contains("[build-dependencies]"));
}
