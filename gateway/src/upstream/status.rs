//! gRPC status to HTTP error, with the details that the router attaches (google.rpc).

use std::time::Duration;

use http::StatusCode;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::http::error::{ApiError, TooLong};

/// Retry hint where the router gave none.
const RETRY_DEFAULT: Duration = Duration::from_secs(1);

/// The HTTP side of `status`. `param` is the proto's field path; endpoints put it in their own words.
pub(super) fn to_api(status: &tonic::Status) -> ApiError {
    let details = status.get_error_details();
    let (http, code) = match status.code() {
        Code::InvalidArgument | Code::FailedPrecondition => (StatusCode::BAD_REQUEST, "invalid_value"),
        Code::OutOfRange => (StatusCode::BAD_REQUEST, "context_length_exceeded"),
        Code::NotFound => (StatusCode::NOT_FOUND, "model_not_found"),
        Code::AlreadyExists => (StatusCode::CONFLICT, "conflict"),
        Code::ResourceExhausted => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded"),
        Code::Unauthenticated => (StatusCode::UNAUTHORIZED, "unauthenticated"),
        Code::PermissionDenied => (StatusCode::FORBIDDEN, "permission_denied"),
        Code::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, "request_timeout"),
        Code::Unimplemented => (StatusCode::NOT_IMPLEMENTED, "not_implemented"),
        Code::Unavailable | Code::Aborted | Code::Cancelled => {
            (StatusCode::SERVICE_UNAVAILABLE, "service_unavailable")
        }
        Code::Internal | Code::Unknown | Code::DataLoss | Code::Ok => {
            (StatusCode::INTERNAL_SERVER_ERROR, "internal_error")
        }
    };
    let mut error = ApiError::new(http, message(status)).code(code);
    if let Some(info) = details.error_info().filter(|info| !info.reason.is_empty()) {
        error.code = Some(info.reason.to_ascii_lowercase());
        let number = |name: &str| info.metadata.get(name)?.parse().ok();
        error.too_long = number("prompt_tokens")
            .zip(number("limit"))
            .map(|(prompt, limit)| {
                Box::new(TooLong {
                    prompt,
                    max_tokens: number("max_tokens"),
                    limit,
                })
            });
    }
    if let Some(violation) = details.bad_request().and_then(|bad| bad.field_violations.first()) {
        error.param = (!violation.field.is_empty()).then(|| violation.field.clone());
    }
    if status.code() == Code::NotFound && error.param.is_none() {
        error.param = Some(String::from("model"));
    }
    let hint = details.retry_info().and_then(|retry| retry.retry_delay);
    if matches!(
        http,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    ) {
        error.retry_after = Some(hint.unwrap_or(RETRY_DEFAULT));
    }
    error
}

/// tonic's own words for a lost connection say nothing to an HTTP client.
pub(super) fn message(status: &tonic::Status) -> String {
    let own = status.message();
    let is_transport = std::error::Error::source(status).is_some();
    match status.code() {
        Code::Unavailable if is_transport => format!("the router cannot be reached ({own}): try again"),
        Code::Unknown | Code::Internal | Code::Cancelled if is_transport => {
            format!("the connection to the router broke ({own}): try again")
        }
        Code::Unimplemented if own.is_empty() => {
            String::from("the router's address serves no clients: it may be the router's port for workers")
        }
        code if own.is_empty() => format!("the router answered {code:?} without a reason"),
        _ => own.to_owned(),
    }
}
