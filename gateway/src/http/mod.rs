//! What every endpoint shares: reading bodies, decoding JSON, errors, event streams, keys, request ids.

pub(crate) mod auth;
pub(crate) mod body;
pub(crate) mod context;
pub(crate) mod edge;
pub(crate) mod error;
mod faults;
pub(crate) mod json;
mod keyring;
pub(crate) mod numbers;
mod pieces;
pub(crate) mod quota;
pub(crate) mod reply;
pub(crate) mod sse;
mod trace;

use axum::extract::Request;
use serde::de::DeserializeOwned;

use self::context::RequestContext;
use self::error::ApiResult;
use crate::app::App;

/// Reads and decodes a request's body.
pub(crate) async fn receive<T: DeserializeOwned + Send + 'static>(
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
pub(crate) fn now_unix() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
