//! Launch of `fold.cu`: the gate's weights times the output projection's.

use crate::backend::Result;
use crate::cuda::weights::Linear;
use crate::cuda::{Format, Gpu, Launch};

const THREADS: u32 = 256;
/// Inputs and experts of a block.
const INPUTS: usize = 64;
const EXPERTS: usize = 128;

/// Mirrors `FoldParams`.
#[repr(C)]
struct FoldParams {
    gate: u64,
    norm: u64,
    output: u64,
    folded: u64,
    experts: i32,
    width: i32,
    q_width: i32,
    bf16_scales: i32,
}

/// Whether these two weights can be folded: the gate [experts, width] and the output projection [width, q_width].
pub(crate) fn folds(gate: &Linear, output: &Linear) -> bool {
    gate.format == Format::F32
        && matches!(output.format, Format::Int4G128 | Format::Fp8 | Format::Bf16)
        && gate.inputs == output.rows
        && gate.rows.is_multiple_of(16)
        && gate.inputs.is_multiple_of(128)
        && output.inputs.is_multiple_of(128)
}

/// Bytes of the product's stream.
pub(crate) fn folded_bytes(experts: usize, q_width: usize) -> usize {
    Format::F32.stream_bytes(experts / 16, q_width)
}

/// Fills `folded` with the product of two weights that `folds` accepts; `norm`: the address of the norm's weights.
pub(crate) fn queue(gpu: &Gpu, gate: &Linear, norm: u64, output: &Linear, folded: u64) -> Result<()> {
    let params = FoldParams {
        gate: gate.memory.address,
        norm,
        output: output.memory.address,
        folded,
        experts: gate.rows as i32,
        width: gate.inputs as i32,
        q_width: output.inputs as i32,
        bf16_scales: i32::from(output.bf16_scales),
    };
    let launch = Launch {
        grid: (
            (output.inputs / INPUTS) as u32,
            gate.rows.div_ceil(EXPERTS) as u32,
        ),
        threads: THREADS,
        shared: 0,
        overlap: false,
    };
    gpu.launch(&format!("fold_gate_{}", output.format.name()), launch, &params)
}
