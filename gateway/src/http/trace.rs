//! W3C trace context: from the client's headers into this request's span, and from the span to the router.
//!
//! Without a tracing layer that records spans (no `--otlp-endpoint`) the client's own headers go on unchanged,
//! so that the gateway never breaks a trace it takes no part in.

use http::HeaderMap;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState};
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";
/// Version 00: version, trace id, parent id, flags.
const TRACEPARENT_BYTES: usize = 55;
/// The specification asks to carry at least so much.
const TRACESTATE_BYTES_MAX: usize = 512;

/// The caller's place in its trace; nothing if it sent none, or none that is well formed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trace {
    parent: Option<SpanContext>,
    traceparent: Option<MetadataValue<Ascii>>,
    tracestate: Option<MetadataValue<Ascii>>,
}

impl Trace {
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let Some((traceparent, parent)) = text(TRACEPARENT).and_then(|text| Some((text, parse(text)?)))
        else {
            return Self::default();
        };
        let state = text(TRACESTATE).filter(|state| state.len() <= TRACESTATE_BYTES_MAX);
        Self {
            parent: Some(parent),
            traceparent: traceparent.parse().ok(),
            tracestate: state.and_then(|state| state.parse().ok()),
        }
    }

    /// Makes `span` a child of the caller's.
    pub(crate) fn adopt(&self, span: &Span) {
        if let Some(parent) = &self.parent {
            let context = opentelemetry::Context::new().with_remote_span_context(parent.clone());
            if span.set_parent(context).is_err() {
                tracing::trace!("no tracing layer takes the caller's traceparent");
            }
        }
    }

    /// Tells the router: it is a child of this request's span, or of the caller's where no span is recorded.
    pub(crate) fn write(&self, metadata: &mut MetadataMap) {
        let own = own_traceparent(&Span::current());
        if let Some(value) = own.or_else(|| self.traceparent.clone()) {
            metadata.insert(TRACEPARENT, value);
        }
        if let Some(value) = &self.tracestate {
            metadata.insert(TRACESTATE, value.clone());
        }
    }
}

fn own_traceparent(span: &Span) -> Option<MetadataValue<Ascii>> {
    let context = span.context();
    let reference = context.span().span_context().clone();
    if !reference.is_valid() {
        return None;
    }
    let (trace, span, flags) = (
        reference.trace_id(),
        reference.span_id(),
        reference.trace_flags().to_u8(),
    );
    format!("00-{trace}-{span}-{flags:02x}").parse().ok()
}

fn parse(value: &str) -> Option<SpanContext> {
    let is_hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let mut parts = value.split('-');
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    // Later versions may append fields; version ff is forbidden.
    let sizes = (version.len(), trace.len(), parent.len(), flags.len()) == (2, 32, 16, 2);
    let tail = version != "00" || value.len() == TRACEPARENT_BYTES;
    if !sizes || !tail || version == "ff" || ![version, trace, parent, flags].into_iter().all(is_hex) {
        return None;
    }
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(parent).ok()?,
        TraceFlags::new(u8::from_str_radix(flags, 16).ok()?),
        true,
        TraceState::NONE,
    );
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_only_well_formed_trace_parents() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert!(parse(good).is_some_and(|context| context.is_sampled()));
        assert!(parse(&format!("{}-more", good.replacen("00", "01", 1))).is_some());
        for bad in [
            String::new(),
            String::from("00"),
            format!("{good}-more"),
            good.replacen("00", "ff", 1),
            good.to_uppercase(),
            String::from("00-00000000000000000000000000000000-b7ad6b7169203331-01"),
            String::from("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01"),
        ] {
            assert!(parse(&bad).is_none(), "{bad}");
        }
    }
}
