//! What operators and probes ask: health, readiness, version, metrics.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

use crate::app::App;
use crate::http::reply;
use crate::metrics_merge;
use crate::upstream::State as RouterState;

#[derive(Serialize)]
struct Health {
    status: &'static str,
    routers: Vec<RouterHealth>,
}

#[derive(Serialize)]
struct RouterHealth {
    state: String,
    workers: u32,
    running: u32,
    waiting: u32,
    epoch: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    detail: String,
}

/// 200 while some router serves or waits for its workers to return (requests then queue, they do not fail).
pub(crate) async fn health(State(app): State<Arc<App>>) -> Response {
    answer(&app, |state| {
        matches!(state, RouterState::Serving | RouterState::Parked)
    })
    .await
}

/// 200 while requests would be served at once, and this gateway is not draining.
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Response {
    let draining = *app.draining.borrow();
    answer(&app, |state| !draining && state == RouterState::Serving).await
}

async fn answer(app: &App, good: impl Fn(RouterState) -> bool) -> Response {
    let mut is_good = false;
    let mut routers = Vec::new();
    for (_, health) in app.upstream.health().await {
        routers.push(match health {
            Ok(health) => {
                is_good |= good(health.state());
                RouterHealth {
                    state: state_name(health.state()).to_owned(),
                    workers: health.workers,
                    running: health.running,
                    waiting: health.waiting,
                    epoch: health.epoch,
                    detail: health.detail,
                }
            }
            Err(detail) => RouterHealth {
                state: String::from("unreachable"),
                workers: 0,
                running: 0,
                waiting: 0,
                epoch: 0,
                detail,
            },
        });
    }
    let status = if is_good { "ok" } else { "unavailable" };
    let mut response = reply::json(&app.config.limits, &Health { status, routers });
    if !is_good {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

fn state_name(state: RouterState) -> &'static str {
    match state {
        RouterState::Unspecified => "unknown",
        RouterState::Starting => "starting",
        RouterState::Serving => "serving",
        RouterState::Parked => "parked",
        RouterState::Draining => "draining",
    }
}

#[derive(Serialize)]
struct Version {
    version: &'static str,
}

pub(crate) async fn version(State(app): State<Arc<App>>) -> Response {
    reply::json(
        &app.config.limits,
        &Version {
            version: env!("CARGO_PKG_VERSION"),
        },
    )
}

/// The routers' figures and this gateway's, in Prometheus' text format.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let mut text = metrics_merge::merge(&app.upstream.metrics_texts().await);
    text.push_str(&app.metrics.encode());
    let headers = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (headers, text).into_response()
}
