//! What belongs to one HTTP request on all its way: its id and its place in a distributed trace.

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The router takes 128 bytes; choices and prompts append a few of their own.
const REQUEST_ID_BYTES_MAX: usize = 100;
/// W3C trace context: version, trace id, parent id, flags.
const TRACEPARENT_BYTES: usize = 55;
/// The specification asks to carry at least so much.
const TRACESTATE_BYTES_MAX: usize = 512;

/// One request's identity. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct RequestContext {
    /// The client's `X-Request-Id` where it is printable and short enough, otherwise random.
    pub(crate) id: String,
    pub(crate) deadline: Option<Instant>,
    traceparent: Option<MetadataValue<Ascii>>,
    tracestate: Option<MetadataValue<Ascii>>,
}

impl RequestContext {
    pub(crate) fn new(headers: &HeaderMap, deadline: Option<Instant>) -> Self {
        let id = headers
            .get(&REQUEST_ID)
            .and_then(|value| value.to_str().ok())
            .filter(|id| is_request_id(id))
            .map_or_else(random_id, str::to_owned);
        let metadata = |name: &str| {
            headers
                .get(name)
                .and_then(|value| value.to_str().ok()?.parse().ok())
        };
        let traceparent = header(headers, "traceparent")
            .filter(|value| is_traceparent(value))
            .and_then(|_| metadata("traceparent"));
        let tracestate = header(headers, "tracestate")
            .filter(|value| traceparent.is_some() && value.len() <= TRACESTATE_BYTES_MAX)
            .and_then(|_| metadata("tracestate"));
        Self {
            id,
            deadline,
            traceparent,
            tracestate,
        }
    }

    /// Hands the trace on to the router.
    pub(crate) fn write_metadata(&self, metadata: &mut MetadataMap) {
        if let Some(value) = &self.traceparent {
            metadata.insert("traceparent", value.clone());
        }
        if let Some(value) = &self.tracestate {
            metadata.insert("tracestate", value.clone());
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

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn is_request_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= REQUEST_ID_BYTES_MAX && id.bytes().all(|byte| byte.is_ascii_graphic())
}

fn is_traceparent(value: &str) -> bool {
    let hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let zero = |part: &str| part.bytes().all(|byte| byte == b'0');
    let mut parts = value.split('-');
    let (Some(version), Some(trace), Some(parent), Some(flags)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    // Later versions may append fields; version ff is forbidden.
    let whole = (version.len(), trace.len(), parent.len(), flags.len()) == (2, 32, 16, 2);
    let tail = version != "00" || value.len() == TRACEPARENT_BYTES;
    whole
        && tail
        && [version, trace, parent, flags].into_iter().all(hex)
        && version != "ff"
        && !zero(trace)
        && !zero(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_only_well_formed_trace_parents() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert!(is_traceparent(good));
        assert!(is_traceparent(&format!("{}-more", good.replacen("00", "01", 1))));
        for bad in [
            String::new(),
            String::from("00"),
            format!("{good}-more"),
            good.replacen("00", "ff", 1),
            good.to_uppercase(),
            String::from("00-00000000000000000000000000000000-b7ad6b7169203331-01"),
            String::from("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01"),
        ] {
            assert!(!is_traceparent(&bad), "{bad}");
        }
    }

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
