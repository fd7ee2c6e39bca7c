//! Writes a checkpoint of random weights for a config, in the formats and names that the config announces, to have files of
//! a size to load:
//! `cargo run --release -p conclave-worker --example write_checkpoint -- CONFIG_DIRECTORY NEW_DIRECTORY [OVERRIDES]`,
//! OVERRIDES in JSON as `--hf-overrides` takes them.

use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use conclave_kernels::dummy::DummyFormat;
use conclave_plan::quant::{Int4Layout, QuantFormat};
use conclave_worker::weights::WeightSource;
use conclave_worker::weights::modules::{self, LinearModule};
use serde_json::{Map, Value, json};

/// Bytes that one thread makes at a time.
const CHUNK_BYTES: usize = 8 << 20;

struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    start: usize,
    len: usize,
    /// Of a tensor that is not random.
    values: Option<[u64; 2]>,
}

#[derive(Default)]
struct Tensors {
    all: Vec<Tensor>,
    end: usize,
}

impl Tensors {
    fn add(&mut self, name: String, dtype: &'static str, shape: &[usize]) {
        let each = match dtype {
            "F8_E4M3" => 1,
            "BF16" | "F16" => 2,
            "I64" => 8,
            _ => 4,
        };
        let len = each * shape.iter().product::<usize>();
        let (shape, start) = (shape.to_vec(), self.end);
        self.end += len;
        self.all.push(Tensor {
            name,
            dtype,
            shape,
            start,
            len,
            values: None,
        });
    }

    fn linear(&mut self, module: &LinearModule, format: DummyFormat, layout: Int4Layout) {
        let (out, input) = (module.out_features, module.in_features);
        let mut add = |suffix: &str, dtype, shape: &[usize]| {
            self.add(format!("{}.{suffix}", module.name), dtype, shape)
        };
        match format {
            DummyFormat::F32 => add("weight", "F32", &[out, input]),
            DummyFormat::F16 => add("weight", "F16", &[out, input]),
            DummyFormat::Bf16 => add("weight", "BF16", &[out, input]),
            DummyFormat::Fp8Block => {
                add("weight", "F8_E4M3", &[out, input]);
                add(
                    "weight_scale_inv",
                    "F32",
                    &[out.div_ceil(128), input.div_ceil(128)],
                );
            }
            DummyFormat::Int4 { group } => {
                let groups = input / group;
                match layout {
                    Int4Layout::PackQuantized => {
                        add("weight_packed", "I32", &[out, input / 8]);
                        add("weight_scale", "BF16", &[out, groups]);
                        add("weight_shape", "I64", &[2]);
                        if let Some(last) = self.all.last_mut() {
                            last.values = Some([out as u64, input as u64]);
                        }
                        return;
                    }
                    Int4Layout::AwqGemm => add("qweight", "I32", &[input, out / 8]),
                    Int4Layout::Gptq => add("qweight", "I32", &[input / 8, out]),
                }
                add("qzeros", "I32", &[groups, out / 8]);
                add("scales", "F16", &[groups, out]);
            }
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(from), Some(to)) = (
        arguments.next().map(PathBuf::from),
        arguments.next().map(PathBuf::from),
    ) else {
        return Err(
            "two directories: one with config.json, one to write; perhaps overrides of the config".into(),
        );
    };
    let overrides = arguments
        .next()
        .map(|text| serde_json::from_str(&text.to_string_lossy()));
    let overrides: Option<Value> = overrides.transpose()?;
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let source = WeightSource::dummy(&from, overrides.as_ref(), 0, threads)?;
    let tensors = tensors(&source);
    let header: Map<String, Value> = tensors
        .all
        .iter()
        .map(|tensor| {
            let Tensor {
                name,
                dtype,
                shape,
                start,
                len,
                ..
            } = tensor;
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, start + len]});
            (name.clone(), entry)
        })
        .collect();
    fs::create_dir(&to)?;
    fs::write(to.join("config.json"), serde_json::to_vec(&source.config().raw)?)?;
    let header = serde_json::to_vec(&header)?;
    let file = File::create(to.join("model.safetensors"))?;
    file.write_all_at(&(header.len() as u64).to_le_bytes(), 0)?;
    file.write_all_at(&header, 8)?;
    let (all, first) = (&tensors.all, 8 + header.len());
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        let write = || {
            while let Some(tensor) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                write(&file, tensor, first)?;
            }
            Ok(())
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(write)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join())
            .try_for_each(|ended| ended.unwrap_or_else(|_| Err("a thread panicked".to_owned())))
    })?;
    file.sync_all()?;
    println!("{}: {:.2} GB", to.display(), tensors.end as f64 / 1e9);
    Ok(())
}

fn tensors(source: &WeightSource) -> Tensors {
    let spec = source.spec();
    let layout = match source.config().quant.as_ref().map(|quant| quant.format) {
        Some(QuantFormat::Int4 { layout, .. }) => layout,
        _ => Int4Layout::PackQuantized,
    };
    let mut linears = vec![modules::embedding(spec), modules::head(spec)];
    linears.dedup();
    let mut vectors = vec![modules::final_norm(spec)];
    for (layer, shape) in spec.layers.iter().enumerate() {
        let modules = modules::layer(spec, layer);
        linears.extend([modules.q, modules.k, modules.v, modules.o, modules.gate]);
        vectors.extend([modules.attention_norm, modules.moe_norm]);
        let optional = [modules.q_norm, modules.k_norm, modules.selection_bias];
        vectors.extend(optional.into_iter().flatten());
        for expert in 0..shape.moe.experts {
            let expert = modules::expert(spec, layer, expert);
            linears.extend([expert.gate, expert.up, expert.down]);
        }
    }
    let mut tensors = Tensors::default();
    for module in &linears {
        tensors.linear(module, source.format(module), layout);
    }
    for vector in vectors {
        tensors.add(vector.name, "BF16", &[vector.len]);
    }
    tensors
}

/// Random bits, of which some are cleared so that every value is finite and small.
fn write(file: &File, tensor: &Tensor, first: usize) -> Result<(), String> {
    let mask: u64 = match tensor.dtype {
        "BF16" => 0xbdff_bdff_bdff_bdff,
        "F16" => 0xbbff_bbff_bbff_bbff,
        "F32" => 0xbdff_ffff_bdff_ffff,
        "F8_E4M3" => 0xbfbf_bfbf_bfbf_bfbf,
        _ => u64::MAX,
    };
    let mut state = tensor.start as u64 + 1;
    for offset in (0..tensor.len).step_by(CHUNK_BYTES) {
        let len = CHUNK_BYTES.min(tensor.len - offset);
        let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
            // xorshift
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state & mask).to_le_bytes()
        })
        .take(len.div_ceil(8))
        .flatten()
        .collect();
        bytes.truncate(len);
        if let Some(values) = tensor.values {
            bytes = values.map(u64::to_le_bytes).concat();
        }
        let at = (first + tensor.start + offset) as u64;
        file.write_all_at(&bytes, at).map_err(|error| error.to_string())?;
    }
    Ok(())
}
