//! Models, tokens, probes, metrics, request ids, traces, CORS.

use conclave_proto::v1::health_response::State;
use conclave_proto::v1::tokenize_request::Input;
use serde_json::json;

use crate::router::{hello, say, serve_router, start_saying, start_with};

#[tokio::test]
async fn models_are_listed_and_found_by_name() {
    let setup = start_saying(hello()).await;
    let list = setup.client.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(
        list["data"][1],
        json!({
            "id": "org/alias", "object": "model", "created": 1_700_000_000, "owned_by": "conclave",
            "root": "demo", "parent": null, "max_model_len": 4096,
        })
    );
    let version = [("anthropic-version", "2023-06-01")];
    let list = setup.client.send("GET", "/v1/models", &version, b"").await.json();
    assert_eq!(
        (
            &list["data"][0]["type"],
            &list["data"][0]["created_at"],
            &list["last_id"],
            &list["has_more"]
        ),
        (
            &json!("model"),
            &json!("2023-11-14T22:13:20Z"),
            &json!("org/alias"),
            &json!(false)
        )
    );
    let one = setup
        .client
        .send("GET", "/v1/models/demo", &version, b"")
        .await
        .json();
    assert_eq!(one["display_name"], "demo");
    for (path, status) in [
        ("/v1/models/demo", 200),
        ("/v1/models/org/alias", 200),
        ("/v1/models/org%2Falias", 200),
        ("/v1/models/none", 404),
    ] {
        assert_eq!(setup.client.get(path).await.status, status, "{path}");
    }
    let error = setup.client.get("/v1/models/none").await.error();
    assert_eq!((error.2, error.3), (json!("model"), json!("model_not_found")));
}

#[tokio::test]
async fn tokenize_takes_text_and_chats() {
    let setup = start_saying(hello()).await;
    let answer = setup
        .client
        .post("/tokenize", &json!({"prompt": "hi", "add_special_tokens": false}))
        .await
        .json();
    assert_eq!(
        answer,
        json!({"count": 2, "max_model_len": 4096, "tokens": [5, 6], "token_strs": null})
    );
    let chat = json!({"messages": [{"role": "user", "content": "hi"}], "return_token_strs": true});
    let answer = setup.client.post("/tokenize", &chat).await.json();
    assert_eq!(answer["token_strs"], json!(["a", "b"]));
    let seen = setup.seen.tokenize.lock().unwrap().clone();
    assert_eq!(
        (&seen[0].input, seen[0].add_special_tokens),
        (&Some(Input::Text("hi".into())), Some(false))
    );
    assert!(matches!(seen[1].input, Some(Input::Chat(_))));
    let answer = setup
        .client
        .post("/detokenize", &json!({"tokens": [1, 2]}))
        .await
        .json();
    assert_eq!(answer, json!({"prompt": "<1><2>"}));
    for bad in [
        json!({}),
        json!({"prompt": "a", "messages": []}),
        json!({"prompt": 5}),
    ] {
        assert_eq!(setup.client.post("/tokenize", &bad).await.status, 400, "{bad}");
    }
    assert_eq!(
        setup
            .client
            .post("/detokenize", &json!({"tokens": [-1]}))
            .await
            .error()
            .2,
        "tokens[0]"
    );
}

#[tokio::test]
async fn health_and_readiness_follow_the_router() {
    for (state, health, ready) in [
        (State::Starting, 503, 503),
        (State::Serving, 200, 200),
        (State::Parked, 200, 503),
        (State::Draining, 503, 503),
    ] {
        let (address, _, _router) = serve_router(state, |_| Ok(vec![])).await;
        let routers = vec![address.to_string()];
        let setup = start_with(|config| config.routers = routers, |_| Ok(vec![])).await;
        for (path, status) in [("/health", health), ("/ping", health), ("/ready", ready)] {
            let reply = setup.client.get(path).await;
            assert_eq!(reply.status, status, "{state:?} {path}");
            assert_eq!(reply.json()["routers"][0]["workers"], 2);
        }
    }
    let setup = start_with(
        |config| config.routers = vec![String::from("127.0.0.1:1")],
        |_| Ok(vec![]),
    )
    .await;
    let reply = setup.client.get("/health").await;
    assert_eq!(
        (reply.status, reply.json()["routers"][0]["state"].clone()),
        (503, json!("unreachable"))
    );
}

#[tokio::test]
async fn metrics_are_the_routers_and_its_own() {
    let setup = start_saying(hello()).await;
    setup
        .client
        .post("/v1/completions", &json!({"prompt": "a"}))
        .await;
    setup.client.get("/made/up").await;
    let text = setup.client.get("/metrics").await.body;
    assert!(text.contains("vllm:num_requests_running 3\n"), "{text}");
    let counted =
        "conclave_gateway_requests_total{route=\"/v1/completions\",method=\"POST\",status=\"200\"} 1\n";
    assert!(text.contains(counted), "{text}");
    assert!(
        text.contains("route=\"none\",method=\"GET\",status=\"404\"") && !text.contains("made"),
        "{text}"
    );
    assert!(!text.contains("# EOF"), "{text}");
    assert_eq!(
        setup.client.get("/version").await.json(),
        json!({"version": env!("CARGO_PKG_VERSION")})
    );
}

#[tokio::test]
async fn request_ids_and_traces_go_through() {
    let setup = start_saying(hello()).await;
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let headers = [
        ("content-type", "application/json"),
        ("x-request-id", "my-id"),
        ("traceparent", parent),
        ("tracestate", "a=b"),
    ];
    let reply = setup
        .client
        .send("POST", "/v1/completions", &headers, br#"{"prompt":"a"}"#)
        .await;
    assert_eq!(reply.header("x-request-id"), Some("my-id"));
    assert_eq!(reply.json()["id"], "cmpl-my-id");
    assert_eq!(setup.seen.only().request_id, "my-id");
    let metadata = setup.seen.metadata.lock().unwrap()[0].clone();
    assert_eq!(metadata.get("traceparent").unwrap(), parent);
    assert_eq!(metadata.get("tracestate").unwrap(), "a=b");
    let refused = setup
        .client
        .send("GET", "/nowhere", &[("x-request-id", "other")], b"")
        .await;
    assert_eq!(
        (refused.status, refused.header("x-request-id")),
        (404, Some("other"))
    );
}

#[tokio::test]
async fn cors_is_for_the_origins_that_were_named() {
    let origin = "https://app.example";
    let setup = start_with(
        |config| {
            config.cors_origins = vec![origin.to_owned()];
            config.api_keys = vec![String::from("secret")];
        },
        |_| Ok(say(hello())),
    )
    .await;
    let preflight = [
        ("origin", origin),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization,x-stainless-lang"),
    ];
    let reply = setup
        .client
        .send("OPTIONS", "/v1/completions", &preflight, b"")
        .await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("access-control-allow-origin"), Some(origin));
    assert_eq!(
        reply.header("access-control-allow-headers"),
        Some("authorization,x-stainless-lang")
    );
    // Every method that is served may be used by a page.
    let allowed = reply.header("access-control-allow-methods").unwrap();
    let allowed: Vec<&str> = allowed.split(',').map(str::trim).collect();
    for route in conclave_gateway::routes() {
        let is_allowed = allowed
            .iter()
            .any(|method| method.eq_ignore_ascii_case(route.method));
        assert!(is_allowed, "{} in {allowed:?}", route.method);
    }
    let other = setup
        .client
        .send("GET", "/version", &[("origin", "https://evil.example")], b"")
        .await;
    assert_eq!(other.header("access-control-allow-origin"), None);
}
