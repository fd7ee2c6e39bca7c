//! What happens around every request: its id, its span, its key, its count.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};
use tracing::Instrument as _;

use super::context::{REQUEST_ID, RequestContext};
use super::error::ApiResult;
use super::quota::Quota;
use crate::app::App;
use crate::metrics::{RequestLabels, RouteLabels};
use crate::routes::{self, Access};

/// The innermost layer of the router: the route is known here, and unknown paths come by as well.
pub(crate) async fn around(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let deadline = app.config.limits.request_timeout.map(|timeout| started + timeout);
    let mut context = RequestContext::new(request.headers(), deadline.map(Into::into));
    let id = context.id_header();
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .and_then(|path| routes::find(path.as_str()));
    let method = method_name(request.method());
    let span = tracing::info_span!(
        "http",
        method,
        route = route.map_or("none", |route| route.path),
        request_id = %context.id,
        status = tracing::field::Empty,
    );
    context.trace.adopt(&span);
    let access = route.map_or(Access::Key, |route| route.access);
    let (admitted, quota) = admit(&app, access, &mut context, request.headers());
    request.extensions_mut().insert(context);
    let mut response = match admitted {
        Ok(()) => next.run(request).instrument(span.clone()).await,
        Err(error) => routes::refuse(&request, error),
    };
    if let Some(quota) = quota {
        quota.write_headers(response.headers_mut());
    }
    if let Some(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let status = response.status().as_u16();
    span.record("status", status);
    let route = route.map_or("none", |route| route.path);
    app.metrics
        .requests
        .get_or_create(&RequestLabels {
            route,
            method,
            status,
        })
        .inc();
    app.metrics
        .seconds_to_headers
        .get_or_create(&RouteLabels { route })
        .observe(started.elapsed().as_secs_f64());
    response
}

/// Checks the key and, for what generates, what the key may still use. The quota is for the answer's headers.
fn admit(
    app: &App,
    access: Access,
    context: &mut RequestContext,
    headers: &HeaderMap,
) -> (ApiResult<()>, Option<Arc<Quota>>) {
    if access == Access::Public {
        return (Ok(()), None);
    }
    let (caller, quota) = match app.keys.check(headers) {
        Ok(known) => known,
        Err(error) => return (Err(error), None),
    };
    context.caller = caller;
    if access == Access::Key {
        return (Ok(()), None);
    }
    let admitted = quota.admit(Instant::now());
    (
        admitted.map(|admission| context.admission = Some(Arc::new(admission))),
        Some(quota),
    )
}

/// Metrics and spans name only methods that exist.
fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

/// CORS for the given origins, none for an empty list.
pub(crate) fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let origin = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(
            origins
                .iter()
                .filter_map(|origin| HeaderValue::from_str(origin).ok()),
        )
    };
    Some(
        CorsLayer::new()
            .allow_origin(origin)
            .allow_methods(AllowMethods::list([Method::GET, Method::POST, Method::DELETE]))
            // Client libraries bring headers of their own: whatever the page asks for.
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers([
                REQUEST_ID,
                header::RETRY_AFTER,
                HeaderName::from_static("traceparent"),
            ]),
    )
}
