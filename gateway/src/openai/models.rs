//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use conclave_proto::v1;
use http::{HeaderMap, StatusCode};
use serde::Serialize;

use crate::app::App;
use crate::http::error::{ApiError, ApiResult};
use crate::http::reply;

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

/// The same list as Anthropic's clients know it.
#[derive(Serialize)]
struct AnthropicList<'a> {
    data: Vec<AnthropicModel<'a>>,
    first_id: Option<&'a str>,
    last_id: Option<&'a str>,
    has_more: bool,
}

#[derive(Serialize)]
struct AnthropicModel<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: &'a str,
    display_name: &'a str,
    created_at: String,
    max_input_tokens: u32,
}

fn anthropic(model: Model<'_>) -> AnthropicModel<'_> {
    AnthropicModel {
        kind: "model",
        id: model.id,
        display_name: model.id,
        created_at: rfc3339(model.created),
        max_input_tokens: model.max_model_len,
    }
}

/// Whether the client is one of Anthropic's: all of them name their API's version.
fn is_anthropic(headers: &HeaderMap) -> bool {
    headers.contains_key("anthropic-version")
}

/// Unix seconds as `2026-01-02T03:04:05Z`.
fn rfc3339(unix: i64) -> String {
    let (days, second) = (unix.div_euclid(86_400), unix.rem_euclid(86_400));
    // Days since 1 March 0000, in eras of 400 years.
    let day = days + 719_468;
    let (era, day) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let (day, month) = (
        day_of_year - (153 * month + 2) / 5 + 1,
        if month < 10 { month + 3 } else { month - 9 },
    );
    let year = year + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

pub(crate) async fn models(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    match app.upstream.models().await {
        Ok(infos) if is_anthropic(&headers) => {
            let data: Vec<_> = list(&infos).into_iter().map(anthropic).collect();
            let (first_id, last_id) = (
                data.first().map(|model| model.id),
                data.last().map(|model| model.id),
            );
            reply::json(
                &app.config.limits,
                &AnthropicList {
                    first_id,
                    last_id,
                    data,
                    has_more: false,
                },
            )
        }
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

pub(crate) async fn model(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Response {
    one(&app, &headers, &id)
        .await
        .unwrap_or_else(IntoResponse::into_response)
}

async fn one(app: &App, headers: &HeaderMap, id: &str) -> ApiResult<Response> {
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
    if is_anthropic(headers) {
        return Ok(reply::json(&app.config.limits, &anthropic(model)));
    }
    Ok(reply::json(&app.config.limits, &model))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_rfc_3339() {
        for (unix, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_700_000_000, "2023-11-14T22:13:20Z"),
            (-1, "1969-12-31T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(unix), expected);
        }
    }
}
