//! JSON out, whole. Large answers go out in pieces through a bounded channel, so that a reader which takes
//! nothing loses its answer instead of holding it in memory, on HTTP/2 as on HTTP/1.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

use super::error::ApiError;
use super::pieces;
use crate::config::Limits;

/// Answers up to this size are handed to the connection at once.
const WHOLE_BYTES_MAX: usize = 64 << 10;

/// 200 with `value` as JSON.
pub(crate) fn json<T: Serialize>(limits: &Limits, value: &T) -> Response {
    match serde_json::to_vec(value) {
        Ok(bytes) => bytes_as(limits, bytes.into(), "application/json"),
        Err(error) => ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("could not write the answer: {error}"),
        )
        .into_response(),
    }
}

/// 200 with `bytes` under a content type.
pub(crate) fn bytes_as(limits: &Limits, mut bytes: Bytes, content_type: &'static str) -> Response {
    let length = bytes.len();
    let body = if length <= WHOLE_BYTES_MAX {
        Body::from(bytes)
    } else {
        let (sender, whole, body) = pieces::channel(1);
        let stall = limits.write_timeout;
        tokio::spawn(async move {
            while !bytes.is_empty() {
                let piece = bytes.split_to(bytes.len().min(WHOLE_BYTES_MAX));
                if sender.send_timeout(piece, stall).await.is_err() {
                    return;
                }
            }
            whole.set();
        });
        body
    };
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    response
}
