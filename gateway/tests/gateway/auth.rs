//! Keys: every route of the table, in every way a key can be wrong.

use std::collections::BTreeSet;
use std::time::Duration;

use conclave_gateway::{Access, routes};
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::client::{PATIENCE, read_until};
use crate::router::{Step, hello, say, start_with};

#[test]
fn the_open_routes_are_these_and_no_others() {
    let open: BTreeSet<_> = routes()
        .filter(|route| route.access == Access::Public)
        .map(|route| route.path)
        .collect();
    assert_eq!(
        open,
        BTreeSet::from([
            "/docs",
            "/health",
            "/metrics",
            "/openapi.json",
            "/ping",
            "/ready",
            "/version"
        ])
    );
}

#[tokio::test]
async fn without_a_key_every_other_route_is_401() {
    let setup = start_with(
        |config| config.api_keys = vec![String::from("secret")],
        |_| Ok(say(hello())),
    )
    .await;
    for route in routes() {
        let path = route.path.replace("{*id}", "demo").replace("{id}", "resp_x");
        for method in ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"] {
            for headers in [
                &[][..],
                &[("authorization", "Bearer wrong")],
                &[("authorization", "Bearer ")],
                &[
                    ("authorization", "Bearer secret"),
                    ("authorization", "Bearer secret"),
                ],
                &[("authorization", "Basic c2VjcmV0")],
                &[("x-api-key", "SECRET")],
            ] {
                let reply = setup.client.send(method, &path, headers, b"").await;
                match route.access {
                    Access::Key | Access::Metered => {
                        assert_eq!(reply.status, 401, "{method} {path} {headers:?}")
                    }
                    Access::Public => assert_ne!(reply.status, 401, "{method} {path} {headers:?}"),
                }
            }
        }
        if route.access != Access::Public {
            for headers in [&[("authorization", "Bearer secret")], &[("x-api-key", "secret")]] {
                let reply = setup.client.send(route.method, &path, headers, b"").await;
                assert_ne!(reply.status, 401, "{path} {headers:?}");
                assert!(!reply.body.contains("unknown_url"), "{path}");
            }
        }
    }
    assert!(setup.seen.generate.lock().unwrap().is_empty());
}

#[tokio::test]
async fn paths_that_only_look_like_a_route_are_closed_too() {
    let setup = start_with(
        |config| config.api_keys = vec![String::from("secret")],
        |_| Ok(say(hello())),
    )
    .await;
    for path in [
        "//v1/models",
        "/v1/models/",
        "/v1//models",
        "/v1%2fmodels",
        "/%2e/v1/models",
        "/./v1/models",
        "/health/../v1/models",
        "/health/",
        "/health%00",
        "/HEALTH",
        "/v1/models?api_key=secret",
        "/conclave.v1.Conclave/Generate",
        "/",
    ] {
        let reply = setup.client.get(path).await;
        assert_eq!(reply.status, 401, "{path}");
        assert_eq!(reply.error().3, "invalid_api_key");
        assert_eq!(reply.header("www-authenticate"), Some("bearer"));
    }
    let with_key = setup
        .client
        .send("GET", "/nowhere", &[("authorization", "Bearer secret")], b"")
        .await;
    assert_eq!((with_key.status, with_key.error().3), (404, json!("unknown_url")));
    let wrong_method = setup
        .client
        .send("GET", "/v1/completions", &[("x-api-key", "secret")], b"")
        .await;
    assert_eq!(
        (wrong_method.status, wrong_method.header("allow")),
        (405, Some("post"))
    );
}

/// Ways to write a path that some server or proxy takes for the same.
fn spellings(path: &str) -> Vec<String> {
    let rest = path.trim_start_matches('/');
    let dots = rest.replacen('/', "/./", 1);
    vec![
        path.to_owned(),
        format!("//{rest}"),
        format!("///{rest}"),
        format!("{path}/"),
        format!("{path}//"),
        format!("{path}/."),
        format!("/./{rest}"),
        format!("/%2e/{rest}"),
        format!("/%2e%2e/{rest}"),
        format!("/{dots}"),
        format!("/health/../{rest}"),
        format!("/health/%2e%2e/{rest}"),
        format!("/health/..%2f{rest}"),
        format!("/docs;{path}"),
        format!("{path};/health"),
        format!("{path}%00"),
        format!("{path}%20"),
        format!("{path}%2f"),
        format!("/{}", rest.replace('/', "%2f")),
        format!("/{}", rest.replace('/', "//")),
        format!("/{}", rest.replace('/', "\\")),
        format!("/{}", rest.to_uppercase()),
        format!("{path}?api_key=secret"),
        format!("{path}?access_token=secret&key=secret"),
        format!("http://other{path}"),
    ]
}

/// Keys that are nearly the right one, `secret`.
const NEARLY: &[&[(&str, &str)]] = &[
    &[],
    &[("authorization", "")],
    &[("authorization", "Bearer")],
    &[("authorization", "Bearer ")],
    &[("authorization", "secret")],
    &[("authorization", "Bearer Secret")],
    &[("authorization", "Bearer secre")],
    &[("authorization", "Bearer secret1")],
    &[("authorization", "Bearer secret secret")],
    &[("authorization", "Bearer secret, Bearer secret")],
    &[("authorization", "Bearer s\u{e9}cret")],
    &[("authorization", "Bearer \u{ff53}ecret")],
    &[("authorization", "Basic c2VjcmV0OnNlY3JldA==")],
    &[
        ("authorization", "Bearer secret"),
        ("authorization", "Bearer secret"),
    ],
    &[("authorization", "Bearer wrong"), ("x-api-key", "secret")],
    &[("x-api-key", "")],
    &[("x-api-key", "SECRET")],
    &[("x-api-key", "secret2")],
    &[("x-api-key", "secret"), ("x-api-key", "secret")],
    &[("api-key", "secret")],
    &[("cookie", "api_key=secret")],
    &[("x-forwarded-authorization", "Bearer secret")],
];

/// Every route of the table, in every method and spelling, with every key that is not quite one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_spelling_of_a_path_and_no_key_that_is_nearly_right_gets_in() {
    let setup = start_with(
        |config| config.api_keys = vec![String::from("secret")],
        |_| Ok(say(hello())),
    )
    .await;
    let (mut tried, mut refused) = (0, 0);
    for route in routes().filter(|route| route.access != Access::Public) {
        let path = route.path.replace("{*id}", "demo").replace("{id}", "resp_x");
        let spelled = spellings(&path);
        let by_path = spelled.iter().map(|path| (path, NEARLY[0]));
        let by_key = NEARLY.iter().map(|keys| (&spelled[0], *keys));
        for (path, keys) in by_path.chain(by_key) {
            for method in [
                "GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND",
            ] {
                let reply = setup.client.send(method, path, keys, b"").await;
                tried += 1;
                // A head that no server should read is refused before anything else.
                let closed = [401, 403].contains(&reply.status) || reply.status == 400;
                assert!(closed, "{method} {path} {keys:?}: {}", reply.status);
                refused += u32::from(reply.status != 400);
            }
        }
    }
    for path in [
        "/conclave.v1.Conclave/Generate",
        "/conclave.v1.Conclave/Metrics",
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/conclave.cluster.v1.Cluster/Attach",
    ] {
        for kind in ["application/grpc", "application/grpc-web", "application/json"] {
            let reply = setup
                .client
                .send("POST", path, &[("content-type", kind)], &[0; 5])
                .await;
            assert_eq!(reply.status, 401, "{path} {kind}");
            let keyed = [("content-type", kind), ("x-api-key", "secret")];
            assert_eq!(
                setup.client.send("POST", path, &keyed, &[0; 5]).await.status,
                404,
                "{path} {kind}"
            );
        }
    }
    println!(
        "{tried} requests: {refused} are 401 or 403, {} are 400",
        tried - refused
    );
    assert!(setup.seen.generate.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_key_file_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    std::fs::write(&file, "one\n").unwrap();
    let path = file.clone();
    let setup = start_with(
        move |config| config.api_key_file = Some(path),
        |_| Ok(say(hello())),
    )
    .await;
    let status = async |key: &str| {
        setup
            .client
            .send("GET", "/v1/models", &[("x-api-key", key)], b"")
            .await
            .status
    };
    assert_eq!((status("one").await, status("second").await), (200, 401));
    std::fs::write(&file, "second\n").unwrap();
    tokio::time::timeout(PATIENCE, async {
        while status("second").await != 200 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(status("one").await, 401);
}

#[tokio::test]
async fn keys_have_limits_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    std::fs::write(&file, "two rpm=2\ntokens tpm=5\none concurrent=1\nfree\n").unwrap();
    let setup = start_with(
        move |config| config.api_key_file = Some(file),
        |request| {
            let hangs = request.n == 2;
            Ok(if hangs {
                [say(hello()[..2].to_vec()), vec![Step::Hang]].concat()
            } else {
                say(hello())
            })
        },
    )
    .await;
    let post = async |key: &str| {
        let headers = [("x-api-key", key), ("content-type", "application/json")];
        setup
            .client
            .send("POST", "/v1/completions", &headers, b"{\"prompt\":\"a\"}")
            .await
    };
    let first = post("two").await;
    assert_eq!(
        (first.status, first.header("x-ratelimit-remaining-requests")),
        (200, Some("1"))
    );
    assert_eq!(post("two").await.status, 200);
    let third = post("two").await;
    assert_eq!(
        (third.status, third.error().3),
        (429, json!("rate_limit_exceeded"))
    );
    // Half a minute for one of two a minute, less what has passed since the first.
    let wait: u64 = third.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=30).contains(&wait), "{wait}");
    assert_eq!(post("free").await.status, 200, "one key's use is not another's");
    // Only what generates is metered.
    assert_eq!(
        setup
            .client
            .send("GET", "/v1/models", &[("x-api-key", "two")], b"")
            .await
            .status,
        200
    );
    // The first answer's five tokens empty the bucket.
    assert_eq!(
        (post("tokens").await.status, post("tokens").await.status),
        (200, 429)
    );
    let mut running = setup.client.connect().await;
    let body = "{\"prompt\":\"a\",\"n\":2,\"stream\":true}";
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Api-Key: one\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    running
        .write_all(format!("{head}{body}").as_bytes())
        .await
        .unwrap();
    read_until(&mut running, "Hel").await;
    assert_eq!(post("one").await.status, 429);
    drop(running);
    tokio::time::timeout(PATIENCE, async {
        while post("one").await.status != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
}
