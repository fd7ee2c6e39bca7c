//! Copies of the tests' checkpoints, to be spoilt: cut, rewritten, and loaded whole.

use std::fs;
use std::path::{Path, PathBuf};

use conclave_worker::checkpoint::Checkpoint;
use conclave_worker::weights::{Form, Part, Progress, WeightSource};
use serde_json::Value;
use tempfile::TempDir;

use crate::common::{repository, sharded};

/// A copy of a tiny checkpoint that may be spoilt.
pub struct Copy {
    pub directory: TempDir,
}

impl Copy {
    pub fn of(checkpoint: &str) -> Copy {
        let directory = tempfile::tempdir().unwrap();
        let from = repository().join("tests/data/minimax-m2").join(checkpoint);
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            if !path.ends_with("reference.safetensors") {
                fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
            }
        }
        Copy { directory }
    }

    /// The tiny BF16 checkpoint, in three files.
    pub fn in_parts() -> Copy {
        let directory = tempfile::tempdir().unwrap();
        sharded::write(directory.path());
        Copy { directory }
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    pub fn model(&self) -> Vec<u8> {
        fs::read(self.path("model.safetensors")).unwrap()
    }

    pub fn set_model(&self, bytes: &[u8]) {
        fs::write(self.path("model.safetensors"), bytes).unwrap();
    }

    /// Changes the header's JSON; the data stays as it is.
    pub fn edit_header(&self, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) {
        let bytes = self.model();
        let (json, data) = split(&bytes);
        let mut header: Value = serde_json::from_slice(json).unwrap();
        edit(header.as_object_mut().unwrap());
        self.set_model(&join(&serde_json::to_vec(&header).unwrap(), data));
    }

    /// Changes the bytes of one tensor.
    pub fn edit_tensor(&self, name: &str, edit: impl FnOnce(&mut [u8])) {
        let mut bytes = self.model();
        let (json, data) = split(&bytes);
        let header: Value = serde_json::from_slice(json).unwrap();
        let start = bytes.len() - data.len();
        let offsets = &header[name]["data_offsets"];
        let range = |at: usize| start + offsets[at].as_u64().unwrap() as usize;
        let (from, to) = (range(0), range(1));
        edit(&mut bytes[from..to]);
        self.set_model(&bytes);
    }

    pub fn open_error(&self) -> String {
        match Checkpoint::open(self.directory.path(), None) {
            Ok(_) => panic!("it was opened"),
            Err(error) => error.to_string(),
        }
    }

    /// Opens and reads everything; the error of whichever step refuses it.
    pub fn load_error(&self) -> String {
        load(self.directory.path()).expect_err("it was loaded")
    }
}

pub fn load(directory: &Path) -> Result<(), String> {
    let source = WeightSource::open(directory, None).map_err(|error| error.to_string())?;
    let spec = source.spec().clone();
    let mut parts = vec![Part::Replicated];
    for (layer, shape) in (0u32..).zip(&spec.layers) {
        parts.extend((0..shape.moe.experts as u32).map(|expert| Part::Expert { layer, expert }));
    }
    source
        .read_in(&parts, 2, &Progress::new(), &|| false)
        .map_err(|error| error.to_string())?;
    for part in parts {
        match part {
            Part::Expert { layer, expert } => drop(
                source
                    .expert(layer, expert, Form::Rows)
                    .map_err(|error| error.to_string())?,
            ),
            Part::Replicated => {
                use conclave_worker::weights::modules;
                source
                    .linear(&modules::embedding(&spec), Form::Rows)
                    .map_err(|error| error.to_string())?;
                for layer in 0..spec.layers.len() {
                    let layer = modules::layer(&spec, layer);
                    for linear in [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate] {
                        source
                            .linear(linear, Form::Rows)
                            .map_err(|error| error.to_string())?;
                    }
                    source
                        .vector(&layer.attention_norm)
                        .map_err(|error| error.to_string())?;
                }
            }
        }
    }
    Ok(())
}

pub fn split(bytes: &[u8]) -> (&[u8], &[u8]) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8..].split_at(length)
}

pub fn join(json: &[u8], data: &[u8]) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes(), json, data].concat()
}

pub fn assert_says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
}

pub const NORM: &str = "model.norm.weight";
pub const Q: &str = "model.layers.0.self_attn.q_proj";
