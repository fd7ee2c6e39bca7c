//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use conclave_proto::v1;
use http::StatusCode;
use serde::Serialize;

use crate::http::error::{ApiError, ApiResult};
use crate::http::reply;
use crate::server::App;

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Model<'a>>,
}

#[derive(Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: i64,
    owned_by: &'static str,
    /// The canonical name of what `id` names.
    root: &'a str,
    parent: Option<()>,
    max_model_len: u32,
}

/// Every served name once, in the routers' order.
fn list(infos: &[v1::ModelInfoResponse]) -> Vec<Model<'_>> {
    let mut models: Vec<Model<'_>> = Vec::new();
    for info in infos {
        for name in &info.names {
            if models.iter().all(|model| model.id != name) {
                models.push(Model {
                    id: name,
                    object: "model",
                    created: info.created,
                    owned_by: "conclave",
                    root: info.names.first().map_or("", String::as_str),
                    parent: None,
                    max_model_len: info.max_model_len,
                });
            }
        }
    }
    models
}

pub(crate) async fn models(State(app): State<Arc<App>>) -> Response {
    match app.upstream.models().await {
        Ok(infos) => reply::json(
            &app.config.limits,
            &List {
                object: "list",
                data: list(&infos),
            },
        ),
        Err(error) => error.into_response(),
    }
}

pub(crate) async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
    one(&app, &id).await.unwrap_or_else(IntoResponse::into_response)
}

async fn one(app: &App, id: &str) -> ApiResult<Response> {
    let infos = app.upstream.models().await?;
    let model = list(&infos)
        .into_iter()
        .find(|model| model.id == id)
        .ok_or_else(|| {
            let message = format!("the model {id:?} does not exist");
            ApiError {
                param: Some(String::from("model")),
                ..ApiError::new(StatusCode::NOT_FOUND, message)
            }
            .code("model_not_found")
        })?;
    Ok(reply::json(&app.config.limits, &model))
}
