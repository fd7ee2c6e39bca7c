//! GPTQ, no act order: `qweight` I32 `[in / 8, out]`, nibble n of row r is input 8r + n; `qzeros` I32 `[in / group, out / 8]`,
//! nibble n is output 8c + n and holds the zero less one (version 1) or the zero (version 2); `scales` F16
//! `[in / group, out]`; `g_idx` I32 `[in]`, which must be `i / group`.

use std::sync::Arc;

use conclave_kernels::weight::{HostInt4, PackedInt4, PackedOrder};
use safetensors::Dtype;
use serde_json::Value;

use super::dense;
use super::modules::LinearModule;
use super::pack_quantized::group_of;
use super::reader::{Named, required};
use super::transpose;
use crate::checkpoint::{Checkpoint, Result, Tensor};

/// What is there, once it is known to fit together.
struct Tensors<'a> {
    qweight: &'a Tensor,
    qzeros: &'a Tensor,
    scales: (String, &'a Tensor),
    group: usize,
    /// What a stored zero point lacks.
    zeros_less: u8,
}

fn tensors<'a>(checkpoint: &'a Checkpoint, module: &LinearModule) -> Result<Tensors<'a>> {
    let (out, input) = (module.out_features, module.in_features);
    let (name, tensor) = required(checkpoint, module, "qweight")?;
    let qweight = Named { name: &name, tensor };
    qweight.expect(Dtype::I32, &[input / 8, out])?;
    if !out.is_multiple_of(8) || !input.is_multiple_of(8) {
        return Err(qweight.error(format!("[{out}, {input}] is not made of multiples of 8")));
    }
    let scales = required(checkpoint, module, "scales")?;
    let named = named(&scales);
    let groups = named.tensor.shape.first().copied().unwrap_or(0);
    let group = group_of(named, input, groups)?;
    named.expect_shape(&[groups, out])?;
    let (name, qzeros) = required(checkpoint, module, "qzeros")?;
    Named {
        name: &name,
        tensor: qzeros,
    }
    .expect(Dtype::I32, &[groups, out / 8])?;
    check_order(checkpoint, module, group)?;
    Ok(Tensors {
        qweight: tensor,
        qzeros,
        scales,
        group,
        zeros_less: u8::from(!is_version_2(checkpoint)),
    })
}

fn named<'a>((name, tensor): &'a (String, &'a Tensor)) -> Named<'a> {
    Named { name, tensor }
}

/// As it is stored.
pub(super) fn packed(checkpoint: &Checkpoint, module: &LinearModule) -> Result<PackedInt4> {
    let tensors = tensors(checkpoint, module)?;
    Ok(PackedInt4 {
        order: PackedOrder::Inputs,
        words: tensors.qweight.slice().into_shared(),
        scale_type: dense::scale_type(named(&tensors.scales))?,
        scales: tensors.scales.1.slice().into_shared(),
        zeros: Some(tensors.qzeros.slice().into_shared()),
        zeros_less: tensors.zeros_less,
        group: tensors.group,
    })
}

/// As rows of outputs.
pub(super) fn rows(checkpoint: &Checkpoint, module: &LinearModule) -> Result<HostInt4> {
    let tensors = tensors(checkpoint, module)?;
    let (out, input, group) = (module.out_features, module.in_features, tensors.group);
    let groups = input / group;
    let by_group = dense::to_f32(named(&tensors.scales))?;
    let zeros = tensors.qzeros.bytes().as_chunks::<4>().0;
    let zero = |group: usize, output: usize| {
        let word = u32::from_le_bytes(zeros[group * (out / 8) + output / 8]);
        ((word >> (4 * (output % 8))) & 15) as u8 + tensors.zeros_less
    };
    let rows = (0..out).flat_map(|output| (0..groups).map(move |group| (group, output)));
    Ok(HostInt4 {
        packed: Arc::new(transpose::words(tensors.qweight.bytes(), input / 8, out)),
        scales: rows
            .clone()
            .map(|(group, output)| by_group[group * out + output])
            .collect(),
        zeros: Some(rows.map(|(group, output)| zero(group, output)).collect()),
        group,
    })
}

/// `g_idx`, if it is there, must count the groups up: any other order is act order.
fn check_order(checkpoint: &Checkpoint, module: &LinearModule, group: usize) -> Result<()> {
    let name = format!("{}.g_idx", module.name);
    let Some(tensor) = checkpoint.tensor(&name) else {
        return Ok(());
    };
    let order = Named { name: &name, tensor };
    order.expect(Dtype::I32, &[module.in_features])?;
    let mut entries = tensor
        .bytes()
        .as_chunks()
        .0
        .iter()
        .map(|&entry| i32::from_le_bytes(entry))
        .enumerate();
    match entries.find(|&(input, entry)| entry != (input / group) as i32) {
        None => Ok(()),
        Some((input, entry)) => Err(order.error(format!(
            "input {input} is of group {entry}, expected {}: act order is not supported",
            input / group
        ))),
    }
}

/// `checkpoint_format: gptq_v2` stores zeros as they are.
fn is_version_2(checkpoint: &Checkpoint) -> bool {
    let format = checkpoint
        .config
        .raw
        .pointer("/quantization_config/checkpoint_format");
    format.and_then(Value::as_str) == Some("gptq_v2")
}
