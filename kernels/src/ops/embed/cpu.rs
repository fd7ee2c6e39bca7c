//! The op on all threads.

use crate::backend::{Buffer, LinearId, Result};
use crate::cpu::CpuBackend;
use crate::cpu::check::mismatch;
use crate::cpu::engine::Rows;
use crate::ops::linear::dequantize_row;

/// Tokens of a task.
const TASK_TOKENS: usize = 16;

impl CpuBackend {
    pub(crate) fn run_embed(&mut self, table: LinearId, hidden: &Buffer) -> Result<()> {
        const OP: &str = "embed";
        let table = self.weights.linear(OP, "table", table)?;
        self.queued.resolve(&mut self.step.ids)?;
        let ids = &self.step.ids;
        if let Some(id) = ids.iter().find(|id| **id as usize >= table.out_features) {
            return Err(mismatch(
                OP,
                "token id",
                id,
                format!("below the vocabulary's {}", table.out_features),
            ));
        }
        let width = table.in_features;
        let [hidden] = self.buffers.words(OP, [(hidden, ids.len() * width)])?;
        let hidden = Rows::new(hidden, width);
        self.engine.run_parts(ids.len(), TASK_TOKENS, |part, _| {
            // SAFETY: parts are disjoint.
            let rows = unsafe { hidden.take(part.clone()) };
            for (id, row) in ids[part].iter().zip(rows.chunks_exact_mut(width)) {
                dequantize_row(table, *id as usize, row);
            }
        });
        Ok(())
    }
}
