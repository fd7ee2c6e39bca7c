//! Faults on purpose (`--inject-fault`): a broken device ends the worker with the reason; a NaN fails one row.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use conclave_worker::verify::{greedy, run, start};

mod common;
use common::*;

#[tokio::test]
async fn a_broken_device_ends_the_worker_and_the_router_is_told_why() {
    let mut router = Router::start().await;
    let mut config = config(&router);
    config.fault = Some("kernel@1".parse().unwrap());
    let worker = spawn(config);
    let mut attached = router.attached().await;
    form(1, &mut [&mut attached], 1000).await;
    let mut steps = generation(1, &expected().prompt, 2).into_iter();
    attached.step(steps.next().unwrap()).await;
    assert_eq!(attached.result().await.samples[0].token, expected().greedy[0]);
    attached.step(steps.next().unwrap()).await;
    let failed = attached.failed().await;
    assert_eq!((failed.epoch, failed.step, failed.suspect_rank), (1, 1, None));
    assert!(
        failed.reason.contains("a fault was provoked"),
        "{}",
        failed.reason
    );
    let error = worker.task.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("a fault was provoked"), "{error}");
}

#[tokio::test]
async fn a_nan_fails_its_row_and_no_other() {
    let mut router = Router::start().await;
    let mut config = config(&router);
    config.fault = Some("nan@1".parse().unwrap());
    let worker = spawn(config);
    let mut attached = router.attached().await;
    form(1, &mut [&mut attached], 1000).await;
    let Expected {
        prompt,
        greedy: tokens,
    } = expected();
    let pages = prompt.len().div_ceil(16) as u32 + 1;
    let mut first = empty(1, 0);
    for slot in 0..2 {
        let own = (slot * pages..(slot + 1) * pages).collect();
        first.start_slots.push(start(slot, own, prompt.len(), greedy()));
        first.runs.push(run(slot, 0, &prompt, true));
    }
    attached.step(first).await;
    for number in 1..3 {
        let mut step = empty(1, number);
        // The slot whose row failed has ended by the third step.
        for slot in number as u32 - 1..2 {
            step.runs
                .push(run(slot, prompt.len() + number as usize - 1, &[], true));
        }
        attached.step(step).await;
    }
    attached.result().await;
    let poisoned = attached.result().await;
    assert!(poisoned.samples[0].error.contains("NaN"), "{poisoned:?}");
    assert_eq!(
        (poisoned.samples[1].error.as_str(), poisoned.samples[1].token),
        ("", tokens[1])
    );
    assert_eq!(attached.result().await.samples[0].token, tokens[2]);
    worker.task.abort();
}
