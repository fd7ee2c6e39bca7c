//! The tiny BF16 checkpoint in three files with an index, as large checkpoints are published.
//!
//! Cut between the matrices of one expert and between the projections of one layer, where readers that think in
//! layers would break.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::json;

/// The first tensor, by name, of every file after the first.
const CUTS: [&str; 2] = [
    "model.layers.0.block_sparse_moe.experts.5.w2.weight",
    "model.layers.1.self_attn.o_proj.weight",
];

/// Name of one of the files, from 1.
pub fn part(number: usize) -> String {
    format!("model-{number:05}-of-00003.safetensors")
}

/// Writes the checkpoint into `to`, an empty folder.
pub fn write(to: &Path) {
    let from = super::tiny();
    fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let bytes = fs::read(from.join("model.safetensors")).unwrap();
    let whole = SafeTensors::deserialize(&bytes).unwrap();
    let mut files: BTreeMap<String, Vec<_>> = BTreeMap::new();
    let mut index = BTreeMap::new();
    for (name, tensor) in whole.tensors() {
        let file = part(1 + CUTS.iter().filter(|cut| name.as_str() >= **cut).count());
        index.insert(name.clone(), file.clone());
        files.entry(file).or_default().push((name, tensor));
    }
    for (file, tensors) in files {
        safetensors::serialize_to_file(tensors, None, &to.join(file)).unwrap();
    }
    let index = json!({"metadata": {"total_size": bytes.len()}, "weight_map": index});
    fs::write(to.join("model.safetensors.index.json"), index.to_string()).unwrap();
}
