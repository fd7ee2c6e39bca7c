//! GPTQ, no act order: `qweight` I32 `[in / 8, out]`, nibble n of row r is input 8r + n; `qzeros` I32 `[in / group, out / 8]`,
//! nibble n is output 8c + n and holds the zero less one (version 1) or the zero (version 2); `scales` F16
//! `[in / group, out]`; `g_idx` I32 `[in]`, which must be `i / group`.

use conclave_kernels::weight::{HostInt4, PackedInt4, PackedOrder};
use safetensors::Dtype;
use serde_json::Value;

use super::grouped::{self, Grouped};
use super::modules::LinearModule;
use super::reader::Named;
use super::transpose;
use crate::checkpoint::{Checkpoint, Result};

fn tensors<'a>(checkpoint: &'a Checkpoint, module: &LinearModule) -> Result<Grouped<'a>> {
    let (_, qweight) = grouped::qweight(checkpoint, module, [module.in_features / 8, module.out_features])?;
    let tensors = Grouped::new(checkpoint, module, qweight)?;
    check_order(checkpoint, module, tensors.group)?;
    Ok(tensors)
}

/// As it is stored.
pub(super) fn packed(checkpoint: &Checkpoint, module: &LinearModule) -> Result<PackedInt4> {
    tensors(checkpoint, module)?.packed(PackedOrder::Inputs, zeros_less(checkpoint))
}

/// As rows of outputs.
pub(super) fn rows(checkpoint: &Checkpoint, module: &LinearModule) -> Result<HostInt4> {
    let tensors = tensors(checkpoint, module)?;
    let words = transpose::words(
        tensors.qweight.bytes(),
        module.in_features / 8,
        module.out_features,
    );
    tensors.rows(words, |output| output, zeros_less(checkpoint))
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

/// What a stored zero point lacks: `checkpoint_format: gptq_v2` stores zeros as they are.
fn zeros_less(checkpoint: &Checkpoint) -> u8 {
    let format = checkpoint
        .config
        .raw
        .pointer("/quantization_config/checkpoint_format");
    u8::from(format.and_then(Value::as_str) != Some("gptq_v2"))
}
