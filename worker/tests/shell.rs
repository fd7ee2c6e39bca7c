//! A real worker against a scripted router: every turn of the cluster protocol.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::time::{Duration, Instant};

use common::*;
use conclave_proto::cluster::v1 as wire;
use conclave_proto::cluster::v1::from_worker::Message;
use conclave_proto::cluster::v1::to_worker;
use conclave_worker::WorkerError;
use conclave_worker::verify::{greedy, run, start};
use tokio::time::timeout;
use tonic::Status;

/// Rank 0 gets `step`, the others an empty one of the same number; rank 0's answer.
async fn collective(workers: &mut [&mut Attached], step: wire::Step) -> wire::StepResult {
    let other = empty(step.epoch, step.step);
    for worker in &mut workers[1..] {
        worker.step(other.clone()).await;
    }
    workers[0].step(step).await;
    for worker in &mut workers[1..] {
        worker.result().await;
    }
    workers[0].result().await
}

async fn generate(workers: &mut [&mut Attached], epoch: u64, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = Vec::new();
    for step in generation(epoch, prompt, count) {
        tokens.extend(
            collective(workers, step)
                .await
                .samples
                .iter()
                .map(|sample| sample.token),
        );
    }
    tokens
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_attaches_loads_and_generates() {
    let mut router = Router::start().await;
    let mut worker = spawn(config(&router));
    let mut attached = router.attached().await;
    let hello = attached.hello.clone();
    assert_eq!((hello.kv_pages, hello.page_tokens, hello.max_slots), (64, 16, 4));
    assert_eq!(hello.transports, ["local", "tcp"]);
    assert_eq!(hello.checkpoint_id.len(), 64);
    assert!(hello.peer_address.starts_with("127.0.0.1:"));
    form(1, &mut [&mut attached], 5000).await;
    let expected = expected();
    let tokens = generate(&mut [&mut attached], 1, &expected.prompt, expected.greedy.len()).await;
    assert_eq!(tokens, expected.greedy);
    // A slow step is idle time of the worker.
    tokio::time::sleep(Duration::from_millis(600)).await;
    let end = wire::Step {
        end_slots: vec![0],
        ..empty(1, tokens.len() as u64)
    };
    let result = collective(&mut [&mut attached], end).await;
    assert!(result.idle_us >= 500_000, "{}", result.idle_us);
    assert!(attached.heartbeats > 0);
    let last = attached.progress.last().expect("progress was told");
    assert!(
        last.bytes_done == last.bytes_total && last.bytes_total > 2_000_000,
        "{last:?}"
    );
    // Asked to end, it gives notice and ends when the router lets it go.
    worker.stop.take().unwrap().send(()).unwrap();
    assert!(matches!(attached.next().await, Some(Message::Notice(notice)) if notice.deadline_ms == 20_000));
    attached
        .send(to_worker::Message::Shutdown(wire::Shutdown {
            reason: "done".into(),
        }))
        .await;
    timeout(PATIENCE, worker.task).await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_workers_generate_the_same_with_steps_in_flight() {
    let mut router = Router::start().await;
    let _workers = [0, 1, 2].map(|_| spawn(config(&router)));
    let (mut a, mut b, mut c) = (
        router.attached().await,
        router.attached().await,
        router.attached().await,
    );
    form(1, &mut [&mut a, &mut b, &mut c], 5000).await;
    let expected = expected();
    let steps = generation(1, &expected.prompt, expected.greedy.len());
    // All steps are on their way before the first answer is read.
    for step in &steps {
        b.step(empty(1, step.step)).await;
        c.step(empty(1, step.step)).await;
        a.step(step.clone()).await;
    }
    let mut tokens = Vec::new();
    for _ in &steps {
        tokens.extend(a.result().await.samples.iter().map(|sample| sample.token));
        b.result().await;
        c.result().await;
    }
    assert_eq!(tokens, expected.greedy);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aborted_epoch_ends_a_waiting_collective_at_once_and_the_next_one_works() {
    let mut router = Router::start().await;
    let _workers = [0, 1].map(|_| spawn(config(&router)));
    let (mut a, mut b) = (router.attached().await, router.attached().await);
    let expected = expected();
    for epoch in [1, 3, 5] {
        form(epoch, &mut [&mut a, &mut b], 600_000).await;
        // Rank 1 never gets this step, so rank 0 waits for it.
        a.step(generation(epoch, &expected.prompt, 1)[0].clone()).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        let begin = Instant::now();
        // Whichever rank hears of it first.
        let order = if epoch == 3 {
            [&mut b, &mut a]
        } else {
            [&mut a, &mut b]
        };
        for rank in order {
            rank.abort(epoch).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        form(epoch + 1, &mut [&mut a, &mut b], 5000).await;
        // Not at its deadline.
        assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
        let tokens = generate(&mut [&mut a, &mut b], epoch + 1, &expected.prompt, 4).await;
        assert_eq!(tokens, expected.greedy[..4]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_does_not_take_part_is_suspected_at_the_deadline() {
    let mut router = Router::start().await;
    let _workers = [0, 1].map(|_| spawn(config(&router)));
    let (mut a, mut b) = (router.attached().await, router.attached().await);
    form(1, &mut [&mut a, &mut b], 200).await;
    a.step(generation(1, &expected().prompt, 1)[0].clone()).await;
    let failed = a.failed().await;
    assert_eq!(
        (failed.epoch, failed.step, failed.suspect_rank),
        (1, 0, Some(1)),
        "{}",
        failed.reason
    );
    assert!(failed.reason.contains("200 ms"), "{}", failed.reason);
    // Rank 1 learns it from rank 0, long before its own deadline would begin.
    b.step(empty(1, 0)).await;
    let failed = b.failed().await;
    assert!(
        failed.reason.contains("rank 0 left the epoch because of rank 1"),
        "{}",
        failed.reason
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_that_asks_for_more_time_than_the_epoch_has_it() {
    let mut router = Router::start().await;
    let _workers = [spawn(config(&router)), spawn(config(&router))];
    let (mut one, mut two) = (router.attached().await, router.attached().await);
    form(1, &mut [&mut one, &mut two], 100).await;
    let patient = |step: wire::Step| wire::Step {
        collective_deadline_ms: 60_000,
        ..step
    };
    let Expected { prompt, greedy } = expected();
    one.step(patient(generation(1, &prompt, 1).remove(0))).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    two.step(patient(empty(1, 0))).await;
    assert_eq!(one.result().await.samples[0].token, greedy[0]);
    two.result().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn survivors_of_a_lost_worker_generate_the_same() {
    let mut router = Router::start().await;
    let first = spawn(config(&router));
    let mut a = router.attached().await;
    let _second = spawn(config(&router));
    let mut b = router.attached().await;
    form(1, &mut [&mut a, &mut b], 60_000).await;
    let expected = expected();
    let begun = generate(&mut [&mut a, &mut b], 1, &expected.prompt, 5).await;
    assert_eq!(begun, expected.greedy[..5]);
    first.task.abort();
    drop(a);
    b.step(empty(1, 5)).await;
    let failed = b.failed().await;
    assert_eq!(failed.suspect_rank.unwrap_or(0), 0, "{}", failed.reason);
    // The sequence goes on at the survivor: prompt and generated tokens.
    form(2, &mut [&mut b], 5000).await;
    let resumed = [expected.prompt.as_slice(), &begun].concat();
    let rest = generate(&mut [&mut b], 2, &resumed, expected.greedy.len() - 5).await;
    assert_eq!(rest, expected.greedy[5..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_survive_epochs_and_a_restart_of_the_router() {
    let mut router = Router::start().await;
    let _worker = spawn(config(&router));
    let mut attached = router.attached().await;
    form(1, &mut [&mut attached], 5000).await;
    let expected = expected();
    let all = [expected.prompt.as_slice(), &expected.greedy].concat();
    // 16 tokens fill page 0.
    let step = wire::Step {
        start_slots: vec![start(0, vec![0], 16, greedy())],
        runs: vec![run(0, 0, &all[..16], false)],
        ..empty(1, 0)
    };
    collective(&mut [&mut attached], step).await;
    let resumed = |epoch: u64| wire::Step {
        start_slots: vec![wire::SlotStart {
            cached_tokens: 16,
            ..start(3, vec![0, 7], expected.prompt.len(), greedy())
        }],
        runs: vec![run(3, 16, &all[16..20], true)],
        ..empty(epoch, 0)
    };
    form(2, &mut [&mut attached], 5000).await;
    let result = collective(&mut [&mut attached], resumed(2)).await;
    assert_eq!(result.samples[0].token, all[20]);
    drop(attached);
    let port = router.stop().await;
    let mut router = Router::listen(port, Ok(20));
    let mut attached = router.attached().await;
    form(1, &mut [&mut attached], 5000).await;
    let result = collective(&mut [&mut attached], resumed(1)).await;
    assert_eq!(result.samples[0].token, all[20]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_step_fails_with_the_field_and_the_next_epoch_works() {
    let mut router = Router::start().await;
    let _worker = spawn(config(&router));
    let mut attached = router.attached().await;
    let expected = expected();
    let good = &generation(1, &expected.prompt, 1)[0];
    type Spoil = fn(&mut wire::Step);
    let cases: [(&str, Spoil); 6] = [
        ("start_slots[0].slot", |step| step.start_slots[0].slot = 4),
        ("runs[0].tokens: token 384", |step| step.runs[0].tokens[3] = 384),
        ("start_slots[0].pages: page 64", |step| {
            step.start_slots[0].pages[0] = 64
        }),
        ("runs[0].position", |step| step.runs[0].position = 1),
        ("step 9 came, 0 is the next", |step| step.step = 9),
        ("sampling.top_p", |step| {
            step.start_slots[0].sampling.as_mut().unwrap().top_p = f32::NAN
        }),
    ];
    for (epoch, (expected_text, spoil)) in (1..).zip(cases) {
        form(epoch, &mut [&mut attached], 5000).await;
        let mut step = wire::Step {
            epoch,
            ..good.clone()
        };
        spoil(&mut step);
        attached.step(step).await;
        let failed = attached.failed().await;
        assert!(
            failed.reason.contains(expected_text),
            "{} lacks {expected_text}",
            failed.reason
        );
        assert_eq!(failed.suspect_rank, None);
        // Whose part of the step it was: the router ends that sequence alone.
        let whole = expected_text.starts_with("step");
        assert_eq!(failed.slot.is_none(), whole, "{}", failed.reason);
        // The epoch is over: its later steps are not answered.
        attached
            .step(wire::Step {
                epoch,
                step: 1,
                ..good.clone()
            })
            .await;
    }
    form(99, &mut [&mut attached], 5000).await;
    let tokens = generate(&mut [&mut attached], 99, &expected.prompt, 3).await;
    assert_eq!(tokens, expected.greedy[..3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_epoch_start_fails_with_the_field() {
    let mut router = Router::start().await;
    let _worker = spawn(config(&router));
    let mut attached = router.attached().await;
    let hello = attached.hello.clone();
    type Spoil = fn(&mut wire::EpochStart);
    let cases: [(&str, Spoil); 8] = [
        ("placement: it is not set", |start| start.placement = None),
        ("placement: 5 experts", |start| {
            start.placement.as_mut().unwrap().experts = 5
        }),
        ("is on [7]", |start| {
            start.placement.as_mut().unwrap().layers[0].owners[2].ranks = vec![7]
        }),
        ("placement", |start| {
            start.placement.as_mut().unwrap().layers.clear()
        }),
        ("transport: \"nccl\"", |start| start.transport = "nccl".into()),
        ("peers", |start| start.rank = 3),
        ("collective_deadline_ms: 0", |start| {
            start.collective_deadline_ms = 0
        }),
        ("peer_secret", |start| start.peer_secret = vec![0; 2000].into()),
    ];
    for (epoch, (expected_text, spoil)) in (1..).zip(cases) {
        let mut start = epoch_start(epoch, 0, &[&hello], 1000);
        spoil(&mut start);
        attached.epoch_start(start).await;
        let failed = attached.failed().await;
        assert_eq!(failed.epoch, epoch);
        assert!(
            failed.reason.contains(expected_text),
            "{} lacks {expected_text}",
            failed.reason
        );
    }
    form(99, &mut [&mut attached], 5000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_refused_ends_with_the_reason() {
    let refusal = Status::unauthenticated("cluster_token: not ours");
    let router = Router::listen(Port::new(), Err(refusal));
    let worker = spawn(config(&router));
    let error = timeout(PATIENCE, worker.task)
        .await
        .unwrap()
        .unwrap()
        .unwrap_err();
    assert!(
        matches!(&error, WorkerError::Refused { reason, .. } if reason == "cluster_token: not ours"),
        "{error}"
    );
}

/// A router that stood still still counts on the session that broke meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_returns_waits_until_its_earlier_session_is_over() {
    let mut router = Router::start().await;
    let worker = spawn(config(&router));
    drop(router.attached().await);
    let port = router.stop().await;
    let refusal = Status::already_exists("worker_id = w: a worker with this id is attached");
    let router = Router::listen(port, Err(refusal));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!worker.task.is_finished(), "the worker ended");
    let port = router.stop().await;
    let mut router = Router::listen(port, Ok(20));
    form(1, &mut [&mut router.attached().await], 5000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_looks_for_its_router_and_gives_up_in_time() {
    let router = Router::start().await;
    let mut config = config(&router);
    config.reconnect_for = Duration::from_millis(300);
    let _port = router.stop().await;
    let begin = Instant::now();
    let error = conclave_worker::run(config, std::future::pending())
        .await
        .unwrap_err();
    assert!(matches!(error, WorkerError::NoRouter { .. }), "{error}");
    assert!(begin.elapsed() >= Duration::from_millis(300) && begin.elapsed() < PATIENCE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_ends_when_its_timeout_has_passed() {
    let mut router = Router::start().await;
    let mut config = config(&router);
    config.drain_timeout = Duration::from_millis(100);
    let mut worker = spawn(config);
    let mut attached = router.attached().await;
    form(1, &mut [&mut attached], 5000).await;
    worker.stop.take().unwrap().send(()).unwrap();
    assert!(matches!(attached.next().await, Some(Message::Notice(_))));
    timeout(PATIENCE, worker.task).await.unwrap().unwrap().unwrap();
}
