//! Spans: a sampled caller's trace goes through the router to the workers' steps.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use support::{Answer, Cluster, Script, config, request};
use tonic::Request;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

#[tokio::test]
async fn a_sampled_request_is_followed_to_its_steps_and_others_are_not() {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();
    tracing_subscriber::registry()
        .with(
            tracing_opentelemetry::layer()
                .with_tracer(provider.tracer("test"))
                .with_filter(Targets::new().with_target("conclave_router", tracing::Level::INFO)),
        )
        .init();
    let (cluster, worker) = Cluster::with_worker(config(), Script::new("a")).await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let sampled = |flag| {
        let mut request = Request::new(request(&[5, 6, 7], 4));
        let parent = format!("00-{trace}-b7ad6b7169203331-{flag}");
        request
            .metadata_mut()
            .insert("traceparent", parent.parse().unwrap());
        request
    };
    let call = async |request| {
        let stream = cluster
            .client
            .clone()
            .generate(request)
            .await
            .unwrap()
            .into_inner();
        Answer::read(stream).await
    };
    call(sampled("00")).await;
    assert!(worker.seen.borrow().trace_parents.is_empty());
    call(sampled("01")).await;
    let seen = worker.seen.borrow().trace_parents.clone();
    assert!(!seen.is_empty());
    for parent in &seen {
        let fields: Vec<&str> = parent.split('-').collect();
        assert_eq!((fields[0], fields[1], fields[3]), ("00", trace, "01"), "{parent}");
        assert_ne!(
            fields[2], "b7ad6b7169203331",
            "the parent is the router's span, not the caller's"
        );
    }
    let of_request =
        |span: &SpanData| span.name == "generate" && span.span_context.trace_id().to_string() == trace;
    // The span ends when the last of the request's parts is dropped.
    let span = loop {
        let spans = exporter.get_finished_spans().unwrap();
        if let Some(span) = spans.into_iter().find(of_request) {
            break span;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(span.parent_span_id.to_string(), "b7ad6b7169203331");
    assert_eq!(
        seen[0].split('-').nth(2).unwrap(),
        span.span_context.span_id().to_string()
    );
    let attribute = |name: &str| {
        let found = span.attributes.iter().find(|a| a.key.as_str() == name);
        found.map(|a| a.value.to_string()).unwrap_or_default()
    };
    assert_eq!(attribute("prompt_tokens"), "3");
    assert_eq!(attribute("completion_tokens"), "4");
    assert!(attribute("request_id").starts_with("req-"));
    assert!(!attribute("ttft_ms").is_empty());
}
