//! Corrupt, lying and incomplete checkpoints: each refused with the file and the tensor. Files in `files.rs`, the tensors
//! in them in `modules.rs`; here what must load all the same.
//!
//! Proves invariant C1 of ARCHITECTURE.md.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "../common/mod.rs"]
mod common;
mod copy;
mod files;
mod modules;

use std::fs;
use std::path::Path;

use common::{repository, tiny};
use conclave_worker::checkpoint::Checkpoint;
use conclave_worker::weights::{Part, Progress, WeightSource};
use copy::{Copy, load};
use serde_json::{Value, json};

#[test]
fn every_checkpoint_of_the_tests_loads_whole() {
    for name in ["bf16", "fp8", "awq", "gptq", "ct-int4"] {
        load(&repository().join("tests/data/minimax-m2/tiny-hd64").join(name)).unwrap();
    }
    load(Copy::in_parts().directory.path()).unwrap();
}

#[test]
fn the_identity_is_of_config_and_table_and_not_of_the_layout() {
    let id =
        |path: &Path, overrides: Option<&Value>| Checkpoint::open(path, overrides).unwrap().id().to_owned();
    let data = repository().join("tests/data/minimax-m2");
    let whole = id(&tiny(), None);
    assert_eq!(whole, id(Copy::in_parts().directory.path(), None));
    assert_ne!(whole, id(&data.join("tiny-hd64/fp8"), None));
    assert_ne!(whole, id(&tiny(), Some(&json!({"num_hidden_layers": 2}))));
    let copy = Copy::of("tiny-hd64/bf16");
    let config: Value = serde_json::from_slice(&fs::read(copy.path("config.json")).unwrap()).unwrap();
    let reversed: serde_json::Map<String, Value> = config
        .as_object()
        .unwrap()
        .iter()
        .rev()
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    fs::write(
        copy.path("config.json"),
        serde_json::to_vec_pretty(&reversed).unwrap(),
    )
    .unwrap();
    assert_eq!(whole, id(copy.directory.path(), None));
}

#[test]
fn tied_embeddings_and_extra_layers_are_understood() {
    let copy = Copy::of("tiny-hd64/bf16");
    let path = copy.path("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["tie_word_embeddings"] = json!(true);
    fs::write(&path, config.to_string()).unwrap();
    // An MTP layer after the last one, and no head.
    copy.edit_header(|header| {
        let head = header.remove("lm_head.weight").unwrap();
        header.insert("model.layers.3.eh_proj.weight".into(), head);
    });
    load(copy.directory.path()).unwrap();
    let source = WeightSource::open(copy.directory.path(), None).unwrap();
    use conclave_worker::weights::modules;
    assert_eq!(modules::head(source.spec()), modules::embedding(source.spec()));
}

#[test]
fn fewer_layers_by_override_load_only_theirs() {
    let source = WeightSource::open(&tiny(), Some(&json!({"num_hidden_layers": 1}))).unwrap();
    let all = WeightSource::open(&tiny(), None).unwrap();
    assert_eq!(source.stored_by_kind().experts * 3, all.stored_by_kind().experts);
    let progress = Progress::new();
    source
        .read_in(&[Part::Replicated], 2, &progress, &|| false)
        .unwrap();
    assert_eq!(progress.get().0, source.stored_bytes(&[Part::Replicated]));
    assert!(
        source
            .read_in(&[Part::Replicated], 2, &progress, &|| true)
            .unwrap_err()
            .to_string()
            .contains("cancelled")
    );
}
