//! Errors in Anthropic's shape: `{"type":"error","error":{"type","message"},"request_id"}`.

use axum::response::Response;
use http::HeaderName;
use serde::Serialize;

use crate::http::error::ApiError;

/// Where Anthropic's clients look for a request's id.
const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// Whether a path belongs to this API, also where no route is matched.
pub(crate) fn is_anthropic_path(path: &str) -> bool {
    path == "/v1/messages" || path.starts_with("/v1/messages/")
}

#[derive(Serialize)]
pub(super) struct Envelope<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    error: Inner<'a>,
    request_id: &'a str,
}

#[derive(Serialize)]
struct Inner<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    message: &'a str,
}

/// Anthropic's word for the class of error.
fn kind(error: &ApiError) -> &'static str {
    match error.status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        408 | 504 => "timeout_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        status if status < 500 => "invalid_request_error",
        _ => "api_error",
    }
}

pub(super) fn envelope<'a>(error: &'a ApiError, request_id: &'a str) -> Envelope<'a> {
    Envelope {
        kind: "error",
        error: Inner {
            kind: kind(error),
            message: &error.message,
        },
        request_id,
    }
}

/// The whole HTTP answer.
pub(crate) fn respond(error: ApiError, request_id: &str) -> Response {
    let body = serde_json::to_string(&envelope(&error, request_id)).unwrap_or_default();
    let mut response = error.respond_with(body);
    tag(&mut response, request_id);
    response
}

/// Names the request in Anthropic's header too.
pub(super) fn tag(response: &mut Response, request_id: &str) {
    if let Ok(value) = request_id.parse() {
        response.headers_mut().insert(REQUEST_ID, value);
    }
}
