//! A tiny checkpoint with as many experts as many ranks need: one of the tiny checkpoints, its choice of experts widened and the
//! experts that it has not got drawn at random.

use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::Options;
use crate::cases::Random;

pub const EXPERTS: usize = 16;

fn bf16(random: &mut Random, count: usize, scale: f32) -> Vec<u8> {
    let values = (0..count).map(|_| half::bf16::from_f32(random.unit() * scale).to_le_bytes());
    values.flatten().collect()
}

fn f32s(random: &mut Random, count: usize, scale: f32) -> Vec<u8> {
    (0..count)
        .flat_map(|_| (random.unit() * scale).to_le_bytes())
        .collect()
}

/// Where it is, for all ranks of a check and nobody else.
pub fn folder(options: &Options) -> PathBuf {
    let of_all = match options.child {
        Some(_) => std::os::unix::process::parent_id(),
        None => std::process::id(),
    };
    std::env::temp_dir().join(format!("gpu-exchange-{EXPERTS}-experts-{of_all}"))
}

/// Writes it to `to`; `tiny`: a checkpoint in BF16.
pub fn make(to: &Path, tiny: &Path) {
    std::fs::create_dir_all(to).unwrap();
    let config = std::fs::read_to_string(tiny.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["num_local_experts"] = EXPERTS.into();
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    let data = std::fs::read(tiny.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&data).unwrap();
    let random = &mut Random(5);
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    // In one order: what is drawn depends on it.
    let mut all = file.tensors();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, tensor) in all {
        let (mut shape, mut bytes) = (tensor.shape().to_vec(), tensor.data().to_vec());
        if name.contains(".gate.") || name.ends_with("e_score_correction_bias") {
            shape[0] = EXPERTS;
            let (count, scale) = (
                shape.iter().product(),
                if name.contains(".gate.") { 0.5 } else { 0.05 },
            );
            bytes = match tensor.dtype() {
                Dtype::BF16 => bf16(random, count, scale),
                _ => f32s(random, count, scale),
            };
        }
        if let Some((before, part)) = name.split_once(".experts.0.") {
            let count = shape.iter().product();
            for expert in 0..EXPERTS {
                let name = format!("{before}.experts.{expert}.{part}");
                if file.tensor(&name).is_err() {
                    tensors.push((name, Dtype::BF16, shape.clone(), bf16(random, count, 0.05)));
                }
            }
        }
        tensors.push((name, tensor.dtype(), shape, bytes));
    }
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (
            name.as_str(),
            TensorView::new(*dtype, shape.clone(), bytes).unwrap(),
        )
    });
    safetensors::serialize_to_file(views, None, &to.join("model.safetensors")).unwrap();
    std::fs::copy(
        tiny.join("reference.safetensors"),
        to.join("reference.safetensors"),
    )
    .unwrap();
}
