//! Writes a checkpoint of random BF16 weights for a config, to have files of a size to load:
//! `cargo run --release -p conclave-worker --example write_checkpoint -- CONFIG_DIRECTORY NEW_DIRECTORY`.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use conclave_plan::config;
use conclave_worker::weights::modules;
use serde_json::{Map, json};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(from), Some(to)) = (arguments.next(), arguments.next()) else {
        return Err("two directories: one with config.json, one to write".into());
    };
    let spec = config::read(&from, None)?.spec;
    let mut linears = vec![modules::embedding(&spec), modules::head(&spec)];
    let mut vectors = vec![modules::final_norm(&spec)];
    for (layer, shape) in spec.layers.iter().enumerate() {
        let modules = modules::layer(&spec, layer);
        linears.extend([modules.q, modules.k, modules.v, modules.o, modules.gate]);
        vectors.extend([modules.attention_norm, modules.moe_norm]);
        let optional = [modules.q_norm, modules.k_norm, modules.selection_bias];
        vectors.extend(optional.into_iter().flatten());
        for expert in 0..shape.moe.experts {
            let expert = modules::expert(&spec, layer, expert);
            linears.extend([expert.gate, expert.up, expert.down]);
        }
    }
    linears.dedup();
    let shape = |module: modules::LinearModule| {
        let shape = vec![module.out_features, module.in_features];
        (format!("{}.weight", module.name), shape)
    };
    let tensors: Vec<(String, Vec<usize>)> = linears
        .into_iter()
        .map(shape)
        .chain(vectors.into_iter().map(|module| (module.name, vec![module.len])))
        .collect();

    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in &tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(
            name.clone(),
            json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}),
        );
    }
    fs::create_dir(&to)?;
    fs::copy(from.join("config.json"), to.join("config.json"))?;
    let header = serde_json::to_vec(&header)?;
    let mut file = BufWriter::with_capacity(1 << 20, File::create(to.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut state = 1u64;
    for _ in 0..end / 8 {
        // xorshift; the exponents are made small, so that every value is finite.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&(state & 0xbdff_bdff_bdff_bdff).to_le_bytes())?;
    }
    file.write_all(&[0; 8][..end % 8])?;
    file.into_inner()?.sync_all()?;
    println!("{}: {:.2} GB", to.display(), end as f64 / 1e9);
    Ok(())
}
