//! A checkpoint in the layout of Hugging Face: `config.json` and one or many safetensors files, memory-mapped.
//!
//! Opening reads the config, the index and the headers, and checks all of them against each other; no byte of a
//! tensor is touched. May touch: the directory, read-only. Must stay true: every [`Tensor`] lies inside its file
//! and has exactly the bytes its type and shape say; every name is held by one file.

mod bus;
mod error;
mod fingerprint;
pub mod header;
pub mod index;
mod map;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use conclave_plan::config::Config;
use safetensors::Dtype;
use serde_json::Value;

pub use error::{CheckpointError, Result};
pub(crate) use error::{DOWNLOAD_AGAIN, shortened};
pub use fingerprint::of_config as config_fingerprint;
pub use map::{MappedFile, MappedSlice, reads_huge_pages};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// An opened checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    pub directory: PathBuf,
    pub config: Config,
    tensors: HashMap<String, Tensor>,
    id: String,
}

/// Where a tensor lies, and what it is.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub file: Arc<MappedFile>,
    /// First byte within the file.
    pub start: usize,
    pub len: usize,
}

impl Tensor {
    pub fn slice(&self) -> MappedSlice {
        MappedSlice::new(&self.file, self.start, self.len)
            .expect("a tensor lies inside its file: checked when it was opened")
    }

    pub fn bytes(&self) -> &[u8] {
        &self.file.bytes()[self.start..self.start + self.len]
    }
}

impl Checkpoint {
    /// Opens `directory`; `overrides` (`--hf-overrides`) are merged into its config.
    pub fn open(directory: &Path, overrides: Option<&Value>) -> Result<Checkpoint> {
        let config = conclave_plan::config::read(directory, overrides)?;
        let index_path = directory.join(INDEX_FILE);
        let mut tensors: HashMap<String, Tensor> = HashMap::new();
        if index_path.exists() {
            let mut unlisted = Vec::new();
            for (file, listed) in index::read(&index_path)? {
                let path = directory.join(file);
                let mut found = open_file(&path)?;
                take_listed(&path, &index_path, &listed, &mut found, &mut tensors)?;
                unlisted.extend(found.into_keys().map(|name| (name, path.clone())));
            }
            refuse_duplicates(&unlisted, &tensors)?;
        } else {
            tensors = open_file(&single_file(directory)?)?;
        }
        let id = fingerprint::of_checkpoint(&config.raw, &tensors);
        Ok(Checkpoint {
            directory: directory.to_owned(),
            config,
            tensors,
            id,
        })
    }

    /// SHA-256 over the config and the tensor table (names, types, shapes), not over the data: all ranks of a
    /// cluster must have the same.
    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }
}

/// `model.safetensors`; if it is missing, an error that tells a missing index from a missing checkpoint.
fn single_file(directory: &Path) -> Result<PathBuf> {
    let path = directory.join(SINGLE_FILE);
    if path.exists() {
        return Ok(path);
    }
    let mut parts = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().contains("-of-"));
    Err(match parts.next() {
        Some(_) => CheckpointError::file(
            &directory.join(INDEX_FILE),
            "it is missing, and the checkpoint is in parts",
            "download the index too",
        ),
        None => CheckpointError::file(
            &path,
            "it is missing, and there is no model.safetensors.index.json",
            "point at the directory of a Hugging Face checkpoint in safetensors format",
        ),
    })
}

/// Maps one file and describes its tensors.
fn open_file(path: &Path) -> Result<HashMap<String, Tensor>> {
    let file = Arc::new(MappedFile::open(path)?);
    let header = header::read(path, file.bytes())?;
    file.prefer_huge_pages();
    let tensors = header.tensors.into_iter().map(|(name, info)| {
        let (from, to) = info.data_offsets;
        let tensor = Tensor {
            dtype: info.dtype,
            shape: info.shape,
            file: Arc::clone(&file),
            start: header.data_start + from,
            len: to - from,
        };
        (name, tensor)
    });
    Ok(tensors.collect())
}

/// Moves the tensors that the index lists for a file; each must be there.
fn take_listed(
    path: &Path,
    index: &Path,
    listed: &[String],
    found: &mut HashMap<String, Tensor>,
    tensors: &mut HashMap<String, Tensor>,
) -> Result<()> {
    for name in listed {
        let Some(tensor) = found.remove(name) else {
            let problem = format!("the file does not hold it, though {} says so", index.display());
            return Err(CheckpointError::tensor(path, name, problem));
        };
        tensors.insert(name.clone(), tensor);
    }
    Ok(())
}

/// A tensor that the index does not list for its file is not used; one that it lists for another file would be
/// there twice, and nobody can tell which is right.
fn refuse_duplicates(unlisted: &[(String, PathBuf)], tensors: &HashMap<String, Tensor>) -> Result<()> {
    for (name, path) in unlisted {
        if let Some(tensor) = tensors.get(name) {
            let problem = format!("{} holds it too", tensor.file.path.display());
            return Err(CheckpointError::tensor(path, name, problem));
        }
    }
    if let Some((name, path)) = unlisted.first() {
        let name = shortened(name);
        tracing::warn!(count = unlisted.len(), first = %name, file = %path.display(), "tensors that the index does not list are not used");
    }
    Ok(())
}
