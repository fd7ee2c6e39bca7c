//! Request bodies: bounded in size, in time, and in what all of them together hold in memory.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::{ApiError, ApiResult};
use crate::config::Limits;

/// Grain of the shared budget.
const BUDGET_UNIT: usize = 4 << 10;
/// A body that is too large is still read up to this size, so that the client sees the 413 and not a reset.
const DISCARD_BYTES_MAX: u64 = 64 << 20;
const DISCARD_TIME_MAX: Duration = Duration::from_secs(5);

/// Memory for the bodies of all requests being read or decoded.
#[derive(Clone)]
pub(crate) struct BodyBudget(Arc<Semaphore>);

impl BodyBudget {
    pub(crate) fn new(limits: &Limits) -> Self {
        let units = (limits.bodies_in_memory_bytes / BUDGET_UNIT).min(Semaphore::MAX_PERMITS);
        Self(Arc::new(Semaphore::new(units)))
    }
}

/// A body, which gives its share of the budget back when dropped.
pub(crate) struct Held {
    pub(crate) bytes: Bytes,
    _shares: Vec<OwnedSemaphorePermit>,
}

/// Reads the whole body.
///
/// # Errors
/// 413 beyond the limit, 408 when it takes too long, 503 when the budget of all bodies is spent, 400 when the
/// connection fails in the middle.
pub(crate) async fn read(
    headers: &HeaderMap,
    body: Body,
    budget: &BodyBudget,
    limits: &Limits,
) -> ApiResult<Held> {
    let declared = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let mut body = body;
    if let Some(length) = declared.filter(|length| *length > limits.body_bytes as u64) {
        if length <= DISCARD_BYTES_MAX {
            discard(&mut body).await;
        }
        return Err(too_large(limits));
    }
    let result = tokio::time::timeout(
        limits.body_read_timeout,
        collect(&mut body, declared, budget, limits),
    )
    .await;
    match result {
        Ok(Err(error)) if error.status == StatusCode::PAYLOAD_TOO_LARGE => {
            discard(&mut body).await;
            Err(error)
        }
        Ok(other) => other,
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            format!(
                "the request body did not arrive within {:?}",
                limits.body_read_timeout
            ),
        )),
    }
}

async fn collect(
    body: &mut Body,
    declared: Option<u64>,
    budget: &BodyBudget,
    limits: &Limits,
) -> ApiResult<Held> {
    let expected = declared
        .and_then(|length| usize::try_from(length).ok())
        .unwrap_or(0);
    // What a header declares is reserved only as far as bytes really come.
    let mut bytes = BytesMut::with_capacity(expected.min(64 << 10));
    let mut shares = Vec::new();
    let mut reserved = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            ApiError::new(
                StatusCode::BAD_REQUEST,
                format!("could not read the request body: {error}"),
            )
        })?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limits.body_bytes {
            return Err(too_large(limits));
        }
        let needed = bytes.len() + data.len();
        if needed > reserved {
            // Twice what is there, as the buffer itself grows, so that few permits are held.
            let units = (needed - reserved).max(reserved).div_ceil(BUDGET_UNIT);
            let share = u32::try_from(units)
                .ok()
                .and_then(|units| budget.0.clone().try_acquire_many_owned(units).ok())
                .ok_or_else(|| {
                    ApiError::new(
                        StatusCode::SERVICE_UNAVAILABLE,
                        "too many request bodies are being read",
                    )
                    .code("server_busy")
                    .retry_after(Duration::from_secs(1))
                })?;
            reserved += units * BUDGET_UNIT;
            shares.push(share);
        }
        bytes.extend_from_slice(&data);
    }
    Ok(Held {
        bytes: bytes.freeze(),
        _shares: shares,
    })
}

async fn discard(body: &mut Body) {
    let mut seen = 0_u64;
    let drained = async {
        while let Some(Ok(frame)) = body.frame().await {
            seen += frame.data_ref().map_or(0, |data| data.len() as u64);
            if seen > DISCARD_BYTES_MAX {
                break;
            }
        }
    };
    if tokio::time::timeout(DISCARD_TIME_MAX, drained).await.is_err() {
        tracing::debug!("gave up reading a body that is too large");
    }
}

fn too_large(limits: &Limits) -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!("the request body is larger than {} bytes", limits.body_bytes),
    )
    .code("request_too_large")
}
