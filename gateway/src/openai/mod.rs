//! OpenAI's API as OpenAI and vLLM serve it: chat completions, completions, models, tokenize, detokenize.
//!
//! A request becomes one `v1::GenerateRequest` per prompt ([`translate`]), the calls' events come back as one
//! stream ([`calls`]), and are either collected ([`collect`]) or written out as they come.

mod answer;
mod calls;
mod chat;
mod chat_stream;
mod collect;
mod completions;
mod completions_stream;
mod content;
mod conversation;
mod logprobs;
mod message;
mod models;
mod prompt;
mod request;
mod sampling;
mod structured;
mod tokenize;
mod tools;
mod translate;
mod words;

use axum::extract::Request;
use serde::de::DeserializeOwned;

pub(crate) use self::chat::chat;
pub(crate) use self::completions::completions;
pub(crate) use self::models::{model, models};
pub(crate) use self::tokenize::{detokenize, tokenize};
use crate::http::context::RequestContext;
use crate::http::error::ApiResult;
use crate::http::{body, json};
use crate::server::App;

/// Reads and decodes a request's body.
async fn read<T: DeserializeOwned + Send + 'static>(
    app: &App,
    request: Request,
) -> ApiResult<(RequestContext, T)> {
    let (mut parts, stream) = request.into_parts();
    let context = parts
        .extensions
        .remove::<RequestContext>()
        .unwrap_or_else(|| RequestContext::new(&parts.headers, None));
    let held = body::read(&parts.headers, stream, &app.bodies, &app.config.limits).await?;
    Ok((context, json::read(&parts.headers, held).await?))
}

/// Unix seconds, for `created`.
fn now_unix() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
