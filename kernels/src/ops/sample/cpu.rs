//! The op on all threads: a task is one row.

use crate::backend::{Buffer, Result, SampleRow, Sampled};
use crate::cpu::CpuBackend;
use crate::cpu::check::mismatch;
use crate::cpu::engine::Rows;

impl CpuBackend {
    pub(crate) fn run_sample(
        &mut self,
        logits: &Buffer,
        vocab: usize,
        first: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<Sampled>> {
        const OP: &str = "sample";
        let widest = self.workspace.max_out_features();
        if vocab == 0 || vocab > widest {
            return Err(mismatch(
                OP,
                "vocab",
                vocab,
                format!("1 to {widest}, the widest weight"),
            ));
        }
        let end = first.saturating_add(rows.len());
        let [logits] = self.buffers.words(OP, [(logits, end.saturating_mul(vocab))])?;
        let logits = &logits[first * vocab..];
        let isa = self.engine.isa;
        let mut sampled = vec![Sampled::default(); rows.len()];
        let results = Rows::new(&mut sampled, 1);
        self.engine.run(rows.len(), |i, scratch| {
            let sampled = super::sample(isa, &logits[i * vocab..][..vocab], &rows[i], &mut scratch.sample);
            // SAFETY: each row is one task.
            unsafe { results.take(i..i + 1)[0] = sampled };
        });
        Ok(sampled)
    }
}
