//! Where the test data of this repository lies.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The bundled model.
pub fn demo_model() -> PathBuf {
    root().join("models/demo")
}

/// A tiny reference checkpoint, e.g. `tiny-hd64/bf16`.
pub fn tiny(name: &str) -> PathBuf {
    root().join("tests/data/minimax-m2").join(name)
}

/// The recorded conversations of the bundled model that have the given kind.
pub fn demo_prompts(kind: &str) -> Vec<Value> {
    let path = root().join("tests/data/demo/prompts.jsonl");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let cases = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("a JSON line"));
    let cases: Vec<Value> = cases.filter(|case| case["kind"] == kind).collect();
    assert!(!cases.is_empty(), "no case of kind {kind} in {}", path.display());
    cases
}
