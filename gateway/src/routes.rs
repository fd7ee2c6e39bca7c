//! The one table of routes. A path is served because it stands here, and it is open without a key only
//! because it says so here; tests walk the same table.

use std::sync::Arc;

use axum::extract::{MatchedPath, Request};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post};
use http::StatusCode;

use crate::app::App;
use crate::http::context::RequestContext;
use crate::http::error::ApiError;
use crate::{anthropic, docs, openai, ops, responses};

/// Who may call a route when keys are configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Probes and what describes the server: no key needed.
    Public,
    /// A key is needed.
    Key,
    /// A key is needed, and the request counts against its limits.
    Metered,
}

/// A served route, as tests and documentation see it.
#[derive(Clone, Copy, Debug)]
pub struct RouteInfo {
    /// `GET`, `POST` or `DELETE`; GET also serves HEAD.
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
    route("POST", "/v1/chat/completions", Access::Metered, || {
        post(openai::chat)
    }),
    route("POST", "/v1/completions", Access::Metered, || {
        post(openai::completions)
    }),
    route("POST", "/v1/messages", Access::Metered, || {
        post(anthropic::messages)
    }),
    route("POST", "/v1/messages/count_tokens", Access::Key, || {
        post(anthropic::count_tokens)
    }),
    route("POST", "/v1/responses", Access::Metered, || {
        post(responses::create)
    }),
    route("GET", "/v1/responses/{id}", Access::Key, || {
        get(responses::retrieve)
    }),
    route("DELETE", "/v1/responses/{id}", Access::Key, || {
        delete(responses::delete)
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
    route("GET", "/openapi.json", Access::Public, || get(docs::openapi)),
    route("GET", "/docs", Access::Public, || get(docs::page)),
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

/// All routes, and the answers to what is none of them.
pub(crate) fn router() -> axum::Router<Arc<App>> {
    let mut router = axum::Router::new();
    for (at, first) in ROUTES.iter().enumerate() {
        let path = first.info.path;
        if ROUTES[..at].iter().any(|earlier| earlier.info.path == path) {
            continue;
        }
        let same = ROUTES.iter().filter(|route| route.info.path == path);
        let methods = same.fold(MethodRouter::new(), |methods, route| {
            methods.merge((route.handler)())
        });
        router = router.route(path, methods.fallback(method_not_allowed));
    }
    router.fallback(not_found)
}

async fn not_found(request: Request) -> Response {
    let path = request.uri().path();
    let message = format!(
        "{} {path} is not served; GET /docs lists what is",
        request.method()
    );
    refuse(
        &request,
        ApiError::new(StatusCode::NOT_FOUND, message).code("unknown_url"),
    )
}

async fn method_not_allowed(matched: MatchedPath, request: Request) -> Response {
    let served = ROUTES.iter().filter(|route| route.info.path == matched.as_str());
    let allow = served
        .map(|route| route.info.method)
        .collect::<Vec<_>>()
        .join(", ");
    let message = format!("{} is not served here: use {allow}", request.method());
    let error = ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).code("method_not_allowed");
    refuse(
        &request,
        ApiError {
            allow: Some(allow.into()),
            ..error
        },
    )
}

/// Answers outside of any handler, in the shape of the API that the path belongs to.
pub(crate) fn refuse(request: &Request, error: ApiError) -> Response {
    if !anthropic::is_anthropic_path(request.uri().path()) {
        return error.into_response();
    }
    let id = request
        .extensions()
        .get::<RequestContext>()
        .map_or("", |context| context.id.as_str());
    anthropic::respond_error(error, id)
}
