//! Weights of linear layers in the format the checkpoint stores them in. All are logical `[out, in]`, row-major.

use std::sync::Arc;

/// Bytes that live as long as the weight: a slice of a memory map, or memory of our own (dummy weights, repacked
/// INT4). Cheap to clone.
pub type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A weight as the host has it, before a backend takes it over (`Backend::upload_linear`).
#[derive(Clone)]
pub struct HostLinear {
    pub out_features: usize,
    pub in_features: usize,
    pub data: HostWeight,
}

#[derive(Clone)]
pub enum HostWeight {
    /// `[out, in]` little-endian.
    F32(Bytes),
    Bf16(Bytes),
    F16(Bytes),
    /// `[out, in]` e4m3, and F32 scales `[ceil(out/128), ceil(in/128)]` that multiply.
    Fp8Block {
        data: Bytes,
        scales: Vec<f32>,
    },
    /// One layout for AWQ, GPTQ and compressed-tensors: repacked at load by the worker if the checkpoint's differs.
    Int4(HostInt4),
}

/// `w[o, i] = (q[o, i] - zero[o, i / group]) * scale[o, i / group]`.
#[derive(Clone)]
pub struct HostInt4 {
    /// `[out, in / 2]` bytes; the low nibble is the even input.
    pub packed: Bytes,
    /// `[out, in / group]`, as F32 (exact from F16 and BF16).
    pub scales: Vec<f32>,
    /// `[out, in / group]` values 0..=15 (or 16 for GPTQ's stored 15); `None`: all 8.
    pub zeros: Option<Vec<u8>>,
    pub group: usize,
}

impl HostLinear {
    /// Bytes that one use of the weight reads: data, scales and zeros.
    pub fn bytes(&self) -> usize {
        let len = |bytes: &Bytes| (**bytes).as_ref().len();
        match &self.data {
            HostWeight::F32(bytes) | HostWeight::Bf16(bytes) | HostWeight::F16(bytes) => len(bytes),
            HostWeight::Fp8Block { data, scales } => len(data) + scales.len() * 4,
            HostWeight::Int4(HostInt4 {
                packed,
                scales,
                zeros,
                ..
            }) => len(packed) + scales.len() * 4 + zeros.as_ref().map_or(0, |zeros| zeros.len() * 4),
        }
    }
}
