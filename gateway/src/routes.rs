//! The one table of routes. A path is served because it stands here, and it is open without a key only
//! because it says so here; tests walk the same table.

use std::sync::Arc;

use axum::extract::Request;
use axum::routing::{MethodRouter, get, post};
use http::StatusCode;

use crate::http::edge;
use crate::http::error::ApiError;
use crate::server::App;
use crate::{openai, ops};

/// Who may call a route when keys are configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Probes and what describes the server: no key needed.
    Public,
    /// A key is needed.
    Key,
}

/// A served route, as tests and documentation see it.
#[derive(Clone, Copy, Debug)]
pub struct RouteInfo {
    /// `GET` or `POST`; GET also serves HEAD.
    pub method: &'static str,
    /// The path as axum spells it, `{id}` for a segment.
    pub path: &'static str,
    /// Whether a key is needed.
    pub access: Access,
}

struct Route {
    info: RouteInfo,
    handler: fn() -> MethodRouter<Arc<App>>,
}

const fn route(
    method: &'static str,
    path: &'static str,
    access: Access,
    handler: fn() -> MethodRouter<Arc<App>>,
) -> Route {
    Route {
        info: RouteInfo { method, path, access },
        handler,
    }
}

static ROUTES: &[Route] = &[
    route("POST", "/v1/chat/completions", Access::Key, || post(openai::chat)),
    route("POST", "/v1/completions", Access::Key, || {
        post(openai::completions)
    }),
    route("GET", "/v1/models", Access::Key, || get(openai::models)),
    route("GET", "/v1/models/{*id}", Access::Key, || get(openai::model)),
    route("POST", "/tokenize", Access::Key, || post(openai::tokenize)),
    route("POST", "/detokenize", Access::Key, || post(openai::detokenize)),
    route("GET", "/health", Access::Public, || get(ops::health)),
    route("GET", "/ping", Access::Public, || get(ops::health)),
    route("GET", "/ready", Access::Public, || get(ops::ready)),
    route("GET", "/version", Access::Public, || get(ops::version)),
    route("GET", "/metrics", Access::Public, || get(ops::metrics)),
];

/// Every route that a gateway serves.
pub fn routes() -> impl Iterator<Item = RouteInfo> {
    ROUTES.iter().map(|route| route.info)
}

/// The table's own spelling of a matched path, with its access.
pub(crate) fn find(path: &str) -> Option<&'static RouteInfo> {
    ROUTES
        .iter()
        .map(|route| &route.info)
        .find(|info| info.path == path)
}

/// The service behind every connection.
pub(crate) fn service(app: Arc<App>) -> axum::Router {
    let mut router = axum::Router::new();
    for route in ROUTES {
        router = router.route(route.info.path, (route.handler)().fallback(method_not_allowed));
    }
    let router = router
        .fallback(not_found)
        .layer(axum::middleware::from_fn_with_state(app.clone(), edge::around));
    let router = match edge::cors(&app.config.cors_origins) {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router.with_state(app)
}

async fn not_found(request: Request) -> ApiError {
    let path = request.uri().path();
    ApiError::new(
        StatusCode::NOT_FOUND,
        format!("{} {path} is not served", request.method()),
    )
    .code("unknown_url")
}

async fn method_not_allowed(matched: axum::extract::MatchedPath, request: Request) -> ApiError {
    let allow = find(matched.as_str()).map_or("GET", |info| info.method);
    let message = format!("{} is not served here: use {allow}", request.method());
    ApiError {
        allow: Some(allow),
        ..ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).code("method_not_allowed")
    }
}
