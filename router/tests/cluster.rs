//! Workers' side: who is let in, and what happens to those who fall silent, break rules or leave.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use conclave_proto::cluster::v1 as pb;
use conclave_proto::cluster::v1::cluster_client::ClusterClient;
use conclave_proto::cluster::v1::from_worker::Message as Said;
use conclave_router_core::api::ClusterState;
use support::{Answer, Cluster, MODEL_LEN, Script, ScriptedWorker, VOCAB, config, expected, request};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

async fn refusal(cluster: &Cluster, script: Script) -> Status {
    match ScriptedWorker::attach(cluster.cluster_address(), script).await {
        Ok(_) => panic!("the worker was let in"),
        Err(status) => status,
    }
}

#[tokio::test]
async fn a_worker_that_does_not_belong_is_refused_with_the_reason() {
    let (cluster, _worker) =
        Cluster::with_worker(config(), Script::new("first").with(|h| h.rank = Some(0))).await;
    let second = || Script::new("second");
    type Change = fn(&mut pb::Hello);
    let cases: [(Change, Code, &str); 16] = [
        (
            |h| h.cluster_token.clear(),
            Code::Unauthenticated,
            "cluster_token",
        ),
        (
            |h| h.cluster_token.push('x'),
            Code::Unauthenticated,
            "cluster_token",
        ),
        (
            |h| h.cluster_token.make_ascii_uppercase(),
            Code::Unauthenticated,
            "cluster_token",
        ),
        (
            |h| h.version = "99.0.0".into(),
            Code::FailedPrecondition,
            "version = 99.0.0",
        ),
        (|h| h.version.clear(), Code::FailedPrecondition, "version"),
        (
            |h| h.checkpoint_id = "other".into(),
            Code::FailedPrecondition,
            "checkpoint_id = other",
        ),
        (
            |h| h.worker_id = "first".into(),
            Code::AlreadyExists,
            "worker_id = first",
        ),
        (|h| h.rank = Some(0), Code::AlreadyExists, "rank = 0"),
        (
            |h| h.page_tokens = 32,
            Code::FailedPrecondition,
            "page_tokens = 32",
        ),
        (
            |h| h.max_model_len = MODEL_LEN - 1,
            Code::FailedPrecondition,
            "max_model_len = 4095",
        ),
        (|h| h.worker_id.clear(), Code::InvalidArgument, "worker_id"),
        (
            |h| h.worker_id = "x".repeat(257),
            Code::InvalidArgument,
            "worker_id",
        ),
        (|h| h.kv_pages = 0, Code::InvalidArgument, "kv_pages"),
        (|h| h.max_slots = u32::MAX, Code::InvalidArgument, "max_slots"),
        (|h| h.rank = Some(u32::MAX), Code::InvalidArgument, "rank"),
        (
            |h| h.transports = vec!["pigeon".into()],
            Code::FailedPrecondition,
            "transports",
        ),
    ];
    for (change, code, text) in cases {
        let status = refusal(&cluster, second().with(change)).await;
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().starts_with(text), "{status:?}");
    }
    // Checks come in a fixed order: nothing is told to somebody without the token.
    let wrong = second().with(|h| {
        h.cluster_token = "wrong".into();
        h.checkpoint_id = "other".into();
    });
    assert_eq!(refusal(&cluster, wrong).await.code(), Code::Unauthenticated);
    assert_eq!(cluster.router.view().borrow().workers, 1);
    let answer = Answer::read(cluster.generate(request(&[5], 5)).await.unwrap()).await;
    assert_eq!(answer.tokens, [expected(&[5], 5)]);
    cluster.attach(second()).await;
}

#[tokio::test]
async fn the_first_message_must_be_hello() {
    let cluster = Cluster::start(config()).await;
    let mut client = ClusterClient::connect(cluster.cluster_address()).await.unwrap();
    let (say, said) = mpsc::channel(4);
    say.send(support::worker::message(
        Said::Heartbeat(pb::Heartbeat::default()),
    ))
    .await
    .unwrap();
    let mut heard = client
        .attach(ReceiverStream::new(said))
        .await
        .unwrap()
        .into_inner();
    let status = heard.message().await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("Hello"));
}

#[tokio::test]
async fn a_worker_may_wait_for_the_response_before_it_says_hello() {
    let cluster = Cluster::start(config()).await;
    let mut client = ClusterClient::connect(cluster.cluster_address()).await.unwrap();
    let (say, said) = mpsc::channel(4);
    let mut heard = client
        .attach(ReceiverStream::new(said))
        .await
        .unwrap()
        .into_inner();
    let hello = Said::Hello(Script::new("polite").hello);
    say.send(support::worker::message(hello)).await.unwrap();
    assert!(heard.message().await.unwrap().is_some());
}

#[tokio::test]
async fn a_silent_worker_is_lost_and_its_sequences_go_on_elsewhere() {
    let mut silent = Script::new("silent");
    silent.silent_after = Some(5);
    let mut strict = config();
    strict.heartbeat_timeout = Duration::from_secs(1);
    let (cluster, mut worker) = Cluster::with_worker(strict, silent).await;
    let reading = tokio::spawn(Answer::read(
        cluster.generate(request(&[8, 9], 40)).await.unwrap(),
    ));
    cluster.until(|view| view.state == ClusterState::Parked).await;
    let seen = worker.until(|seen| seen.ended.is_some()).await;
    let (code, why) = seen.ended.unwrap().unwrap_err();
    assert_eq!(code, Code::DeadlineExceeded);
    assert!(why.contains("heartbeat"), "{why}");
    let _fresh = cluster.attach(Script::new("fresh")).await;
    let answer = reading.await.unwrap();
    assert_eq!(
        answer.tokens,
        [expected(&[8, 9], 40)],
        "no token lost, repeated or changed"
    );
    assert_eq!(cluster.metric("conclave:workers_lost_total").await, 1.0);
}

#[tokio::test]
async fn a_worker_that_dies_is_lost_at_once() {
    let (cluster, worker) =
        Cluster::with_worker(config(), Script::new("a").step(Duration::from_millis(5))).await;
    let reading = tokio::spawn(Answer::read(cluster.generate(request(&[3], 100)).await.unwrap()));
    cluster.until(|view| view.running == 1).await;
    worker.kill();
    // Long before it would count as silent.
    cluster.until(|view| view.workers == 0).await;
    // Its id is free again.
    let _again = cluster.attach(Script::new("a")).await;
    assert_eq!(reading.await.unwrap().tokens, [expected(&[3], 100)]);
}

#[tokio::test]
async fn numbers_out_of_bounds_lose_the_worker_and_reach_no_client() {
    let mut liar = Script::new("liar");
    liar.bad_token_after = Some((3, VOCAB));
    let (cluster, mut worker) = Cluster::with_worker(config(), liar).await;
    let reading = tokio::spawn(Answer::read(cluster.generate(request(&[4], 20)).await.unwrap()));
    let seen = worker.until(|seen| seen.ended.is_some()).await;
    let (code, why) = seen.ended.unwrap().unwrap_err();
    assert_eq!(code, Code::InvalidArgument);
    assert!(why.contains("samples.token = 384"), "{why}");
    let _honest = cluster.attach(Script::new("honest")).await;
    assert_eq!(reading.await.unwrap().tokens, [expected(&[4], 20)]);
}

#[tokio::test]
async fn a_flood_of_messages_loses_the_worker() {
    let cluster = Cluster::start(config()).await;
    let (say, mut heard) = support::worker::connect(cluster.cluster_address(), Script::new("flood").hello)
        .await
        .unwrap();
    // Until the router ends the stream.
    let flood = tokio::spawn(async move {
        loop {
            let heartbeat = Said::Heartbeat(pb::Heartbeat::default());
            if say.send(support::worker::message(heartbeat)).await.is_err() {
                return;
            }
        }
    });
    let status = loop {
        match heard.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("closed without a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    flood.abort();
    cluster.until(|view| view.workers == 0).await;
}

#[tokio::test]
async fn two_workers_form_one_epoch_over_tcp() {
    let mut two = config();
    two.expected_workers = 2;
    let cluster = Cluster::start(two).await;
    let mut a = cluster.attach(Script::new("a")).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(cluster.router.view().borrow().state, ClusterState::Starting);
    let _b = cluster.attach(Script::new("b")).await;
    cluster.serving().await;
    let seen = a.until(|seen| seen.epochs == 1).await;
    assert_eq!((seen.peers, seen.transport.as_str()), (2, "tcp"));
    let mut streams = Vec::new();
    for i in 0..12 {
        let prompt = [i + 3; 30];
        streams.push((prompt, cluster.generate(request(&prompt, 25)).await.unwrap()));
    }
    for (prompt, stream) in streams {
        assert_eq!(Answer::read(stream).await.tokens, [expected(&prompt, 25)]);
    }
}

#[tokio::test]
async fn a_notice_moves_sequences_before_the_worker_leaves() {
    let mut two = config();
    two.expected_workers = 2;
    let cluster = Cluster::start(two).await;
    let _stays = cluster
        .attach(Script::new("stays").step(Duration::from_millis(2)))
        .await;
    let (say, mut heard) = support::worker::connect(cluster.cluster_address(), Script::new("leaves").hello)
        .await
        .unwrap();
    // By hand: says it is ready, answers no step, and gives notice.
    let epoch = loop {
        let message = heard.message().await.unwrap().unwrap().message.unwrap();
        if let pb::to_worker::Message::EpochStart(start) = message {
            break start.epoch;
        }
    };
    let ready = pb::EpochReady {
        epoch,
        ..Default::default()
    };
    say.send(support::worker::message(Said::EpochReady(ready)))
        .await
        .unwrap();
    cluster.serving().await;
    let notice = pb::Notice {
        deadline_ms: 30_000,
        reason: "spot node is reclaimed".into(),
    };
    say.send(support::worker::message(Said::Notice(notice)))
        .await
        .unwrap();
    let beating = say.clone();
    tokio::spawn(async move {
        loop {
            let beat = Said::Heartbeat(pb::Heartbeat::default());
            if beating.send(support::worker::message(beat)).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    cluster
        .until(|view| matches!(view.state, ClusterState::Serving { ranks: 1, .. }))
        .await;
    let answer = Answer::read(cluster.generate(request(&[11], 10)).await.unwrap()).await;
    assert_eq!(answer.tokens, [expected(&[11], 10)]);
}

/// A scripted worker on a GPU of its own.
fn gpu(id: &str) -> Script {
    Script::new(id).with(|h| {
        h.transports = ["local", "tcp", "nccl"].map(String::from).to_vec();
        h.device_uuid = format!("GPU-{id}");
    })
}

#[tokio::test]
async fn the_id_of_a_communicator_goes_from_rank_0_to_the_other_ranks_once() {
    let mut three = config();
    three.expected_workers = 3;
    let cluster = Cluster::start(three).await;
    let (say, mut heard) = support::worker::connect(
        cluster.cluster_address(),
        gpu("zero").with(|h| h.rank = Some(0)).hello,
    )
    .await
    .unwrap();
    let mut others = [cluster.attach(gpu("one")).await, cluster.attach(gpu("two")).await];
    let epoch = loop {
        let message = heard.message().await.unwrap().unwrap().message.unwrap();
        if let pb::to_worker::Message::EpochStart(start) = message {
            assert_eq!((start.rank, start.transport.as_str()), (0, "nccl"));
            break start.epoch;
        }
    };
    let id = |epoch: u64, byte: u8| {
        support::worker::message(Said::CommunicatorId(pb::CommunicatorId {
            epoch,
            id: vec![byte; 128].into(),
        }))
    };
    // Of no epoch, of this one, and once more: only the second is passed on.
    for message in [id(epoch + 1, 1), id(epoch, 2), id(epoch, 3)] {
        say.send(message).await.unwrap();
    }
    for worker in &mut others {
        let seen = worker.until(|seen| !seen.communicator_ids.is_empty()).await;
        assert_eq!(seen.communicator_ids[0].epoch, epoch);
        assert_eq!(seen.communicator_ids[0].id, vec![2; 128]);
    }
    // A message with the wrong length breaks the protocol; by then nothing else has been passed on.
    let short = pb::CommunicatorId {
        epoch,
        id: vec![4; 127].into(),
    };
    say.send(support::worker::message(Said::CommunicatorId(short)))
        .await
        .unwrap();
    let status = loop {
        match heard.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("closed without a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().contains("communicator_id.id: 127 bytes"),
        "{status:?}"
    );
    for worker in &mut others {
        assert_eq!(worker.seen.borrow().communicator_ids.len(), 1);
    }
}

#[tokio::test]
async fn a_worker_without_a_common_transport_is_refused_with_every_reason() {
    let mut two = config();
    two.expected_workers = 2;
    let cluster = Cluster::start(two).await;
    let _first = cluster.attach(gpu("first")).await;
    let status = refusal(&cluster, Script::new("second")).await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    for part in ["nccl: worker second has only local, tcp", "--transport tcp"] {
        assert!(status.message().contains(part), "{status:?}");
    }
    let same_gpu = gpu("third").with(|h| h.device_uuid = "GPU-first".into());
    let status = refusal(&cluster, same_gpu).await;
    assert!(status.message().contains("share GPU GPU-first"), "{status:?}");
}
