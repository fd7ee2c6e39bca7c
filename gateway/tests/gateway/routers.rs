//! Several routers behind one gateway: models, prefixes, load, failover, drain.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use conclave_proto::v1;
use conclave_proto::v1::FinishReason;
use conclave_proto::v1::generate_request::Prompt;
use conclave_proto::v1::health_response::State;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tonic::Status;

use crate::patience::wait_for;
use crate::router::{
    Seen, Setup, Step, finished, hello, say, serve_router, start_with, started, text, usage,
};

type Script = Arc<dyn Fn(&v1::GenerateRequest) -> Result<Vec<Step>, Status> + Send + Sync>;

/// A gateway before several scripted routers.
struct Several {
    gateway: Setup,
    seen: Vec<Arc<Seen>>,
    routers: Vec<Option<oneshot::Sender<()>>>,
}

async fn several(scripts: Vec<Script>) -> Several {
    let mut addresses = Vec::new();
    let (mut seen, mut routers) = (Vec::new(), Vec::new());
    for script in scripts {
        let (address, its, router) = serve_router(State::Serving, move |request| script(request)).await;
        addresses.push(format!("http://{address}"));
        seen.push(its);
        routers.push(Some(router));
    }
    let gateway = start_with(|config| config.routers = addresses, |_| Ok(vec![])).await;
    // Every router was probed: by the second time, what the first one told is known.
    wait_for(|| {
        seen.iter()
            .all(|router: &Arc<Seen>| router.probes.load(Ordering::SeqCst) >= 2)
    })
    .await;
    Several {
        gateway,
        seen,
        routers,
    }
}

impl Several {
    fn counts(&self) -> Vec<usize> {
        self.seen
            .iter()
            .map(|seen| seen.generate.lock().unwrap().len())
            .collect()
    }
}

fn well() -> Script {
    Arc::new(|_| Ok(say(hello())))
}

fn failing(status: Status) -> Script {
    Arc::new(move |_| Err(status.clone()))
}

#[tokio::test]
async fn a_request_that_one_router_cannot_take_goes_to_another() {
    for status in [
        Status::unavailable("draining"),
        Status::resource_exhausted("full"),
    ] {
        let several = several(vec![failing(status.clone()), well(), failing(status)]).await;
        for stream in [false, true] {
            for _ in 0..4 {
                let body = json!({"prompt": "hi", "stream": stream});
                let reply = several.gateway.client.post("/v1/completions", &body).await;
                assert_eq!(reply.status, 200, "{reply:?}");
            }
        }
        assert_eq!(several.counts()[1], 8);
    }
    let several = several(vec![
        failing(Status::invalid_argument("no")),
        failing(Status::invalid_argument("no")),
    ])
    .await;
    assert_eq!(
        several
            .gateway
            .client
            .post("/v1/completions", &json!({"prompt": "hi"}))
            .await
            .status,
        400
    );
    assert_eq!(
        several.counts().iter().sum::<usize>(),
        1,
        "a bad request is not passed around"
    );
}

#[tokio::test]
async fn when_all_are_full_the_client_hears_it() {
    let full = || failing(Status::resource_exhausted("full"));
    let several = several(vec![full(), full()]).await;
    let reply = several
        .gateway
        .client
        .post("/v1/completions", &json!({"prompt": "hi"}))
        .await;
    assert_eq!((reply.status, several.counts()), (429, vec![1, 1]));
}

#[tokio::test]
async fn a_router_that_breaks_before_its_first_token_is_replaced_unseen() {
    let breaking: Script = Arc::new(|_| {
        let mut steps = say(vec![started(&[1, 2])]);
        steps.push(Step::Fail(Status::unavailable("gone")));
        Ok(steps)
    });
    let several = several(vec![breaking.clone(), well()]).await;
    for _ in 0..4 {
        let body = json!({"prompt": "hi", "stream": true, "stream_options": {"include_usage": true}});
        let chunks = several
            .gateway
            .client
            .post("/v1/completions", &body)
            .await
            .chunks();
        let text: String = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["text"].as_str())
            .collect();
        assert_eq!(text, "Hello", "{chunks:?}");
    }
    // After a token it is the client's matter: nothing is repeated.
    let late: Script = Arc::new(|_| {
        let mut steps = say(vec![started(&[1]), text(0, "Hel", &[1])]);
        steps.push(Step::Fail(Status::unavailable("gone")));
        Ok(steps)
    });
    let several = self::several(vec![late.clone(), late]).await;
    let chunks = several
        .gateway
        .client
        .post("/v1/completions", &json!({"prompt": "hi", "stream": true}))
        .await
        .chunks();
    assert_eq!(chunks[0]["choices"][0]["text"], "Hel");
    assert_eq!(chunks[1]["error"]["code"], "service_unavailable");
    assert_eq!(several.counts().iter().sum::<usize>(), 1);
}

#[tokio::test]
async fn a_router_that_dies_or_drains_loses_no_request() {
    let draining = Arc::new(AtomicBool::new(false));
    let flag = draining.clone();
    let drains: Script = Arc::new(move |_| {
        if flag.load(Ordering::SeqCst) {
            Err(Status::unavailable("draining"))
        } else {
            Ok(say(hello()))
        }
    });
    let mut several = several(vec![well(), drains, well()]).await;
    let done = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..6)
        .map(|client| {
            let (http, done) = (several.gateway.client.clone(), done.clone());
            tokio::spawn(async move {
                let mut statuses = Vec::new();
                while !done.load(Ordering::SeqCst) {
                    let body = json!({"prompt": format!("request {} of {client}", statuses.len())});
                    statuses.push(http.post("/v1/completions", &body).await.status);
                }
                statuses
            })
        })
        .collect();
    wait_for(|| several.counts().iter().all(|count| *count > 3)).await;
    draining.store(true, Ordering::SeqCst);
    several.routers[0].take();
    let before = several.counts()[2];
    wait_for(|| several.counts()[2] > before + 30).await;
    done.store(true, Ordering::SeqCst);
    for client in clients {
        let statuses = client.await.unwrap();
        assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
    }
}

#[tokio::test]
async fn models_are_merged_and_lead_to_their_router() {
    let several = several(vec![well(), well()]).await;
    let list = several.gateway.client.get("/v1/models").await.json();
    assert_eq!(list["data"].as_array().unwrap().len(), 2);
    let metrics = several.gateway.client.get("/metrics").await.body;
    assert_eq!(
        metrics.matches("# TYPE vllm:num_requests_running gauge").count(),
        1
    );
    assert_eq!(
        metrics
            .matches("vllm:num_requests_running{router=\"http://127.0.0.1")
            .count(),
        2,
        "{metrics}"
    );
    let health = several.gateway.client.get("/health").await.json();
    assert_eq!(health["routers"].as_array().unwrap().len(), 2);
    let unknown = several
        .gateway
        .client
        .post("/v1/completions", &json!({"prompt": "hi", "model": "demo"}))
        .await;
    assert_eq!(unknown.status, 200);
}

/// A router with a prefix cache of its own: it counts the bytes that it had not seen.
fn caching(computed: Arc<Mutex<(u64, u64)>>) -> Script {
    let stored = Mutex::new(std::collections::HashSet::<String>::new());
    Arc::new(move |request| {
        let Some(Prompt::Text(prompt)) = &request.prompt else {
            return Err(Status::invalid_argument("text"));
        };
        let mut stored = stored.lock().unwrap();
        let mut known = 0;
        for end in (64..=prompt.len()).step_by(64) {
            if !stored.insert(prompt[..end].to_owned()) {
                known = end;
            }
        }
        let mut computed = computed.lock().unwrap();
        computed.0 += prompt.len() as u64;
        computed.1 += (prompt.len() - known) as u64;
        Ok(say(vec![
            started(&[1]),
            text(0, "a", &[1]),
            finished(0, FinishReason::Stop),
            usage(1, 1, 0, 0),
        ]))
    })
}

/// Conversations over one shared prefix, some at a time; each turn appends to the one before.
async fn agents(gateway: &Setup, conversations: usize, turns: usize) {
    let shared = "shared system prompt and tools. ".repeat(256);
    let one = |at: usize| {
        let (client, mut prompt) = (gateway.client.clone(), format!("{shared}conversation {at}. "));
        async move {
            for turn in 0..turns {
                prompt.push_str(&format!("turn {turn} of {at}: {} ", "words ".repeat(60)));
                let body: Value = json!({"prompt": prompt});
                assert_eq!(client.post("/v1/completions", &body).await.status, 200);
            }
        }
    };
    use futures::StreamExt;
    futures::stream::iter((0..conversations).map(one))
        .buffer_unordered(8)
        .collect::<Vec<()>>()
        .await;
}

/// With 3 routers: the hit rate within 5 % of one router's, the load within 20 % of even.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_keep_their_prefixes_and_the_load_stays_even() {
    const CONVERSATIONS: usize = 24;
    const TURNS: usize = 30;
    let run = async |routers: usize| {
        let counts: Vec<_> = (0..routers).map(|_| Arc::new(Mutex::new((0, 0)))).collect();
        let several = several(counts.iter().map(|count| caching(count.clone())).collect()).await;
        agents(&several.gateway, CONVERSATIONS, TURNS).await;
        let sums: Vec<(u64, u64)> = counts.iter().map(|count| *count.lock().unwrap()).collect();
        let (all, new) = sums
            .iter()
            .fold((0, 0), |(all, new), one| (all + one.0, new + one.1));
        (1.0 - new as f64 / all as f64, several.counts())
    };
    let (single, _) = run(1).await;
    let (three, counts) = run(3).await;
    println!("hit rate {single:.4} with one router, {three:.4} with three; requests {counts:?}");
    assert!(three > single * 0.95, "{three} against {single}");
    let even = (CONVERSATIONS * TURNS) as f64 / 3.0;
    assert!(
        counts
            .iter()
            .all(|count| (*count as f64 - even).abs() < 0.2 * even),
        "{counts:?}"
    );
}

/// A router may restart between two probes, and never seem to be away.
#[tokio::test]
async fn a_router_that_serves_another_model_by_now_gets_its_requests() {
    let routers = several(vec![well(), well()]).await;
    *routers.seen[1].names.lock().unwrap() = vec![String::from("new")];
    let body = json!({"prompt": "a", "model": "new"});
    tokio::time::timeout(crate::client::PATIENCE, async {
        // In turns while nobody serves it, all to the one that does.
        let mut in_a_row = 0;
        while in_a_row < 6 {
            let before = routers.counts()[0];
            routers.gateway.client.post("/v1/completions", &body).await;
            in_a_row = if routers.counts()[0] == before {
                in_a_row + 1
            } else {
                0
            };
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("its requests never came to it");
}
