//! The identity of a checkpoint: SHA-256 over its config and its tensor table.
//!
//! Must stay true: the same checkpoint gives the same identity on every machine, whatever the order of keys in its
//! files and however its tensors are spread over files.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::Tensor;

/// Of config and tensor table.
pub fn of_checkpoint(config: &Value, tensors: &HashMap<String, Tensor>) -> String {
    let mut hash = Sha256::new();
    update(&mut hash, "config", &canonical(config));
    let sorted: BTreeMap<&String, &Tensor> = tensors.iter().collect();
    for (name, tensor) in sorted {
        update(
            &mut hash,
            name,
            &format!("{} {:?} {}", tensor.dtype, tensor.shape, tensor.len),
        );
    }
    hex(hash)
}

/// Of a config alone, for weights that come from a seed.
pub fn of_config(config: &Value, seed: u64) -> String {
    let mut hash = Sha256::new();
    update(&mut hash, "config", &canonical(config));
    update(&mut hash, "seed", &seed.to_string());
    hex(hash)
}

/// Lengths in front keep two different tables from giving the same bytes.
fn update(hash: &mut Sha256, name: &str, value: &str) {
    for text in [name, value] {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    }
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// JSON with the keys of every object in order.
fn canonical(value: &Value) -> String {
    match value {
        Value::Object(object) => {
            let sorted: BTreeMap<&String, String> = object
                .iter()
                .map(|(key, value)| (key, canonical(value)))
                .collect();
            let fields: Vec<String> = sorted
                .into_iter()
                .map(|(key, value)| format!("{}:{value}", Value::from(key.as_str())))
                .collect();
            format!("{{{}}}", fields.join(","))
        }
        Value::Array(list) => format!("[{}]", list.iter().map(canonical).collect::<Vec<_>>().join(",")),
        other => other.to_string(),
    }
}
