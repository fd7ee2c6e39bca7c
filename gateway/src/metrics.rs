//! The gateway's own figures, in Prometheus' text format.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Seconds until the answer's headers; whole answers can take minutes.
const SECONDS: [f64; 12] = [
    0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0,
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RequestLabels {
    /// The route's pattern, or `none`: a client must not be able to make up label values.
    pub(crate) route: &'static str,
    pub(crate) method: &'static str,
    pub(crate) status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RouteLabels {
    pub(crate) route: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RouterLabels {
    /// Configured, or found under a configured name.
    pub(crate) router: String,
    pub(crate) outcome: &'static str,
}

/// All counters; shared by every task.
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) requests: Family<RequestLabels, Counter>,
    pub(crate) seconds_to_headers: Family<RouteLabels, Histogram, fn() -> Histogram>,
    pub(crate) connections: Gauge,
    pub(crate) connections_refused: Counter,
    pub(crate) calls: Gauge,
    pub(crate) router_calls: Family<RouterLabels, Counter>,
    pub(crate) events: Counter<u64, AtomicU64>,
}

fn seconds() -> Histogram {
    Histogram::new(SECONDS)
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("conclave_gateway");
        let requests = Family::default();
        let seconds_to_headers = Family::new_with_constructor(seconds as fn() -> Histogram);
        let (connections, connections_refused) = (Gauge::default(), Counter::default());
        let (calls, events) = (Gauge::default(), Counter::default());
        registry.register("requests", "HTTP requests answered", requests.clone());
        registry.register(
            "seconds_to_headers",
            "Seconds from a request's headers to its answer's",
            seconds_to_headers.clone(),
        );
        registry.register("connections", "Open client connections", connections.clone());
        registry.register(
            "connections_refused",
            "Connections beyond the limit, answered 503",
            connections_refused.clone(),
        );
        registry.register("calls", "Generate calls to routers in flight", calls.clone());
        let router_calls = Family::default();
        registry.register(
            "router_calls",
            "Generate calls by router and outcome",
            router_calls.clone(),
        );
        registry.register("events", "Messages received on Generate calls", events.clone());
        Self {
            registry,
            requests,
            seconds_to_headers,
            connections,
            connections_refused,
            calls,
            router_calls,
            events,
        }
    }

    /// Text without the closing `# EOF`, so that a router's text can go before it.
    pub(crate) fn encode(&self) -> String {
        let mut out = String::new();
        if text::encode_registry(&mut out, &self.registry).is_err() {
            tracing::error!("the metrics could not be written");
        }
        out
    }
}
