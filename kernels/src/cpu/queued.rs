//! Samples that were drawn and not fetched yet, and the last tokens, which a batch may name as `SAMPLED | row`.
//!
//! On the CPU they are drawn at once; the queue is there so that the executor goes one way on every device.

use std::collections::VecDeque;

use crate::backend::{Result, SAMPLED, SampleRow, Sampled};
use crate::cpu::check::mismatch;

/// Steps whose samples may wait at a time, as on a CUDA device.
const PENDING: usize = 3;

#[derive(Default)]
pub(crate) struct Queued {
    pending: VecDeque<Vec<Sampled>>,
    last: Vec<u32>,
}

impl Queued {
    pub(crate) fn check_room(&self) -> Result<()> {
        if self.pending.len() < PENDING {
            return Ok(());
        }
        Err(mismatch(
            "queue_sample",
            "steps not fetched",
            PENDING,
            format!("fewer than {PENDING}"),
        ))
    }

    pub(crate) fn push(&mut self, sampled: Vec<Sampled>) {
        if !sampled.is_empty() {
            self.last.clear();
            self.last.extend(sampled.iter().map(|sampled| sampled.token));
        }
        self.pending.push_back(sampled);
    }

    pub(crate) fn take(&mut self) -> Result<Vec<Sampled>> {
        let oldest = self.pending.pop_front();
        oldest.ok_or_else(|| mismatch("sampled", "queued steps", 0, "1 or more"))
    }

    /// Of each row whose last token is `SAMPLED | row`, all its tokens with the one that was drawn.
    pub(crate) fn known_tokens(&self, rows: &[SampleRow<'_>]) -> Result<Vec<Option<Vec<u32>>>> {
        let known = |row: &SampleRow<'_>| match row.tokens.last() {
            Some(last) if last & SAMPLED != 0 => {
                let mut tokens = row.tokens.to_vec();
                self.resolve(&mut tokens[row.tokens.len() - 1..])?;
                Ok(Some(tokens))
            }
            _ => Ok(None),
        };
        rows.iter().map(known).collect()
    }

    /// Tokens in the place of `SAMPLED | row`.
    pub(crate) fn resolve(&self, ids: &mut [u32]) -> Result<()> {
        for id in ids.iter_mut().filter(|id| **id & SAMPLED != 0) {
            let row = (*id & !SAMPLED) as usize;
            let token = self.last.get(row);
            *id = *token
                .ok_or_else(|| mismatch("embed", "sampled row", row, format!("below {}", self.last.len())))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampled(tokens: &[u32]) -> Vec<Sampled> {
        let one = |&token: &u32| Sampled {
            token,
            ..Sampled::default()
        };
        tokens.iter().map(one).collect()
    }

    #[test]
    fn samples_come_in_order_and_the_last_ones_stand_for_rows() {
        let mut queued = Queued::default();
        assert!(queued.take().is_err() && queued.resolve(&mut [SAMPLED]).is_err());
        queued.push(sampled(&[5, 6]));
        queued.push(sampled(&[7]));
        let mut ids = [3, SAMPLED, 4];
        queued.resolve(&mut ids).unwrap();
        assert_eq!(ids, [3, 7, 4]);
        assert!(
            queued.resolve(&mut [SAMPLED | 1]).is_err(),
            "the last step had one row"
        );
        assert_eq!(queued.take().unwrap(), sampled(&[5, 6]));
        assert_eq!(queued.take().unwrap(), sampled(&[7]));
        queued.resolve(&mut ids).unwrap();
    }

    #[test]
    fn more_than_a_few_steps_do_not_wait() {
        let mut queued = Queued::default();
        for _ in 0..PENDING {
            queued.check_room().unwrap();
            queued.push(Vec::new());
        }
        assert!(queued.check_room().is_err());
        queued.take().unwrap();
        queued.check_room().unwrap();
    }
}
