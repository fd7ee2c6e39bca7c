//! Start, health, drain and stop.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use conclave_proto::v1 as pb;
use conclave_proto::v1::health_response::State;
use conclave_router::{Router, RouterConfig};
use support::{Answer, Cluster, PATIENCE, Script, config, expected, request};
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

async fn health(cluster: &Cluster) -> pb::HealthResponse {
    cluster
        .client
        .clone()
        .health(pb::HealthRequest {})
        .await
        .unwrap()
        .into_inner()
}

async fn channel(cluster: &Cluster) -> Channel {
    let endpoint = Channel::from_shared(cluster.address.clone()).unwrap();
    endpoint.connect().await.unwrap()
}

async fn standard_health(cluster: &Cluster, service: &str) -> ServingStatus {
    let mut client = HealthClient::new(channel(cluster).await);
    let request = HealthCheckRequest {
        service: service.into(),
    };
    client.check(request).await.unwrap().into_inner().status()
}

#[tokio::test]
async fn health_follows_the_cluster() {
    let cluster = Cluster::start(config()).await;
    assert_eq!(health(&cluster).await.state(), State::Starting);
    assert_eq!(standard_health(&cluster, "").await, ServingStatus::NotServing);
    let worker = cluster.attach(Script::new("a")).await;
    cluster.serving().await;
    let serving = health(&cluster).await;
    assert_eq!(
        (serving.state(), serving.workers, serving.epoch),
        (State::Serving, 1, 1)
    );
    assert!(serving.detail.contains("a (cpu script"), "{}", serving.detail);
    // The standard service follows on a task of its own.
    let follows = async {
        while standard_health(&cluster, "conclave.v1.Conclave").await != ServingStatus::Serving {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, follows).await.unwrap();
    worker.kill();
    cluster.until(|view| view.workers == 0).await;
    assert_eq!(health(&cluster).await.state(), State::Parked);
    assert_eq!(
        standard_health(&cluster, "").await,
        ServingStatus::Serving,
        "requests wait, they are not refused"
    );
}

#[tokio::test]
async fn a_drain_lets_running_sequences_finish_and_tells_the_workers() {
    let (cluster, mut worker) =
        Cluster::with_worker(config(), Script::new("a").step(Duration::from_millis(3))).await;
    let running = tokio::spawn(Answer::read(cluster.generate(request(&[5], 150)).await.unwrap()));
    cluster.until(|view| view.running == 1).await;
    let Cluster { router, client, .. } = cluster;
    let mut view = router.view();
    let stopping = tokio::spawn(router.shut_down());
    view.wait_for(|view| view.draining).await.unwrap();
    let state = client
        .clone()
        .health(pb::HealthRequest {})
        .await
        .unwrap()
        .into_inner()
        .state();
    assert_eq!(state, State::Draining);
    let status = client.clone().generate(request(&[6], 5)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let answer = running.await.unwrap();
    assert_eq!(answer.tokens, [expected(&[5], 150)]);
    assert!(answer.usage.is_some());
    stopping.await.unwrap().unwrap();
    let seen = worker.until(|seen| seen.ended.is_some()).await;
    assert!(seen.shutdown);
}

#[tokio::test]
async fn the_drain_timeout_cuts_off_what_still_runs() {
    let mut impatient = config();
    impatient.drain_timeout = Duration::from_millis(200);
    let (cluster, _worker) =
        Cluster::with_worker(impatient, Script::new("a").step(Duration::from_millis(20))).await;
    let running = tokio::spawn(Answer::read(cluster.generate(request(&[5], 3000)).await.unwrap()));
    cluster.until(|view| view.running == 1).await;
    let asked = std::time::Instant::now();
    cluster.router.shut_down().await.unwrap();
    // What runs takes a minute.
    assert!(asked.elapsed() < Duration::from_secs(30), "{:?}", asked.elapsed());
    let answer = running.await.unwrap();
    assert_eq!(answer.reason(0), pb::FinishReason::Error);
    assert!(answer.finished[0].as_ref().unwrap().error.contains("shut down"));
    let tokens = &answer.tokens[0];
    assert_eq!(tokens[..], expected(&[5], tokens.len())[..]);
}

#[tokio::test]
async fn an_idle_router_stops_at_once() {
    let (cluster, _worker) = Cluster::with_worker(config(), Script::new("a")).await;
    let Cluster { router, client, .. } = cluster;
    drop(client);
    let asked = std::time::Instant::now();
    router.shut_down().await.unwrap();
    let drain = config().drain_timeout;
    assert!(asked.elapsed() < drain, "{:?}", asked.elapsed());
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let cases: Vec<(&str, RouterConfig)> = vec![
        (
            "cannot listen on",
            RouterConfig {
                listen: taken.local_addr().unwrap(),
                ..config()
            },
        ),
        (
            "cannot listen on",
            RouterConfig {
                cluster_listen: taken.local_addr().unwrap(),
                ..config()
            },
        ),
        (
            "cluster_token",
            RouterConfig {
                cluster_token: String::new(),
                ..config()
            },
        ),
        (
            "max_num_seqs = 0",
            RouterConfig {
                max_num_seqs: 0,
                ..config()
            },
        ),
        (
            "max_num_batched_tokens = 4",
            RouterConfig {
                max_num_batched_tokens: 4,
                ..config()
            },
        ),
        (
            "block_size = 0",
            RouterConfig {
                block_size: 0,
                ..config()
            },
        ),
        (
            "max_model_len = 5000",
            RouterConfig {
                max_model_len: Some(5000),
                ..config()
            },
        ),
        (
            "max_waiting = 0",
            RouterConfig {
                max_waiting: 0,
                ..config()
            },
        ),
        (
            "transport = pigeon",
            RouterConfig {
                transport: "pigeon".into(),
                ..config()
            },
        ),
        (
            "heartbeat_timeout",
            RouterConfig {
                heartbeat_timeout: Duration::from_millis(150),
                ..config()
            },
        ),
        (
            "tokenizer.json",
            RouterConfig {
                skip_tokenizer_init: false,
                ..config()
            },
        ),
        (
            "config.json",
            RouterConfig {
                model: "/nowhere/at/all".into(),
                ..config()
            },
        ),
    ];
    for (text, config) in cases {
        match Router::start(config).await {
            Ok(_) => panic!("{text}: it started"),
            Err(error) => assert!(error.to_string().contains(text), "{text}: {error}"),
        }
    }
}

#[tokio::test]
async fn reflection_lists_the_services() {
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let cluster = Cluster::start(config()).await;
    let mut client = ServerReflectionClient::new(channel(&cluster).await);
    let request = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let responses = client
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap();
    let response = responses.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = response.message_response else {
        panic!("{response:?}");
    };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"conclave.v1.Conclave"), "{names:?}");
    assert!(names.contains(&"grpc.health.v1.Health"), "{names:?}");
    assert!(
        !names.contains(&"conclave.cluster.v1.Cluster"),
        "clients cannot reach it here: {names:?}"
    );
}
