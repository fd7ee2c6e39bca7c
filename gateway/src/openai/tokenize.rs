//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.

use std::sync::Arc;

use axum::extract::{Request as HttpRequest, State};
use axum::response::{IntoResponse, Response};
use conclave_proto::v1;
use conclave_proto::v1::tokenize_request::Input;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::conversation::{self, Conversation};
use super::message::Message;
use super::tools::ToolIn;
use super::words::Words;
use crate::app::App;
use crate::http::error::{ApiError, ApiResult};
use crate::http::{receive, reply};

#[derive(Deserialize)]
struct TokenizeIn {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    tools: Option<Vec<ToolIn>>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    chat_template_kwargs: Option<Box<RawValue>>,
    add_special_tokens: Option<bool>,
    return_token_strs: Option<bool>,
}

#[derive(Serialize)]
struct TokenizeOut<'a> {
    count: usize,
    max_model_len: u32,
    tokens: &'a [u32],
    token_strs: Option<&'a [String]>,
}

pub(crate) async fn tokenize(State(app): State<Arc<App>>, request: HttpRequest) -> Response {
    tokens(&app, request)
        .await
        .unwrap_or_else(IntoResponse::into_response)
}

async fn tokens(app: &App, request: HttpRequest) -> ApiResult<Response> {
    let (context, request) = receive::<TokenizeIn>(app, request).await?;
    let input = match (request.prompt, request.messages) {
        (Some(text), None) => Input::Text(text),
        (None, Some(messages)) => Input::Chat(conversation::chat(Conversation {
            messages: Some(messages),
            tools: request.tools,
            add_generation_prompt: request.add_generation_prompt,
            continue_final_message: request.continue_final_message,
            chat_template_kwargs: request.chat_template_kwargs,
            ..Conversation::default()
        })?),
        (Some(_), Some(_)) => {
            return Err(ApiError::field("messages", "messages: cannot go with prompt").code("invalid_value"));
        }
        (None, None) => {
            return Err(ApiError::field("prompt", "prompt: missing (or messages)").code("invalid_value"));
        }
    };
    let with_strs = request.return_token_strs.unwrap_or(false);
    let call = v1::TokenizeRequest {
        model: request.model.unwrap_or_default(),
        add_special_tokens: request.add_special_tokens,
        return_token_strs: with_strs,
        input: Some(input),
    };
    let answer = app
        .upstream
        .tokenize(call, &context)
        .await
        .map_err(|error| Words::default().speak(error))?;
    let out = TokenizeOut {
        count: answer.token_ids.len(),
        max_model_len: answer.max_model_len,
        tokens: &answer.token_ids,
        token_strs: with_strs.then_some(&answer.token_strs),
    };
    Ok(reply::json(&app.config.limits, &out))
}

#[derive(Deserialize)]
struct DetokenizeIn {
    model: Option<String>,
    tokens: Vec<u32>,
}

#[derive(Serialize)]
struct DetokenizeOut<'a> {
    prompt: &'a str,
}

pub(crate) async fn detokenize(State(app): State<Arc<App>>, request: HttpRequest) -> Response {
    text(&app, request)
        .await
        .unwrap_or_else(IntoResponse::into_response)
}

async fn text(app: &App, request: HttpRequest) -> ApiResult<Response> {
    let (context, request) = receive::<DetokenizeIn>(app, request).await?;
    let call = v1::DetokenizeRequest {
        model: request.model.unwrap_or_default(),
        token_ids: request.tokens,
    };
    let answer = app
        .upstream
        .detokenize(call, &context)
        .await
        .map_err(|error| error.with_field(|proto| proto.replace("token_ids", "tokens")))?;
    Ok(reply::json(
        &app.config.limits,
        &DetokenizeOut { prompt: &answer.text },
    ))
}
