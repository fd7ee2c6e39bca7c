//! One module of a checkpoint: its format is decided by the tensors that are there.
//!
//! May touch: the module's own tensors. Must stay true: a module in two formats, in none, or of another shape than
//! the model's is refused by name, before any of its values is used.

use conclave_kernels::dummy::DummyFormat;
use conclave_kernels::weight::{HostLinear, HostWeight};
use conclave_plan::quant::QuantFormat;
use safetensors::Dtype;

use super::modules::{LinearModule, VectorModule};
use super::{awq, dense, fp8, gptq, pack_quantized};
use crate::checkpoint::{Checkpoint, CheckpointError, DOWNLOAD_AGAIN, Result, Tensor};

/// A tensor and its name, for errors.
#[derive(Clone, Copy)]
pub(crate) struct Named<'a> {
    pub(crate) name: &'a str,
    pub(crate) tensor: &'a Tensor,
}

impl Named<'_> {
    pub(crate) fn error(&self, problem: impl Into<String>) -> CheckpointError {
        CheckpointError::tensor(&self.tensor.file.path, self.name, problem)
    }

    /// Fails unless the tensor has this type and shape.
    pub(crate) fn expect(&self, dtype: Dtype, shape: &[usize]) -> Result<()> {
        if self.tensor.dtype != dtype {
            return Err(self.error(format!("it is {}, expected {dtype}", self.tensor.dtype)));
        }
        self.expect_shape(shape)
    }

    pub(crate) fn expect_shape(&self, shape: &[usize]) -> Result<()> {
        if self.tensor.shape != shape {
            return Err(self.error(format!(
                "its shape is {:?}, expected {shape:?}",
                self.tensor.shape
            )));
        }
        Ok(())
    }
}

/// The formats a linear module may be stored in, each with the suffix that gives it away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// `.weight` alone.
    Dense,
    /// `.weight` and `.weight_scale_inv`.
    Fp8Block,
    /// `.qweight`: AWQ or GPTQ, told apart by the shape.
    Packed,
    /// `.weight_packed`.
    PackQuantized,
}

/// Suffixes of tensors of a linear module.
const SUFFIXES: [&str; 9] = [
    "weight",
    "weight_scale_inv",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_scale",
    "weight_shape",
];

/// Suffixes of variants that are not supported: present, they change what the others mean.
const REFUSED: [&str; 5] = [
    "bias",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
];

/// Every tensor of the module that the checkpoint holds.
pub(crate) fn tensors<'a>(
    checkpoint: &'a Checkpoint,
    module: &str,
) -> impl Iterator<Item = (String, &'a Tensor)> {
    SUFFIXES
        .map(|suffix| format!("{module}.{suffix}"))
        .into_iter()
        .filter_map(|name| checkpoint.tensor(&name).map(|tensor| (name, tensor)))
}

/// What INT4 is read as; other formats are always as they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Rows of outputs, whatever the checkpoint's order.
    Rows,
    /// As stored: for a device that repacks by itself.
    Packed,
}

/// Reads a linear module.
pub(crate) fn linear(checkpoint: &Checkpoint, module: &LinearModule, form: Form) -> Result<HostLinear> {
    let refused = |problem: String, advice| CheckpointError::Module {
        directory: checkpoint.directory.clone(),
        module: module.name.clone(),
        problem,
        advice,
    };
    let has = |suffix: &str| checkpoint.tensor(&format!("{}.{suffix}", module.name)).is_some();
    if let Some(suffix) = REFUSED.into_iter().find(|suffix| has(suffix)) {
        return Err(refused(
            format!("it has a tensor .{suffix}, which is not supported"),
            "supported: BF16, F16, F32, FP8 blocks, AWQ, GPTQ and symmetric pack-quantized, without biases",
        ));
    }
    let present: Vec<Format> = [
        (has("weight") && !has("weight_scale_inv"), Format::Dense),
        (has("weight") && has("weight_scale_inv"), Format::Fp8Block),
        (has("qweight"), Format::Packed),
        (has("weight_packed"), Format::PackQuantized),
    ]
    .into_iter()
    .filter_map(|(found, format)| found.then_some(format))
    .collect();
    let data: HostWeight = match present.as_slice() {
        [Format::Dense] => dense::linear(checkpoint, module)?,
        [Format::Fp8Block] => fp8::linear(checkpoint, module)?,
        [Format::PackQuantized] => match form {
            Form::Rows => HostWeight::Int4(pack_quantized::rows(checkpoint, module)?),
            Form::Packed => HostWeight::Packed(pack_quantized::packed(checkpoint, module)?),
        },
        [Format::Packed] => match (form, awq::is_awq(checkpoint, module)) {
            (Form::Rows, true) => HostWeight::Int4(awq::rows(checkpoint, module)?),
            (Form::Rows, false) => HostWeight::Int4(gptq::rows(checkpoint, module)?),
            (Form::Packed, true) => HostWeight::Packed(awq::packed(checkpoint, module)?),
            (Form::Packed, false) => HostWeight::Packed(gptq::packed(checkpoint, module)?),
        },
        [] => {
            return Err(refused(
                "none of its tensors (.weight, .qweight, .weight_packed) is there".into(),
                "download every file of the checkpoint; check that config.json belongs to it",
            ));
        }
        several => {
            return Err(refused(
                format!("it is stored in several formats: {several:?}"),
                DOWNLOAD_AGAIN,
            ));
        }
    };
    Ok(HostLinear {
        out_features: module.out_features,
        in_features: module.in_features,
        data,
    })
}

/// How a module is stored, by its tensors alone.
pub(crate) fn format(checkpoint: &Checkpoint, module: &LinearModule) -> DummyFormat {
    let tensor = |suffix: &str| checkpoint.tensor(&format!("{}.{suffix}", module.name));
    let group = match checkpoint.config.quant.as_ref().map(|quant| quant.format) {
        Some(QuantFormat::Int4 { group, .. }) => group,
        _ => 128,
    };
    match tensor("weight").map(|tensor| tensor.dtype) {
        Some(Dtype::F8_E4M3) => DummyFormat::Fp8Block,
        Some(Dtype::F32) => DummyFormat::F32,
        Some(Dtype::F16) => DummyFormat::F16,
        Some(_) => DummyFormat::Bf16,
        None if tensor("qweight").is_some() || tensor("weight_packed").is_some() => {
            DummyFormat::Int4 { group }
        }
        None => DummyFormat::Bf16,
    }
}

/// Reads a vector as F32.
pub(crate) fn vector(checkpoint: &Checkpoint, module: &VectorModule) -> Result<Vec<f32>> {
    let tensor = checkpoint
        .tensor(&module.name)
        .ok_or_else(|| CheckpointError::Module {
            directory: checkpoint.directory.clone(),
            module: module.name.clone(),
            problem: "the tensor is not there".into(),
            advice: "download every file of the checkpoint; check that config.json belongs to it",
        })?;
    let named = Named {
        name: &module.name,
        tensor,
    };
    named.expect_shape(&[module.len])?;
    dense::to_f32(named)
}

/// A tensor of a module, which must be there.
pub(crate) fn required<'a>(
    checkpoint: &'a Checkpoint,
    module: &LinearModule,
    suffix: &str,
) -> Result<(String, &'a Tensor)> {
    let name = format!("{}.{suffix}", module.name);
    match checkpoint.tensor(&name) {
        Some(tensor) => Ok((name, tensor)),
        None => Err(CheckpointError::Module {
            directory: checkpoint.directory.clone(),
            module: module.name.clone(),
            problem: format!("its tensor .{suffix} is not there"),
            advice: DOWNLOAD_AGAIN,
        }),
    }
}
