//! Spans: one per request, a child of the caller's where it sent a W3C traceparent, and the parent of the workers'
//! step spans. No prompt text is recorded here.

use std::sync::Arc;

use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::metadata::MetadataMap;
use tracing::Span;
use tracing::field::Empty;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// gRPC metadata as a propagation carrier.
struct Metadata<'a>(&'a MetadataMap);

impl Extractor for Metadata<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

/// The span of one Generate call. `ttft_ms` and the token counts are filled in as they become known.
pub fn request_span(metadata: &MetadataMap) -> Span {
    let span = tracing::info_span!(
        "generate",
        request_id = Empty,
        prompt_tokens = Empty,
        completion_tokens = Empty,
        cached_tokens = Empty,
        ttft_ms = Empty,
    );
    if metadata.contains_key("traceparent") {
        let parent = TraceContextPropagator::new().extract(&Metadata(metadata));
        if span.set_parent(parent).is_err() {
            tracing::debug!("no tracing layer takes the caller's traceparent");
        }
    }
    span
}

/// The traceparent that the workers' step spans join, if this request is sampled.
pub fn parent_of_steps(span: &Span) -> Option<Arc<str>> {
    let context = span.context();
    let reference = context.span().span_context().clone();
    (reference.is_valid() && reference.is_sampled()).then(|| {
        format!(
            "00-{}-{}-{:02x}",
            reference.trace_id(),
            reference.span_id(),
            reference.trace_flags().to_u8()
        )
        .into()
    })
}
