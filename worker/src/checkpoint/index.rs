//! `model.safetensors.index.json`: which file holds which tensor.
//!
//! Must stay true: the file is read only if it is at most [`MAX_INDEX_BYTES`] long; a file name in it names a file
//! of the same directory and nothing else.

use std::collections::{BTreeMap, HashMap};
use std::io::Read as _;
use std::path::Path;

use serde::Deserialize;

use super::error::{CheckpointError, Result, shortened};

/// The index of the largest published checkpoints has some 20 MB.
pub const MAX_INDEX_BYTES: u64 = 256 << 20;
/// Files of one checkpoint; the largest published ones have under 200.
pub const MAX_FILES: usize = 4096;

const ADVICE: &str = "download model.safetensors.index.json again, of the same revision as the files";

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

/// Tensor names by file, both sorted.
pub type FileTensors = BTreeMap<String, Vec<String>>;

/// Reads the index at `path`.
pub fn read(path: &Path) -> Result<FileTensors> {
    let wrong = |problem: String| CheckpointError::file(path, problem, ADVICE);
    let file = std::fs::File::open(path).map_err(|error| wrong(error.to_string()))?;
    let mut text = Vec::new();
    // One byte more than allowed tells a file that is too long from one that just fits.
    file.take(MAX_INDEX_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(|error| wrong(error.to_string()))?;
    if text.len() as u64 > MAX_INDEX_BYTES {
        return Err(wrong(format!("it is longer than {MAX_INDEX_BYTES} bytes")));
    }
    let index: Index = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    let mut files = FileTensors::new();
    for (tensor, file) in index.weight_map {
        if !is_plain_name(&file) {
            let problem = format!(
                "weight_map: tensor {} is in {:?}, which is no plain file name",
                shortened(&tensor),
                shortened(&file)
            );
            return Err(wrong(problem));
        }
        files.entry(file).or_default().push(tensor);
    }
    if files.is_empty() || files.len() > MAX_FILES {
        return Err(wrong(format!(
            "weight_map names {} files, 1 to {MAX_FILES} are allowed",
            files.len()
        )));
    }
    for tensors in files.values_mut() {
        tensors.sort_unstable();
    }
    Ok(files)
}

fn is_plain_name(name: &str) -> bool {
    const MAX_FILE_NAME: usize = 255;
    name.ends_with(".safetensors") && name.len() <= MAX_FILE_NAME && !name.contains(['/', '\\', '\0', ':'])
}
