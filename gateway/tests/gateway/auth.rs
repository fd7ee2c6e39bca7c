//! Keys: every route of the table, in every way a key can be wrong.

use std::collections::BTreeSet;
use std::time::Duration;

use conclave_gateway::{Access, routes};
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::client::read_until;
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
    tokio::time::timeout(Duration::from_secs(10), async {
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
    assert_eq!(third.header("retry-after"), Some("30"));
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
    tokio::time::timeout(Duration::from_secs(10), async {
        while post("one").await.status != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
}
