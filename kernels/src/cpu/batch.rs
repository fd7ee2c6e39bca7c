//! The batch of a step, checked and copied into memory that was allocated at start.

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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backend::BatchRun;

    fn limits() -> Limits {
        Limits {
            max_tokens: 8,
            max_logit_rows: 4,
            max_runs: 3,
            max_pages_per_run: 5,
            max_expert_rows: 8,
            page_tokens: 4,
        }
    }

    /// Two runs, at positions 0 and 6.
    fn good() -> Batch {
        Batch {
            ids: vec![1, 2, 3, 4, 5],
            positions: vec![0, 1, 6, 7, 8],
            runs: vec![
                BatchRun {
                    first: 0,
                    len: 2,
                    pages: vec![7],
                    position: 0,
                },
                BatchRun {
                    first: 2,
                    len: 3,
                    pages: vec![0, 5, 2],
                    position: 6,
                },
            ],
            logit_rows: vec![1, 4],
        }
    }

    #[test]
    fn a_good_batch_is_taken_over() {
        let mut step = Step::new(&limits());
        step.begin(&good()).unwrap();
        assert_eq!((step.tokens(), step.largest_page, step.task_count()), (5, 7, 2));
        assert_eq!((step.pages_of(1), step.pages_of(4)), (&[7][..], &[0, 5, 2][..]));
        assert_eq!(step.task(1).1, 2..5);
        step.begin(&Batch::default()).unwrap();
        assert_eq!((step.tokens(), step.task_count()), (0, 0));
    }

    #[test]
    fn each_fault_is_named_and_leaves_the_step_empty() {
        let faults: [(&str, fn(&mut Batch)); 13] = [
            ("positions is 4, expected 5", |b| b.positions.truncate(4)),
            ("positions of a run", |b| b.positions[3] = 9),
            ("tokens is 9, expected at most 8", |b| b.ids = vec![0; 9]),
            ("runs is 4, expected at most 3", |b| {
                b.runs = vec![b.runs[0].clone(); 4]
            }),
            ("logit rows is 5, expected at most 4", |b| {
                b.logit_rows = vec![0; 5]
            }),
            ("logit rows", |b| b.logit_rows = vec![4, 1]),
            ("logit rows", |b| b.logit_rows = vec![5]),
            ("run is 1..3", |b| b.runs[0].first = 1),
            ("run is 0..0", |b| b.runs[0].len = 0),
            ("run is 2..6", |b| b.runs[1].len = 4),
            ("tokens in runs is 2, expected 5", |b| b.runs.truncate(1)),
            ("pages of a run is 2, expected 3 to 5", |b| {
                b.runs[1].pages.truncate(2)
            }),
            ("page is 7, written twice", |b| b.runs[1].pages[2] = 7),
        ];
        let mut step = Step::new(&limits());
        for (what, fault) in faults {
            step.begin(&good()).unwrap();
            let mut batch = good();
            fault(&mut batch);
            let error = step.begin(&batch).unwrap_err().to_string();
            assert!(error.contains(what), "{error}: not {what}");
            assert_eq!(step.tokens(), 0);
        }
        // A page that two runs only read may be shared.
        let mut shared = good();
        shared.runs[1].pages[0] = 7;
        step.begin(&shared).unwrap();
    }

    proptest! {
        /// Whatever numbers a batch holds: an error, or a step whose every index is in bounds.
        #[test]
        fn no_batch_gets_past_the_check_out_of_bounds(
            ids in prop::collection::vec(0..9u32, 0..10),
            runs in prop::collection::vec((0..10u32, 0..10u32, prop::collection::vec(0..9u32, 0..7), prop_oneof![0..20u32, Just(u32::MAX)]), 0..5),
            logit_rows in prop::collection::vec(0..10u32, 0..6),
        ) {
            let runs: Vec<BatchRun> = runs
                .into_iter()
                .map(|(first, len, pages, position)| BatchRun { first, len, pages, position })
                .collect();
            let positions = runs.iter().flat_map(|run| (0..run.len).map(|i| run.position.wrapping_add(i))).collect();
            let mut step = Step::new(&limits());
            if step.begin(&Batch { ids, positions, runs, logit_rows }).is_ok() {
                for task in 0..step.task_count() {
                    let (run, tokens) = step.task(task);
                    prop_assert!(tokens.end <= step.tokens() && !tokens.is_empty());
                    for t in tokens {
                        let pages = step.pages_of(t);
                        prop_assert!((step.positions[t] as usize) < pages.len() * 4);
                        prop_assert_eq!(step.positions[t] as usize, run.position + t - run.first);
                    }
                }
            }
        }
    }
}
