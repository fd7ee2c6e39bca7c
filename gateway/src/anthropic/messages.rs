//! `POST /v1/messages` and `POST /v1/messages/count_tokens`.

use std::sync::Arc;

use axum::extract::{Request as HttpRequest, State};
use axum::response::Response;
use conclave_proto::v1;
use conclave_proto::v1::generate_request::Prompt;
use conclave_proto::v1::tokenize_request::Input;
use serde::Serialize;

use super::answer::{self, BlockOut, Job, Message, Usage};
use super::conversation;
use super::errors;
use super::request::Request;
use super::stream;
use crate::app::App;
use crate::generate::{self, Kind, Single};
use crate::http::context::RequestContext;
use crate::http::error::{ApiError, ApiResult, TooLong};
use crate::http::{numbers::float, receive, reply};

pub(crate) async fn messages(State(app): State<Arc<App>>, request: HttpRequest) -> Response {
    let id = id_of(&request);
    let mut response = answer(app, request)
        .await
        .unwrap_or_else(|error| errors::respond(error, &id));
    errors::tag(&mut response, &id);
    response
}

pub(crate) async fn count_tokens(State(app): State<Arc<App>>, request: HttpRequest) -> Response {
    let id = id_of(&request);
    let mut response = count(&app, request)
        .await
        .unwrap_or_else(|error| errors::respond(error, &id));
    errors::tag(&mut response, &id);
    response
}

fn id_of(request: &HttpRequest) -> String {
    request
        .extensions()
        .get::<RequestContext>()
        .map_or_else(String::new, |context| context.id.clone())
}

async fn answer(app: Arc<App>, request: HttpRequest) -> ApiResult<Response> {
    let (context, mut request) = receive::<Request>(&app, request).await?;
    let limits = app.config.limits.clone();
    let is_stream = request.stream.unwrap_or(false);
    let schema_field = conversation::schema_field(&request);
    let call = translate(&mut request, &context)?;
    let job = Job {
        id: format!("msg_{}", context.id),
        request_id: context.id.clone(),
        stop_sequences: call
            .sampling
            .as_ref()
            .map(|sampling| sampling.stop.clone())
            .unwrap_or_default(),
        hides_thinking: request
            .thinking
            .is_some_and(|thinking| thinking.kind == "disabled"),
    };
    let events = generate::events(app, context, vec![call]);
    if is_stream {
        let events = generate::opened(events, limits.keep_alive_interval)
            .await
            .map_err(|error| speak(error, schema_field))?;
        return Ok(stream::respond(&limits, events, job));
    }
    let answer = generate::single(events, limits.response_bytes)
        .await
        .map_err(|error| speak(error, schema_field))?;
    Ok(reply::json(&limits, &whole(&answer, &job)))
}

pub(super) fn translate(request: &mut Request, context: &RequestContext) -> ApiResult<v1::GenerateRequest> {
    if request.container.is_some() {
        return Err(ApiError::unsupported(
            "container",
            "container is not supported: nothing is executed here",
        ));
    }
    if request
        .mcp_servers
        .as_ref()
        .is_some_and(|servers| !servers.is_empty())
    {
        return Err(ApiError::unsupported(
            "mcp_servers",
            "mcp_servers is not supported: nothing is executed here",
        ));
    }
    let max_tokens = request
        .max_tokens
        .ok_or_else(|| ApiError::field("max_tokens", "max_tokens: missing"))?;
    let sampling = v1::SamplingParams {
        temperature: float("temperature", request.temperature)?,
        top_p: float("top_p", request.top_p)?,
        top_k: request.top_k,
        max_tokens: Some(max_tokens),
        stop: request.stop_sequences.take().unwrap_or_default(),
        ..Default::default()
    };
    Ok(v1::GenerateRequest {
        request_id: context.id.clone(),
        model: request.model.take().unwrap_or_default(),
        sampling: Some(sampling),
        structured: conversation::structured(request)?,
        prompt: Some(Prompt::Chat(conversation::chat(request)?)),
        ..Default::default()
    })
}

/// The router's field names in messages, in this API's words. A request that is too long is told in Anthropic's own
/// words: agents read the numbers in them to shorten the conversation, or to ask for less.
fn speak(mut error: ApiError, schema_field: &str) -> ApiError {
    if let Some(TooLong {
        prompt,
        max_tokens,
        limit,
    }) = error.too_long.as_deref().copied()
    {
        error.message = match max_tokens {
            Some(asked) if prompt < limit => format!(
                "input length and `max_tokens` exceed context limit: {prompt} + {asked} > {limit}, decrease input length or \
                 `max_tokens` and try again"
            ),
            _ => format!("prompt is too long: {prompt} tokens > {limit} maximum"),
        };
        return error;
    }
    error.with_field(|proto| match proto {
        _ if proto.starts_with("structured") => schema_field.to_owned(),
        _ => [
            ("sampling.stop", "stop_sequences"),
            ("sampling.", ""),
            ("chat.", ""),
        ]
        .iter()
        .find_map(|(theirs, ours)| Some(format!("{ours}{}", proto.strip_prefix(theirs)?)))
        .unwrap_or_else(|| proto.to_owned()),
    })
}

fn whole<'a>(answer: &'a Single, job: &'a Job) -> Message<'a> {
    let (stop_reason, stop_sequence) = answer::stop(&answer.finished, &job.stop_sequences);
    let shown = answer
        .blocks
        .iter()
        .filter(|block| !(job.hides_thinking && block.kind == Kind::Reasoning));
    Message {
        id: &job.id,
        kind: "message",
        role: "assistant",
        model: &answer.model,
        content: shown.map(BlockOut::whole).collect(),
        stop_reason: Some(stop_reason),
        stop_sequence,
        usage: Usage::of(&answer.tokens),
    }
}

#[derive(Serialize)]
struct Count {
    input_tokens: usize,
}

async fn count(app: &App, request: HttpRequest) -> ApiResult<Response> {
    let (context, mut request) = receive::<Request>(app, request).await?;
    let call = v1::TokenizeRequest {
        model: request.model.take().unwrap_or_default(),
        input: Some(Input::Chat(conversation::chat(&mut request)?)),
        ..Default::default()
    };
    let answer = app
        .upstream
        .tokenize(call, &context)
        .await
        .map_err(|error| speak(error, conversation::SCHEMA_FIELD))?;
    Ok(reply::json(
        &app.config.limits,
        &Count {
            input_tokens: answer.token_ids.len(),
        },
    ))
}
