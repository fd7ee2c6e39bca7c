//! What AWQ's and GPTQ's tensors have in common: 4-bit `qweight` in words of eight, `qzeros` I32 `[in / group, out / 8]`,
//! `scales` `[in / group, out]`. In which order words hold weights and zeros is the formats' own affair.

use std::sync::Arc;

use conclave_kernels::weight::{HostInt4, PackedInt4, PackedOrder};
use safetensors::Dtype;

use super::dense;
use super::modules::LinearModule;
use super::pack_quantized::group_of;
use super::reader::{Named, required};
use crate::checkpoint::{Checkpoint, Result, Tensor};

/// What is there, once it is known to fit together.
pub(super) struct Grouped<'a> {
    pub qweight: &'a Tensor,
    qzeros: &'a Tensor,
    scales: (String, &'a Tensor),
    pub group: usize,
    out: usize,
}

/// The words of the weights, if their shape is this.
pub(super) fn qweight<'a>(
    checkpoint: &'a Checkpoint,
    module: &LinearModule,
    shape: [usize; 2],
) -> Result<(String, &'a Tensor)> {
    let (out, input) = (module.out_features, module.in_features);
    let qweight = required(checkpoint, module, "qweight")?;
    named(&qweight).expect(Dtype::I32, &shape)?;
    if !out.is_multiple_of(8) || !input.is_multiple_of(8) {
        return Err(named(&qweight).error(format!("[{out}, {input}] is not made of multiples of 8")));
    }
    Ok(qweight)
}

pub(super) fn named<'a>((name, tensor): &'a (String, &'a Tensor)) -> Named<'a> {
    Named { name, tensor }
}

impl<'a> Grouped<'a> {
    pub fn new(
        checkpoint: &'a Checkpoint,
        module: &LinearModule,
        qweight: &'a Tensor,
    ) -> Result<Grouped<'a>> {
        let (out, input) = (module.out_features, module.in_features);
        let scales = required(checkpoint, module, "scales")?;
        let groups = scales.1.shape.first().copied().unwrap_or(0);
        let group = group_of(named(&scales), input, groups)?;
        named(&scales).expect_shape(&[groups, out])?;
        let qzeros = required(checkpoint, module, "qzeros")?;
        named(&qzeros).expect(Dtype::I32, &[groups, out / 8])?;
        Ok(Grouped {
            qweight,
            qzeros: qzeros.1,
            scales,
            group,
            out,
        })
    }

    /// As it is stored; zeros lack `zeros_less`.
    pub fn packed(&self, order: PackedOrder, zeros_less: u8) -> Result<PackedInt4> {
        Ok(PackedInt4 {
            order,
            words: self.qweight.slice().into_shared(),
            scale_type: dense::scale_type(named(&self.scales))?,
            scales: self.scales.1.slice().into_shared(),
            zeros: Some(self.qzeros.slice().into_shared()),
            zeros_less,
            group: self.group,
        })
    }

    /// As rows of outputs: `packed` in that order, the zero of each output in nibble `nibble_of(output % 8)` of its word.
    pub fn rows(&self, packed: Vec<u8>, nibble_of: fn(usize) -> usize, zeros_less: u8) -> Result<HostInt4> {
        let (out, groups) = (self.out, self.scales.1.shape[0]);
        let by_group = dense::to_f32(named(&self.scales))?;
        let zeros = self.qzeros.bytes().as_chunks::<4>().0;
        let zero = |group: usize, output: usize| {
            let word = u32::from_le_bytes(zeros[group * (out / 8) + output / 8]);
            ((word >> (4 * nibble_of(output % 8))) & 15) as u8 + zeros_less
        };
        let rows = (0..out).flat_map(|output| (0..groups).map(move |group| (group, output)));
        Ok(HostInt4 {
            packed: Arc::new(packed),
            scales: rows
                .clone()
                .map(|(group, output)| by_group[group * out + output])
                .collect(),
            zeros: Some(rows.map(|(group, output)| zero(group, output)).collect()),
            group: self.group,
        })
    }
}
