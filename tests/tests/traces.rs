//! Spans of one request, as an OpenTelemetry collector gets them from gateway, router and every worker; and logs, which
//! hold no text of a prompt unless asked.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use conclave_tests::{Client, Server};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tonic::transport::server::TcpIncoming;

/// Batches leave a process every few seconds, on a busy machine later.
const EXPORTED_WITHIN: Duration = Duration::from_secs(60);
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// Process, span name, span id, parent's id.
type Seen = Arc<Mutex<Vec<(String, String, String, String)>>>;

/// Keeps the spans of [`TRACE`].
struct Collector(Seen);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let mut seen = self.0.lock().expect("spans");
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let service = attributes
                .into_iter()
                .find(|attribute| attribute.key == "service.name");
            let service = format!("{:?}", service.expect("a process names itself").value);
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            for span in spans.filter(|span| hex(&span.trace_id) == TRACE) {
                seen.push((
                    service.clone(),
                    span.name,
                    hex(&span.span_id),
                    hex(&span.parent_span_id),
                ));
            }
        }
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A collector on a port of its own.
fn collector(runtime: &Runtime) -> (SocketAddr, Seen) {
    let seen = Seen::default();
    let listener = runtime
        .block_on(TcpListener::bind("127.0.0.1:0"))
        .expect("a free port");
    let address = listener.local_addr().expect("its address");
    let service = TraceServiceServer::new(Collector(Arc::clone(&seen)));
    let serving = tonic::transport::Server::builder().add_service(service);
    runtime.spawn(serving.serve_with_incoming(TcpIncoming::from(listener)));
    (address, seen)
}

#[test]
fn a_request_is_followed_through_gateway_router_and_every_workers_steps() {
    let runtime = Runtime::new().expect("a runtime");
    let (address, seen) = collector(&runtime);
    let server = Server::serve(&[
        "--workers",
        "2",
        &format!("--otlp-endpoint=http://{address}"),
        "--log=debug",
        "--log-format=json",
    ]);
    let secret = "xyzzy plugh";
    let answer = ureq::post(format!("http://{}/v1/chat/completions", server.http))
        .header("traceparent", format!("00-{TRACE}-{CALLER}-01"))
        .send_json(json!({"messages": [{"role": "user", "content": secret}], "max_tokens": 8}))
        .expect("an answer");
    assert_eq!(answer.status(), 200);

    // Steps run on both workers, for the experts; a span there names its own parent.
    let complete = |spans: &[(String, String, String, String)]| {
        let workers = spans.iter().filter(|span| span.1 == "step").count();
        let others = spans.iter().filter(|span| span.1 != "step").count();
        workers >= 2 && others >= 2
    };
    let deadline = Instant::now() + EXPORTED_WITHIN;
    while !complete(&seen.lock().expect("spans")) {
        assert!(
            Instant::now() < deadline,
            "spans that came: {:?}\n{}",
            seen.lock(),
            server.output()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let spans = seen.lock().expect("spans").clone();
    let ids: BTreeSet<&str> = spans.iter().map(|span| span.2.as_str()).collect();
    let root = spans
        .iter()
        .find(|span| span.3 == CALLER)
        .expect("a span whose parent is the caller's");
    let inner = spans
        .iter()
        .find(|span| span.3 == root.2)
        .expect("the router's span is a child of the gateway's");
    assert!(
        spans.iter().any(|span| span.1 == "step" && span.3 == inner.2),
        "a worker's step is a child of the router's: {spans:?}"
    );
    println!(
        "{} spans of one request, {} distinct: {spans:?}",
        spans.len(),
        ids.len()
    );

    let logged = server.output();
    assert!(
        !logged.contains("xyzzy") && !logged.contains("plugh"),
        "the log holds text of a prompt:\n{logged}"
    );
    assert!(server.stop().success());
}

#[test]
fn prompts_are_logged_only_where_asked() {
    let server = Server::serve(&["--workers", "1", "--log-prompts=true"]);
    let body = json!({"messages": [{"role": "user", "content": "xyzzy plugh"}], "max_tokens": 2});
    let answer = Client::new(&server.http).post("/v1/chat/completions", &body);
    assert_eq!(answer.status, 200, "{}", answer.body);
    server.wait_for_line("xyzzy");
}
