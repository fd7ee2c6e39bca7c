//! AutoAWQ GEMM: `qweight` I32 `[in, out / 8]`, `qzeros` I32 `[in / group, out / 8]`, `scales` F16 `[in / group, out]`;
//! nibble n of word c is output 8c + [`ORDER`]`[n]`, in both. `w[o, i] = (q[i, o] - z[i / group, o]) * scale[i / group, o]`.

use conclave_kernels::weight::{HostInt4, PackedInt4, PackedOrder};

use super::grouped::{self, Grouped, named};
use super::modules::LinearModule;
use super::transpose;
use crate::checkpoint::{Checkpoint, Result};

/// Output within a word's eight that its nibble n holds.
pub(super) const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Whether `.qweight` is packed across outputs. GPTQ's is packed across inputs; no shape fits both.
pub(super) fn is_awq(checkpoint: &Checkpoint, module: &LinearModule) -> bool {
    let shape = checkpoint
        .tensor(&format!("{}.qweight", module.name))
        .map(|tensor| tensor.shape.as_slice());
    shape == Some(&[module.in_features, module.out_features / 8])
}

fn tensors<'a>(checkpoint: &'a Checkpoint, module: &LinearModule) -> Result<Grouped<'a>> {
    let qweight = grouped::qweight(checkpoint, module, [module.in_features, module.out_features / 8])?;
    if checkpoint.tensor(&format!("{}.g_idx", module.name)).is_some() {
        return Err(named(&qweight).error("it is packed as AWQ's, but there is a .g_idx as in GPTQ"));
    }
    Grouped::new(checkpoint, module, qweight.1)
}

/// As it is stored.
pub(super) fn packed(checkpoint: &Checkpoint, module: &LinearModule) -> Result<PackedInt4> {
    tensors(checkpoint, module)?.packed(PackedOrder::Outputs, 0)
}

/// As rows of outputs.
pub(super) fn rows(checkpoint: &Checkpoint, module: &LinearModule) -> Result<HostInt4> {
    let tensors = tensors(checkpoint, module)?;
    let words = transpose::awq(tensors.qweight.bytes(), module.in_features, module.out_features);
    // ORDER is its own inverse up to the position: output 2j is nibble j, output 2j + 1 is nibble j + 4.
    tensors.rows(words, |output| output / 2 + 4 * (output % 2), 0)
}
