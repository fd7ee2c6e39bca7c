//! compressed-tensors `pack-quantized`, symmetric: `weight_packed` I32 `[out, in / 8]`, nibble n of a word is input
//! 8c + n and holds q + 8; `weight_scale` `[out, in / group]`; `weight_shape` I64 `[2]` is `[out, in]`.
//!
//! The order of nibbles is [`HostInt4`]'s, so the packed bytes stay where they are. The group follows from the
//! shape of the scales.

use conclave_kernels::weight::{HostInt4, PackedInt4, PackedOrder};
use safetensors::Dtype;

use super::dense;
use super::modules::LinearModule;
use super::reader::{Named, required};
use crate::checkpoint::{Checkpoint, Result};

/// As it is stored, with values as [`HostInt4`] has them.
pub(super) fn rows(checkpoint: &Checkpoint, module: &LinearModule) -> Result<HostInt4> {
    let packed = packed(checkpoint, module)?;
    let (name, tensor) = required(checkpoint, module, "weight_scale")?;
    Ok(HostInt4 {
        packed: packed.words,
        scales: dense::to_f32(Named { name: &name, tensor })?,
        zeros: None,
        group: packed.group,
    })
}

/// As it is stored.
pub(super) fn packed(checkpoint: &Checkpoint, module: &LinearModule) -> Result<PackedInt4> {
    let (out, input) = (module.out_features, module.in_features);
    let (name, tensor) = required(checkpoint, module, "weight_shape")?;
    let shape = Named { name: &name, tensor };
    shape.expect(Dtype::I64, &[2])?;
    let sides: Vec<i64> = tensor
        .bytes()
        .as_chunks()
        .0
        .iter()
        .map(|&side| i64::from_le_bytes(side))
        .collect();
    if sides != [out as i64, input as i64] {
        return Err(shape.error(format!("it says {sides:?}, the model [{out}, {input}]")));
    }
    let (name, packed) = required(checkpoint, module, "weight_packed")?;
    Named {
        name: &name,
        tensor: packed,
    }
    .expect(Dtype::I32, &[out, input.div_ceil(8)])?;
    let (name, tensor) = required(checkpoint, module, "weight_scale")?;
    let scales = Named { name: &name, tensor };
    let group = match tensor.shape.as_slice() {
        &[rows, groups] if rows == out => group_of(scales, input, groups)?,
        _ => {
            return Err(scales.error(format!(
                "its shape is {:?}, expected [{out}, groups]",
                tensor.shape
            )));
        }
    };
    Ok(PackedInt4 {
        order: PackedOrder::Rows,
        words: packed.slice().into_shared(),
        scale_type: dense::scale_type(scales)?,
        scales: tensor.slice().into_shared(),
        zeros: None,
        zeros_less: 0,
        group,
    })
}

/// Inputs per group if `groups` of them make `input`; a multiple of 8, so that a word lies in one group.
pub(super) fn group_of(scales: Named<'_>, input: usize, groups: usize) -> Result<usize> {
    if groups == 0 || !input.is_multiple_of(groups) || !(input / groups).is_multiple_of(8) {
        return Err(scales.error(format!(
            "{groups} groups do not divide {input} inputs into multiples of 8"
        )));
    }
    Ok(input / groups)
}
