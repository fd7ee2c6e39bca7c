//! One streamed completion over HTTP/1.1.

use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};

use super::{Call, Timing};
use crate::http_client;

/// Streams one completion from `host:port`.
pub async fn complete(address: &str, key: Option<&str>, call: &Call) -> Result<Timing> {
    let mut body = json!({
        "prompt": call.prompt,
        "max_tokens": call.output,
        "ignore_eos": true,
        "temperature": 0,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    if !call.cache_salt.is_empty() {
        body["cache_salt"] = json!(call.cache_salt);
    }
    if call.wants_ids {
        body["return_token_ids"] = json!(true);
    }
    let started = Instant::now();
    let mut events = http_client::post_for_events(address, key, "/v1/completions", &body).await?;
    let mut timing = Timing::default();
    let mut last = started;
    while let Some(event) = events.next().await? {
        let now = Instant::now();
        if let Some(choice) = event["choices"].get(0) {
            if timing.first.is_zero() {
                timing.first = now - started;
            } else {
                timing.gaps.push(now - last);
            }
            last = now;
            timing.total = now - started;
            if timing.gaps.len() + 1 >= call.most_pieces {
                // The connection goes with the events.
                timing.hung_up = true;
                return Ok(timing);
            }
            let ids = choice["token_ids"].as_array().into_iter().flatten();
            timing
                .ids
                .extend(ids.filter_map(Value::as_u64).map(|id| id as u32));
        }
        if let Some(usage) = event.get("usage").filter(|usage| usage.is_object()) {
            let count = |value: &Value| value.as_u64().unwrap_or(0) as u32;
            timing.prompt_tokens = count(&usage["prompt_tokens"]);
            timing.tokens = count(&usage["completion_tokens"]);
            timing.cached_tokens = count(&usage["prompt_tokens_details"]["cached_tokens"]);
        }
    }
    Ok(timing)
}
