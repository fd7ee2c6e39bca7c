//! Joins a step's span to the traces of the requests it serves (W3C trace context).

use std::collections::HashMap;

use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Requests of one step that its span is joined to; the rest is left out.
const MAX_PARENTS: usize = 64;

/// The first request becomes the span's parent, the others are linked. What is malformed is left out.
pub(crate) fn join(span: &tracing::Span, parents: &[String]) {
    let propagator = TraceContextPropagator::new();
    let contexts = parents.iter().take(MAX_PARENTS).map(|parent| {
        let carrier = HashMap::from([("traceparent".to_owned(), parent.clone())]);
        propagator.extract(&carrier)
    });
    let mut valid = contexts.filter(|context| context.span().span_context().is_valid());
    if let Some(first) = valid.next()
        && span.set_parent(first).is_err()
    {
        // No exporter is installed.
        return;
    }
    for context in valid {
        span.add_link(context.span().span_context().clone());
    }
}
