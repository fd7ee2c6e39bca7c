//! Launch of `embed.cu`.

use crate::backend::{KernelError, Result};
use crate::cuda::weights::{Linear, WeightParam};
use crate::cuda::{Format, Gpu, Launch};

/// Mirrors `EmbedParams`.
#[repr(C)]
struct EmbedParams {
    table: WeightParam,
    format: i32,
    ids: u64,
    sampled: u64,
    hidden: u64,
    width: i32,
}

/// Looks the step's ids up; `sampled`: where tokens of the last sampling are.
pub(crate) fn embed(
    gpu: &Gpu,
    table: &Linear,
    ids: u64,
    sampled: u64,
    tokens: usize,
    hidden: u64,
) -> Result<()> {
    if !matches!(table.format, Format::Bf16 | Format::F16 | Format::F32) {
        return Err(KernelError::Unsupported(
            "the embedding is quantised; it must be BF16, F16 or F32".into(),
        ));
    }
    let params = EmbedParams {
        table: table.param(),
        format: table.format.id(),
        ids,
        sampled,
        hidden,
        width: table.inputs as i32,
    };
    gpu.launch(
        "embed",
        Launch {
            grid: (tokens as u32, 1),
            threads: 512,
            shared: 0,
            overlap: true,
        },
        &params,
    )
}
