//! Embedding: `hidden[t] = table[ids[t]]`, as F32.

use crate::cpu::weights::CpuLinear;
use crate::ops::linear::dequantize_row;

/// `ids` are below `table.out_features`; `hidden` is `[ids, in_features]`.
pub(crate) fn embed(table: &CpuLinear, ids: &[u32], hidden: &mut [f32]) {
    for (id, row) in ids.iter().zip(hidden.chunks_exact_mut(table.in_features)) {
        dequantize_row(table, *id as usize, row);
    }
}
