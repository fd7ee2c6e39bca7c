//! Tenants with salts of their own: what one has computed is invisible to another, in cached tokens and in work.

use conclave_tests::{Client, Server, metrics, server::PATIENT};
use serde_json::{Value, json};

fn hits(client: &Client) -> f64 {
    metrics::value(&client.get_text("/metrics"), "vllm:prefix_cache_hits_total").expect("the metric")
}

/// Prompt tokens of a chat that came from a cache.
fn cached(client: &Client, salt: Option<&str>) -> u64 {
    let question = "tell me about the history of this place ".repeat(40);
    let mut body =
        json!({"messages": [{"role": "user", "content": question}], "max_tokens": 4, "temperature": 0});
    if let Some(salt) = salt {
        body["cache_salt"] = Value::from(salt);
    }
    let answer = client.post("/v1/chat/completions", &body);
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.body["usage"]["prompt_tokens_details"]["cached_tokens"]
        .as_u64()
        .expect("cached tokens")
}

#[test]
fn what_one_tenant_computed_no_other_finds() {
    let server = Server::serve_with(&["--workers", "1"], &PATIENT);
    let client = Client::new(&server.http);
    assert_eq!(cached(&client, Some("a")), 0);
    let own = cached(&client, Some("a"));
    assert!(own > 200, "{own}");
    let before = hits(&client);
    for stranger in [Some("b"), Some("A"), Some("a "), Some("aa"), None] {
        assert_eq!(cached(&client, stranger), 0, "{stranger:?}");
    }
    assert_eq!(hits(&client), before, "no page of a was found by anyone else");
    assert_eq!(
        cached(&client, None),
        own,
        "those without a salt share among themselves"
    );
    assert_eq!(cached(&client, Some("b")), own);
    println!("{own} tokens cached for their own tenant, 0 for five others");
}
