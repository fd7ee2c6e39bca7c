//! Head and sampler, over as many rows at a time as the logits buffer holds.

use conclave_kernels::backend::{KernelError, SampleRow};

use super::step::floats;
use super::{Executor, ModelError, Result, StepInput, StepOutput, Tap};

impl Executor {
    /// Samples a step whose layers are queued. `has_logits`: those of the first rows are there, and if there are more
    /// rows, the step ran whole.
    pub fn sample(
        &mut self,
        input: StepInput<'_>,
        has_logits: bool,
        tap: &mut dyn Tap,
    ) -> Result<StepOutput> {
        let rows = input.batch.logit_rows.len();
        let mut output: StepOutput = input
            .sampling
            .iter()
            .map(|list| Vec::with_capacity(list.len()))
            .collect();
        for first in (0..rows).step_by(self.limits.max_logit_rows) {
            let end = rows.min(first + self.limits.max_logit_rows);
            if first > 0 {
                self.begin(input.batch, first..end)?;
            }
            if !has_logits {
                self.head()?;
            } else if first > 0 && !self.backend.forward_rows(&self.buffers.logits)? {
                let problem = "this device keeps no states of a step for more rows of logits";
                return Err(KernelError::Unsupported(problem.into()).into());
            }
            self.poison_logits(end - first)?;
            self.show_logits(first, end, tap)?;
            for (list, output) in input.sampling.iter().zip(&mut output) {
                // The part of the list whose logits are in the buffer, in stretches of neighbouring rows.
                let begin = list.partition_point(|entry| entry.row < first);
                let part = &list[begin..list.partition_point(|entry| entry.row < end)];
                for stretch in part.chunk_by(|a, b| a.row + 1 == b.row) {
                    let rows: Vec<SampleRow<'_>> = stretch.iter().map(|entry| entry.how.clone()).collect();
                    let (logits, vocab) = (&self.buffers.logits, self.spec.vocab);
                    let sampled = self
                        .backend
                        .sample(logits, vocab, stretch[0].row - first, &rows)?;
                    output.extend(sampled);
                }
            }
        }
        Ok(output)
    }

    /// Logits of the rows that the step has begun with.
    pub(super) fn head(&mut self) -> Result<()> {
        let resident = self.resident.as_ref().ok_or(ModelError::NotLoaded)?;
        let (eps, buffers) = (self.spec.rms_eps, &self.buffers);
        Ok(self.backend.head(
            eps,
            resident.final_norm,
            resident.head,
            &buffers.hidden,
            &buffers.logits,
        )?)
    }

    pub(super) fn show_logits(&mut self, first: usize, end: usize, tap: &mut dyn Tap) -> Result<()> {
        if tap.looks() && end > first {
            let mut bytes = vec![0; (end - first) * self.spec.vocab * 4];
            self.backend.read(&self.buffers.logits, 0, &mut bytes)?;
            tap.logits(first, &floats(&bytes));
        }
        Ok(())
    }

    pub(super) fn poison_logits(&mut self, rows: usize) -> Result<()> {
        if rows > 0 && std::mem::take(&mut self.poisoned) {
            let nan = f32::NAN.to_le_bytes();
            self.backend.write(&self.buffers.logits, 0, &nan)?;
        }
        Ok(())
    }
}
