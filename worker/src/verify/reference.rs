//! A reference file: `input_ids` I64 `[P]`, `logits` F32 `[P, vocab]`, `greedy_ids` I64 `[N]`, and `router_logits.L` F32
//! `[P, experts]` per layer.

use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;

use crate::checkpoint::{CheckpointError, DOWNLOAD_AGAIN, MappedFile, Result, header};

/// Values of a reference file.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    pub input_ids: Vec<u32>,
    /// `[input_ids, vocab]`.
    pub logits: Vec<f32>,
    pub greedy_ids: Vec<u32>,
    /// By layer, `[input_ids, experts]`; empty if the file has none.
    pub router_logits: Vec<Vec<f32>>,
}

impl Reference {
    /// Reads a file made for a model of this vocabulary.
    pub fn read(path: &Path, vocab: usize) -> Result<Reference> {
        let file = Arc::new(MappedFile::open(path)?);
        let tensors = Tensors {
            header: header::read(path, file.bytes())?,
            file,
        };
        let input_ids = tensors.ids("input_ids", vocab)?;
        let logits = tensors.floats("logits", Some(&[input_ids.len(), vocab]))?;
        let mut router_logits = Vec::new();
        while tensors.has(&format!("router_logits.{}", router_logits.len())) {
            router_logits.push(tensors.floats(&format!("router_logits.{}", router_logits.len()), None)?);
        }
        Ok(Reference {
            greedy_ids: tensors.ids("greedy_ids", vocab)?,
            input_ids,
            logits,
            router_logits,
        })
    }
}

struct Tensors {
    file: Arc<MappedFile>,
    header: header::Header,
}

impl Tensors {
    fn has(&self, name: &str) -> bool {
        self.header.tensors.iter().any(|(found, _)| found == name)
    }

    fn bytes(&self, name: &str, dtype: Dtype, shape: Option<&[usize]>) -> Result<&[u8]> {
        let path = &self.file.path;
        let Some((_, info)) = self.header.tensors.iter().find(|(found, _)| found == name) else {
            return Err(CheckpointError::file(
                path,
                format!("it has no tensor {name}"),
                DOWNLOAD_AGAIN,
            ));
        };
        if info.dtype != dtype || shape.is_some_and(|shape| shape != info.shape) {
            let expected = shape.map_or(String::new(), |shape| format!(" {shape:?}"));
            let problem = format!(
                "it is {} {:?}, expected {dtype}{expected}",
                info.dtype, info.shape
            );
            return Err(CheckpointError::tensor(path, name, problem));
        }
        let (from, to) = info.data_offsets;
        Ok(&self.file.bytes()[self.header.data_start + from..self.header.data_start + to])
    }

    fn ids(&self, name: &str, vocab: usize) -> Result<Vec<u32>> {
        let bytes = self.bytes(name, Dtype::I64, None)?;
        let ids = bytes
            .as_chunks()
            .0
            .iter()
            .map(|&id| match i64::from_le_bytes(id) {
                id if (0..vocab as i64).contains(&id) => Ok(id as u32),
                id => Err(CheckpointError::tensor(
                    &self.file.path,
                    name,
                    format!("id {id} is not below the model's vocabulary of {vocab}"),
                )),
            });
        ids.collect()
    }

    fn floats(&self, name: &str, shape: Option<&[usize]>) -> Result<Vec<f32>> {
        let bytes = self.bytes(name, Dtype::F32, shape)?;
        Ok(bytes
            .as_chunks()
            .0
            .iter()
            .map(|&value| f32::from_le_bytes(value))
            .collect())
    }
}
