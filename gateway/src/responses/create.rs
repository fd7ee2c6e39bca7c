//! `POST /v1/responses`.

use std::sync::Arc;

use axum::extract::{Request as HttpRequest, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use conclave_proto::v1;
use conclave_proto::v1::generate_request::Prompt;
use http::StatusCode;

use super::conversation;
use super::echo::Echo;
use super::keep::Keep;
use super::object::Frame;
use super::request::Request;
use super::store::{TURNS_MAX, Turn};
use super::tools::Offered;
use super::{references, stream, tools};
use crate::app::App;
use crate::generate;
use crate::http::auth::Caller;
use crate::http::context::{RequestContext, random_id};
use crate::http::error::{ApiError, ApiResult};
use crate::http::{json, now_unix, numbers, receive, reply};

/// What clients ask to `include` for reasoning that they carry themselves.
const SEALED_REASONING: &str = "reasoning.encrypted_content";

pub(crate) async fn create(State(app): State<Arc<App>>, request: HttpRequest) -> Response {
    answer(app, request)
        .await
        .unwrap_or_else(IntoResponse::into_response)
}

async fn answer(app: Arc<App>, request: HttpRequest) -> ApiResult<Response> {
    let (context, mut request) = receive::<Request>(&app, request).await?;
    let limits = app.config.limits.clone();
    let is_stream = request.stream.unwrap_or(false);
    let earlier = match &request.previous_response_id {
        None => None,
        Some(id) => Some(earlier(&app, id, context.caller)?),
    };
    if let Some(input) = &mut request.input {
        references::resolve(input, &app.responses, context.caller, limits.body_bytes)?;
    }
    let offered = Offered::of(request.tools.as_deref().unwrap_or_default());
    let (input, call) = prepare(&mut request, &context, earlier.as_deref())?;
    let place = request
        .store
        .unwrap_or(true)
        .then(|| (app.clone(), context.caller));
    let keep = Keep {
        place,
        earlier,
        input,
    };
    // Drawn here, whatever X-Request-Id says: under a client's own id one could replace what another has stored.
    let bare_id = random_id();
    let frame = Frame {
        id: format!("resp_{bare_id}"),
        bare_id,
        created_at: now_unix(),
        seals: request
            .include
            .as_ref()
            .is_some_and(|asked| asked.iter().any(|word| word == SEALED_REASONING)),
        offered,
        echo: Echo::of(request),
    };
    let events = generate::events(app, context, vec![call]);
    if is_stream {
        let events = generate::opened(events, limits.keep_alive_interval)
            .await
            .map_err(|error| speak(error, &frame.offered))?;
        return Ok(stream::respond(&limits, events, frame, keep));
    }
    let done = generate::single(events, limits.response_bytes)
        .await
        .map_err(|error| speak(error, &frame.offered))?;
    let response = frame.ended(&done.model, &done.blocks, &done.finished, &done.tokens);
    let body = Bytes::from(serde_json::to_vec(&response).map_err(|error| {
        ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("could not write the response: {error}"),
        )
    })?);
    keep.store(&frame.id, &done.blocks, body.clone());
    Ok(reply::bytes_as(&limits, body, "application/json"))
}

fn earlier(app: &App, id: &str, caller: Caller) -> ApiResult<Arc<Turn>> {
    let param = "previous_response_id";
    let turn = app.responses.turn(id, caller).ok_or_else(|| {
        let message = format!("{param}: {id:?} is not known here: send the conversation as input");
        ApiError::field(param, message).code("previous_response_not_found")
    })?;
    if turn.turns() >= TURNS_MAX {
        let message =
            format!("{param}: {TURNS_MAX} turns are as many as are kept: send the conversation as input");
        return Err(ApiError::field(param, message).code("invalid_value"));
    }
    Ok(turn)
}

/// The request's own messages, and the call that answers it.
pub(super) fn prepare(
    request: &mut Request,
    context: &RequestContext,
    earlier: Option<&Turn>,
) -> ApiResult<(Vec<v1::ChatMessage>, v1::GenerateRequest)> {
    refuse(request)?;
    let missing = || ApiError::field("input", "input: missing").code("invalid_value");
    let input = conversation::messages(request.input.take().ok_or_else(missing)?)?;
    let call = translate(request, context, earlier, &input)?;
    Ok((input, call))
}

fn translate(
    request: &mut Request,
    context: &RequestContext,
    earlier: Option<&Turn>,
    input: &[v1::ChatMessage],
) -> ApiResult<v1::GenerateRequest> {
    let instructions = request.instructions.clone().map(conversation::system);
    let before = earlier.map(Turn::conversation).unwrap_or_default();
    let messages: Vec<_> = instructions
        .into_iter()
        .chain(before)
        .chain(input.iter().cloned())
        .collect();
    if messages.is_empty() {
        return Err(ApiError::field("input", "input: at least one item is needed").code("invalid_value"));
    }
    let tools = tools::tools(request.tools.as_deref().unwrap_or_default())?;
    if let Some(offered) = &mut request.tools {
        tools::leave_out_hosted(offered);
    }
    let tool_choice = match &request.tool_choice {
        None => None,
        Some(choice) => Some(tools::choice(choice, tools.is_empty())?),
    };
    if let Some(metadata) = &request.metadata {
        json::check_object(metadata, "metadata")?;
    }
    let effort = request
        .reasoning
        .as_ref()
        .and_then(|reasoning| reasoning.effort.as_ref());
    let template_kwargs_json = match effort.map(serde_json::to_string) {
        Some(Ok(effort)) => format!("{{\"reasoning_effort\":{effort}}}"),
        _ => String::new(),
    };
    let structured = match request.text.as_ref().and_then(|text| text.format.as_ref()) {
        None => None,
        Some(format) => conversation::structured(format)?,
    };
    Ok(v1::GenerateRequest {
        request_id: context.id.clone(),
        model: request.model.take().unwrap_or_default(),
        prompt: Some(Prompt::Chat(v1::Chat {
            messages,
            tools,
            tool_choice,
            template_kwargs_json,
            parallel_tool_calls: request.parallel_tool_calls,
            ..Default::default()
        })),
        sampling: Some(v1::SamplingParams {
            temperature: numbers::float("temperature", request.temperature)?,
            top_p: numbers::float("top_p", request.top_p)?,
            max_tokens: request.max_output_tokens,
            ..Default::default()
        }),
        priority: numbers::priority(request.priority)?,
        cache_salt: request.cache_salt.take().unwrap_or_default(),
        structured,
        ..Default::default()
    })
}

fn refuse(request: &Request) -> ApiResult<()> {
    ApiError::unserved([
        (
            "background",
            request.background == Some(true),
            "read the response's stream",
        ),
        (
            "conversation",
            request.conversation.is_some(),
            "send previous_response_id",
        ),
        ("prompt", request.prompt.is_some(), "send instructions and input"),
        (
            "top_logprobs",
            request.top_logprobs.is_some_and(|count| count != 0),
            "/v1/chat/completions has it",
        ),
        (
            "truncation",
            request
                .truncation
                .as_deref()
                .is_some_and(|word| word != "disabled"),
            "a conversation that is too long is refused",
        ),
        (
            "max_tool_calls",
            request.max_tool_calls.is_some(),
            "it is about tools that the server runs",
        ),
    ])
}

/// The router's field names in this API's words.
fn speak(error: ApiError, offered: &Offered) -> ApiError {
    error.with_field(|proto| {
        let bare = ["sampling.", "chat."]
            .iter()
            .find_map(|prefix| proto.strip_prefix(prefix))
            .unwrap_or(proto);
        match bare {
            "max_tokens" => "max_output_tokens".to_owned(),
            "prompt" => "input".to_owned(),
            _ if bare.starts_with("messages") => "input".to_owned(),
            _ if bare.starts_with("structured") => "text.format".to_owned(),
            other => offered.grammar_field(other).unwrap_or(other.to_owned()),
        }
    })
}
