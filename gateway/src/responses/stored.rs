//! `GET` and `DELETE /v1/responses/{id}`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Serialize;

use crate::app::App;
use crate::http::context::RequestContext;
use crate::http::error::ApiError;
use crate::http::reply;

pub(super) fn not_found(id: &str) -> ApiError {
    let message =
        format!("the response {id:?} is not known here: it was never stored, or has made room for others");
    ApiError::new(StatusCode::NOT_FOUND, message).code("response_not_found")
}

pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(context): Extension<RequestContext>,
    Path(id): Path<String>,
) -> Response {
    match app.responses.json(&id, context.caller) {
        Some(json) => reply::bytes_as(&app.config.limits, json, "application/json"),
        None => not_found(&id).into_response(),
    }
}

#[derive(Serialize)]
struct Deleted<'a> {
    id: &'a str,
    object: &'static str,
    deleted: bool,
}

pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Extension(context): Extension<RequestContext>,
    Path(id): Path<String>,
) -> Response {
    if app.responses.remove(&id, context.caller) {
        return reply::json(
            &app.config.limits,
            &Deleted {
                id: &id,
                object: "response",
                deleted: true,
            },
        );
    }
    not_found(&id).into_response()
}
