//! AutoAWQ GEMM: `qweight` I32 `[in, out / 8]`, `qzeros` I32 `[in / group, out / 8]`, `scales` F16 `[in / group, out]`;
//! nibble n of word c is output 8c + [`ORDER`]`[n]`, in both. `w[o, i] = (q[i, o] - z[i / group, o]) * scale[i / group, o]`.

use std::sync::Arc;

use conclave_kernels::weight::{HostInt4, PackedInt4, PackedOrder};
use safetensors::Dtype;

use super::dense;
use super::modules::LinearModule;
use super::pack_quantized::group_of;
use super::reader::{Named, required};
use super::transpose;
use crate::checkpoint::{Checkpoint, Result, Tensor};

/// Output within a word's eight that its nibble n holds.
pub(super) const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Whether `.qweight` is packed across outputs. GPTQ's is packed across inputs; no shape fits both.
pub(super) fn is_awq(checkpoint: &Checkpoint, module: &LinearModule) -> bool {
    let shape = checkpoint
        .tensor(&format!("{}.qweight", module.name))
        .map(|tensor| tensor.shape.as_slice());
    shape == Some(&[module.in_features, module.out_features / 8])
}

/// What is there, once it is known to fit together.
struct Tensors<'a> {
    qweight: &'a Tensor,
    qzeros: &'a Tensor,
    scales: (String, &'a Tensor),
    group: usize,
}

fn tensors<'a>(checkpoint: &'a Checkpoint, module: &LinearModule) -> Result<Tensors<'a>> {
    let (out, input) = (module.out_features, module.in_features);
    let (name, tensor) = required(checkpoint, module, "qweight")?;
    let qweight = Named { name: &name, tensor };
    qweight.expect(Dtype::I32, &[input, out / 8])?;
    if !out.is_multiple_of(8) || !input.is_multiple_of(8) {
        return Err(qweight.error(format!("[{out}, {input}] is not made of multiples of 8")));
    }
    if checkpoint.tensor(&format!("{}.g_idx", module.name)).is_some() {
        return Err(qweight.error("it is packed as AWQ's, but there is a .g_idx as in GPTQ"));
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
    Ok(Tensors {
        qweight: tensor,
        qzeros,
        scales,
        group,
    })
}

fn named<'a>((name, tensor): &'a (String, &'a Tensor)) -> Named<'a> {
    Named { name, tensor }
}

/// As it is stored.
pub(super) fn packed(checkpoint: &Checkpoint, module: &LinearModule) -> Result<PackedInt4> {
    let tensors = tensors(checkpoint, module)?;
    Ok(PackedInt4 {
        order: PackedOrder::Outputs,
        words: tensors.qweight.slice().into_shared(),
        scale_type: dense::scale_type(named(&tensors.scales))?,
        scales: tensors.scales.1.slice().into_shared(),
        zeros: Some(tensors.qzeros.slice().into_shared()),
        zeros_less: 0,
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
        // ORDER is its own inverse up to the position: output 2j is nibble j, output 2j + 1 is nibble j + 4.
        let nibble = (output % 8) / 2 + 4 * (output % 2);
        ((word >> (4 * nibble)) & 15) as u8
    };
    let rows = (0..out).flat_map(|output| (0..groups).map(move |group| (group, output)));
    Ok(HostInt4 {
        packed: Arc::new(transpose::awq(tensors.qweight.bytes(), input, out)),
        scales: rows
            .clone()
            .map(|(group, output)| by_group[group * out + output])
            .collect(),
        zeros: Some(rows.map(|(group, output)| zero(group, output)).collect()),
        group,
    })
}
