//! Keys: every route of the table, in every way a key can be wrong.

use std::collections::BTreeSet;
use std::time::Duration;

use conclave_gateway::{Access, routes};
use serde_json::json;

use crate::router::{hello, say, start_with};

#[test]
fn the_open_routes_are_these_and_no_others() {
    let open: BTreeSet<_> = routes()
        .filter(|route| route.access == Access::Public)
        .map(|route| route.path)
        .collect();
    assert_eq!(
        open,
        BTreeSet::from(["/health", "/metrics", "/ping", "/ready", "/version"])
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
                    Access::Key => assert_eq!(reply.status, 401, "{method} {path} {headers:?}"),
                    Access::Public => assert_ne!(reply.status, 401, "{method} {path} {headers:?}"),
                }
            }
        }
        if route.access == Access::Key {
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
