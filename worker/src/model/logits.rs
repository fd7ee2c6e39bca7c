//! Head and sampler, over as many rows at a time as the logits buffer holds.

use conclave_kernels::backend::{SampleRow, Sampled};

use super::step::floats;
use super::{Executor, ModelError, Result, StepInput, StepOutput, Tap};

impl Executor {
    pub(super) fn sample(&mut self, input: StepInput<'_>, tap: &mut dyn Tap) -> Result<StepOutput> {
        let resident = self.resident.as_ref().ok_or(ModelError::NotLoaded)?;
        let (final_norm, head) = (resident.final_norm, resident.head);
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
            let (eps, buffers) = (self.spec.rms_eps, &self.buffers);
            self.backend
                .head(eps, final_norm, head, &buffers.hidden, &buffers.logits)?;
            if tap.looks() {
                let mut bytes = vec![0; (end - first) * self.spec.vocab * 4];
                self.backend.read(&buffers.logits, 0, &mut bytes)?;
                tap.logits(first, &floats(&bytes));
            }
            for (list, output) in input.sampling.iter().zip(&mut output) {
                // The part of the list whose logits are in the buffer, in stretches of neighbouring rows.
                let begin = list.partition_point(|entry| entry.row < first);
                let part = &list[begin..list.partition_point(|entry| entry.row < end)];
                for stretch in part.chunk_by(|a, b| a.row + 1 == b.row) {
                    let rows: Vec<SampleRow<'_>> = stretch.iter().map(|entry| copy(&entry.how)).collect();
                    output.extend(self.sample_rows(stretch[0].row - first, &rows)?);
                }
            }
        }
        Ok(output)
    }

    fn sample_rows(&mut self, first: usize, rows: &[SampleRow<'_>]) -> Result<Vec<Sampled>> {
        Ok(self
            .backend
            .sample(&self.buffers.logits, self.spec.vocab, first, rows)?)
    }
}

fn copy<'a>(row: &SampleRow<'a>) -> SampleRow<'a> {
    SampleRow {
        params: row.params,
        position: row.position,
        tokens: row.tokens,
        output_start: row.output_start,
        mask: row.mask,
        forbidden: row.forbidden,
    }
}
