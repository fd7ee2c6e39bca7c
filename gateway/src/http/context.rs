//! What belongs to one HTTP request on all its way: its id and its place in a distributed trace.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;

use super::auth::Caller;
use super::quota::Admission;
use super::trace::Trace;

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The router takes 128 bytes; choices and prompts append a few of their own.
const REQUEST_ID_BYTES_MAX: usize = 100;
/// One request's identity. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct RequestContext {
    /// The client's `X-Request-Id` where it is printable and short enough, otherwise random.
    pub(crate) id: String,
    pub(crate) deadline: Option<Instant>,
    pub(crate) trace: Trace,
    pub(crate) caller: Caller,
    /// Held as long as any part of the request runs.
    pub(crate) admission: Option<Arc<Admission>>,
}

impl RequestContext {
    pub(crate) fn new(headers: &HeaderMap, deadline: Option<Instant>) -> Self {
        let id = headers
            .get(&REQUEST_ID)
            .and_then(|value| value.to_str().ok())
            .filter(|id| is_request_id(id))
            .map_or_else(random_id, str::to_owned);
        Self {
            id,
            deadline,
            trace: Trace::of(headers),
            caller: Caller::default(),
            admission: None,
        }
    }

    pub(crate) fn id_header(&self) -> Option<HeaderValue> {
        HeaderValue::from_str(&self.id).ok()
    }
}

/// 32 random hexadecimal digits.
pub(crate) fn random_id() -> String {
    let mut bytes = [0_u8; 16];
    // Without the system's randomness ids would repeat, not break: they only name requests in logs.
    if let Err(error) = getrandom::fill(&mut bytes) {
        tracing::warn!(%error, "no randomness for request ids");
    }
    format!("{:032x}", u128::from_be_bytes(bytes))
}

fn is_request_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= REQUEST_ID_BYTES_MAX && id.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_request_ids_that_logs_should_not_carry() {
        let id = |value: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_bytes(value).unwrap());
            RequestContext::new(&headers, None).id
        };
        assert_eq!(id(b"abc-1"), "abc-1");
        assert_eq!(id(&[b'a'; REQUEST_ID_BYTES_MAX]).len(), REQUEST_ID_BYTES_MAX);
        for bad in [&b""[..], b"a b", b"\xff", &[b'a'; REQUEST_ID_BYTES_MAX + 1]] {
            assert_eq!(id(bad).len(), 32, "{bad:?}");
        }
    }
}
