//! Weights in BF16, F16 or F32, and reading any of them as F32.

use conclave_kernels::weight::{HostWeight, ScaleType};
use half::{bf16, f16};
use safetensors::Dtype;

use super::modules::LinearModule;
use super::reader::{Named, required};
use crate::checkpoint::{Checkpoint, Result};

/// `.weight` `[out, in]`, without a copy.
pub(super) fn linear(checkpoint: &Checkpoint, module: &LinearModule) -> Result<HostWeight> {
    let (name, tensor) = required(checkpoint, module, "weight")?;
    let named = Named { name: &name, tensor };
    named.expect_shape(&[module.out_features, module.in_features])?;
    let bytes = tensor.slice().into_shared();
    match tensor.dtype {
        Dtype::BF16 => Ok(HostWeight::Bf16(bytes)),
        Dtype::F16 => Ok(HostWeight::F16(bytes)),
        Dtype::F32 => Ok(HostWeight::F32(bytes)),
        Dtype::F8_E4M3 => Err(named.error("it is F8_E4M3, and its .weight_scale_inv is not there")),
        other => Err(named.error(format!("it is {other}, expected BF16, F16 or F32"))),
    }
}

/// The type of a tensor of scales.
pub(super) fn scale_type(named: Named<'_>) -> Result<ScaleType> {
    match named.tensor.dtype {
        Dtype::F32 => Ok(ScaleType::F32),
        Dtype::F16 => Ok(ScaleType::F16),
        Dtype::BF16 => Ok(ScaleType::Bf16),
        other => Err(named.error(format!("it is {other}, expected BF16, F16 or F32"))),
    }
}

/// The tensor's values as F32; NaN and infinity are refused.
pub(super) fn to_f32(named: Named<'_>) -> Result<Vec<f32>> {
    let bytes = named.tensor.bytes();
    let values: Vec<f32> = match named.tensor.dtype {
        Dtype::F32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&value| f32::from_le_bytes(value))
            .collect(),
        Dtype::BF16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&value| bf16::from_le_bytes(value).to_f32())
            .collect(),
        Dtype::F16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&value| f16::from_le_bytes(value).to_f32())
            .collect(),
        other => return Err(named.error(format!("it is {other}, expected BF16, F16 or F32"))),
    };
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(index) => Err(named.error(format!("value {index} is {}", values[index]))),
    }
}
