//! The batch of a step, checked and copied into memory that was allocated at start.

#[cfg(test)]
mod tests;

use std::ops::Range;

use crate::backend::{Batch, Limits, Result};
use crate::cpu::check::mismatch;
use crate::ops::attention::TASK_TOKENS;

/// One run; its pages are `pages[first_page..first_page + page_count]` of the step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) first: usize,
    pub(crate) len: usize,
    pub(crate) position: usize,
    pub(crate) first_page: usize,
    pub(crate) page_count: usize,
    /// Attention tasks (of `TASK_TOKENS` tokens) of the runs before it.
    first_task: usize,
}

/// The step that ops refer to.
pub(crate) struct Step {
    limits: Limits,
    pub(crate) ids: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    runs: Vec<Run>,
    /// Run of each token.
    run_of: Vec<u32>,
    pages: Vec<u32>,
    pub(crate) logit_rows: Vec<u32>,
    /// Pages that the step writes to, while it is checked.
    written: Vec<u32>,
    /// Largest page number of the step: checked against each layer's cache.
    pub(crate) largest_page: u32,
}

impl Step {
    pub(crate) fn new(limits: &Limits) -> Step {
        let pages = limits.max_runs.saturating_mul(limits.max_pages_per_run);
        Step {
            limits: limits.clone(),
            ids: Vec::with_capacity(limits.max_tokens),
            positions: Vec::with_capacity(limits.max_tokens),
            runs: Vec::with_capacity(limits.max_runs),
            run_of: Vec::with_capacity(limits.max_tokens),
            pages: Vec::with_capacity(pages),
            logit_rows: Vec::with_capacity(limits.max_logit_rows),
            written: Vec::with_capacity(limits.max_tokens + limits.max_runs),
            largest_page: 0,
        }
    }

    pub(crate) fn tokens(&self) -> usize {
        self.ids.len()
    }

    pub(crate) fn page_tokens(&self) -> usize {
        self.limits.page_tokens
    }

    /// Page table of a token's run.
    pub(crate) fn pages_of(&self, token: usize) -> &[u32] {
        let run = &self.runs[self.run_of[token] as usize];
        &self.pages[run.first_page..][..run.page_count]
    }

    /// Attention tasks of the step, per KV head.
    pub(crate) fn task_count(&self) -> usize {
        let last = self.runs.last();
        last.map_or(0, |run| run.first_task + run.len.div_ceil(TASK_TOKENS))
    }

    /// The run and the tokens of an attention task.
    pub(crate) fn task(&self, task: usize) -> (&Run, Range<usize>) {
        let run = &self.runs[self.runs.partition_point(|run| run.first_task <= task) - 1];
        let first = run.first + (task - run.first_task) * TASK_TOKENS;
        (run, first..(run.first + run.len).min(first + TASK_TOKENS))
    }

    /// Takes over `batch`; on an error the step is empty.
    pub(crate) fn begin(&mut self, batch: &Batch) -> Result<()> {
        self.ids.clear();
        self.positions.clear();
        self.runs.clear();
        self.run_of.clear();
        self.pages.clear();
        self.logit_rows.clear();
        self.largest_page = 0;
        check(batch, &self.limits)?;
        self.check_written(batch)?;
        let mut first_task = 0;
        for (i, run) in batch.runs.iter().enumerate() {
            self.run_of
                .extend(std::iter::repeat_n(i as u32, run.len as usize));
            self.runs.push(Run {
                first: run.first as usize,
                len: run.len as usize,
                position: run.position as usize,
                first_page: self.pages.len(),
                page_count: run.pages.len(),
                first_task,
            });
            first_task += (run.len as usize).div_ceil(TASK_TOKENS);
            self.pages.extend_from_slice(&run.pages);
            let largest = run.pages.iter().copied().max().unwrap_or(0);
            self.largest_page = self.largest_page.max(largest);
        }
        self.ids.extend_from_slice(&batch.ids);
        self.positions.extend_from_slice(&batch.positions);
        self.logit_rows.extend_from_slice(&batch.logit_rows);
        Ok(())
    }

    /// Fails if two runs write to one page: a page belongs to one sequence until it is full, and full ones are only
    /// read. Writers rely on it.
    fn check_written(&mut self, batch: &Batch) -> Result<()> {
        let size = self.limits.page_tokens;
        self.written.clear();
        for run in &batch.runs {
            let first = run.position as usize;
            let last = first + run.len as usize - 1;
            self.written
                .extend_from_slice(&run.pages[first / size..=last / size]);
        }
        self.written.sort_unstable();
        match self.written.windows(2).find(|pair| pair[0] == pair[1]) {
            None => Ok(()),
            Some(pair) => Err(mismatch(
                "begin",
                "page",
                format!("{}, written twice", pair[0]),
                "one writer",
            )),
        }
    }
}

fn check(batch: &Batch, limits: &Limits) -> Result<()> {
    let fail =
        |what: &'static str, found: String, expected: String| Err(mismatch("begin", what, found, expected));
    let tokens = batch.ids.len();
    for (what, found, limit) in [
        ("tokens", tokens, limits.max_tokens),
        ("runs", batch.runs.len(), limits.max_runs),
        ("logit rows", batch.logit_rows.len(), limits.max_logit_rows),
    ] {
        if found > limit {
            return fail(what, found.to_string(), format!("at most {limit}"));
        }
    }
    if batch.positions.len() != tokens {
        return fail("positions", batch.positions.len().to_string(), tokens.to_string());
    }
    let mut next = 0;
    for run in &batch.runs {
        let (first, len) = (run.first as usize, run.len as usize);
        if first != next || len == 0 || len > tokens - first {
            return fail(
                "run",
                format!("{first}..{}", first + len),
                format!("one from {next} to {tokens} at most"),
            );
        }
        next += len;
        let end = run.position as usize + len;
        if run.pages.len() > limits.max_pages_per_run
            || run.pages.len().saturating_mul(limits.page_tokens) < end
        {
            let pages = end.div_ceil(limits.page_tokens.max(1));
            return fail(
                "pages of a run",
                run.pages.len().to_string(),
                format!("{pages} to {}", limits.max_pages_per_run),
            );
        }
        let positions = &batch.positions[first..next];
        if positions
            .iter()
            .zip(run.position..)
            .any(|(found, expected)| *found != expected)
        {
            return fail(
                "positions of a run",
                format!("{positions:?}"),
                format!("consecutive from {}", run.position),
            );
        }
    }
    if next != tokens {
        return fail("tokens in runs", next.to_string(), tokens.to_string());
    }
    let ascending = batch.logit_rows.windows(2).all(|pair| pair[0] < pair[1]);
    match batch.logit_rows.last() {
        Some(last) if *last as usize >= tokens || !ascending => fail(
            "logit rows",
            format!("{:?}", batch.logit_rows),
            format!("ascending below {tokens}"),
        ),
        _ => Ok(()),
    }
}
