//! Batches that are taken over and batches that are refused.

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
    type Fault = fn(&mut Batch);
    let faults: [(&str, Fault); 13] = [
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
