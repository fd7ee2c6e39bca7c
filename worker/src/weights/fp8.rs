//! FP8 e4m3 with one scale per block of 128 x 128: `w = weight * weight_scale_inv[o / 128, i / 128]`.

use conclave_kernels::weight::HostWeight;
use safetensors::Dtype;

use super::dense;
use super::modules::LinearModule;
use super::reader::{Named, required};
use crate::checkpoint::{Checkpoint, Result};

/// Rows and columns of a block.
const BLOCK: usize = 128;
/// Kernels keep the factor that e4m3's fields lack, 2^120, in the scale; from here on that overflows. Such weights would
/// reach 114,000, far beyond any model's.
const SCALES_BELOW: f32 = 255.0;

/// `.weight` without a copy, `.weight_scale_inv` as F32. That no code is NaN is checked when the bytes are read.
pub(super) fn linear(checkpoint: &Checkpoint, module: &LinearModule) -> Result<HostWeight> {
    let (name, tensor) = required(checkpoint, module, "weight")?;
    Named { name: &name, tensor }.expect(Dtype::F8_E4M3, &[module.out_features, module.in_features])?;
    let (scale_name, scale_tensor) = required(checkpoint, module, "weight_scale_inv")?;
    let scales = Named {
        name: &scale_name,
        tensor: scale_tensor,
    };
    scales.expect_shape(&[
        module.out_features.div_ceil(BLOCK),
        module.in_features.div_ceil(BLOCK),
    ])?;
    let values = dense::to_f32(scales)?;
    if let Some(index) = values.iter().position(|scale| scale.abs() >= SCALES_BELOW) {
        let value = values[index];
        return Err(scales.error(format!(
            "value {index} is {value}: scales below {SCALES_BELOW} are supported, convert the checkpoint again"
        )));
    }
    Ok(HostWeight::Fp8Block {
        data: tensor.slice().into_shared(),
        scales: values,
    })
}
