//! What every request can reach. Handlers take it; it knows none of them.

use std::sync::Arc;

use tokio::sync::watch;

use crate::config::GatewayConfig;
use crate::http::auth::Keys;
use crate::http::body::BodyBudget;
use crate::metrics::Metrics;
use crate::responses::Store;
use crate::upstream::Upstream;

/// One for a gateway, shared by all requests.
pub(crate) struct App {
    pub(crate) config: GatewayConfig,
    pub(crate) upstream: Arc<Upstream>,
    pub(crate) keys: Keys,
    pub(crate) bodies: BodyBudget,
    pub(crate) responses: Store,
    pub(crate) metrics: Arc<Metrics>,
    /// True from the moment shutdown was asked for.
    pub(crate) draining: watch::Receiver<bool>,
}
