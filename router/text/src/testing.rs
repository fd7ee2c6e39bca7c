//! Where the tests' data lies, and how tests take time.

use std::{path::PathBuf, time::Duration};

use crate::clock::processor_time;

pub fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub fn demo() -> PathBuf {
    repository().join("models/demo")
}

pub fn data(name: &str) -> String {
    let file = repository().join("tests/data").join(name);
    std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// Runs on the calling thread and tells the processor time it took: other work on the machine must not fail the test
/// of a bound.
pub fn timed<T>(run: impl FnOnce() -> T) -> (T, Duration) {
    let start = processor_time();
    let result = run();
    (result, processor_time() - start)
}
