//! Numbers of JSON into the proto's types.

use super::error::{ApiError, ApiResult};

pub(crate) fn out_of_range(param: &str, value: impl std::fmt::Display, expected: &str) -> ApiError {
    ApiError::field(
        param,
        format!("{param}: {value} is out of range, expected {expected}"),
    )
    .code("invalid_value")
}

/// A number that F32 can hold.
pub(crate) fn float(param: &str, value: Option<f64>) -> ApiResult<Option<f32>> {
    let Some(value) = value else { return Ok(None) };
    let single = value as f32;
    if single.is_finite() {
        Ok(Some(single))
    } else {
        Err(out_of_range(param, value, "a 32-bit number"))
    }
}

/// vLLM's `priority` puts low numbers first, the proto's puts high ones first.
pub(crate) fn priority(value: Option<i64>) -> ApiResult<i32> {
    let value = value.unwrap_or(0);
    value
        .checked_neg()
        .and_then(|negated| i32::try_from(negated).ok())
        .ok_or_else(|| out_of_range("priority", value, "a 32-bit integer"))
}
