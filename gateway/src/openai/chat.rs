//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::{Request as HttpRequest, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::answer::{self, Function, StopReason, ToolCall, Usage};
use super::chat_stream;
use super::logprobs::{self, ChatLogprobs, PromptLogprobs};
use super::request::Request;
use super::sampling::Endpoint;
use super::translate::{Show, translate};
use crate::app::App;
use crate::generate::{self, Answers, Choice};
use crate::http::error::ApiResult;
use crate::http::{now_unix, receive, reply};

pub(crate) async fn chat(State(app): State<Arc<App>>, request: HttpRequest) -> Response {
    answer(app, request)
        .await
        .unwrap_or_else(IntoResponse::into_response)
}

async fn answer(app: Arc<App>, request: HttpRequest) -> ApiResult<Response> {
    let (context, request) = receive::<Request>(&app, request).await?;
    let limits = app.config.limits.clone();
    let job = translate(request, Endpoint::Chat, &context, &limits)?;
    let id = format!("chatcmpl-{}", context.id);
    let events = generate::events(app, context, job.calls);
    let words = job.words;
    if let Some(options) = job.stream {
        let events = generate::opened(events, limits.keep_alive_interval)
            .await
            .map_err(|error| words.speak(error))?;
        return Ok(chat_stream::respond(
            &limits,
            events,
            id,
            options,
            job.show,
            job.generated,
        ));
    }
    let answers = generate::collect(events, 1, job.generated, limits.response_bytes)
        .await
        .map_err(|error| words.speak(error))?;
    whole(&answers, &id, job.show).map(|completion| reply::json(&limits, &completion))
}

#[derive(Serialize)]
struct ChatCompletion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<ChatChoice<'a>>,
    service_tier: Option<()>,
    system_fingerprint: Option<()>,
    usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: usize,
    message: Message<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: &'static str,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: Option<&'a str>,
    refusal: Option<()>,
    // Two names for one thing: the older vLLM's and DeepSeek's, and the newer vLLM's.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall<'a>>,
}

fn whole<'a>(answers: &'a Answers, id: &'a str, show: Show) -> ApiResult<ChatCompletion<'a>> {
    let prompt = &answers.prompts[0];
    let choices = prompt
        .choices
        .iter()
        .enumerate()
        .map(|(index, choice)| one_choice(index, choice, show))
        .collect::<ApiResult<_>>()?;
    Ok(ChatCompletion {
        id,
        object: "chat.completion",
        created: now_unix(),
        model: &answers.model,
        choices,
        service_tier: None,
        system_fingerprint: None,
        usage: Usage::of(&answers.tokens),
        prompt_logprobs: show.prompt_logprobs.then_some(PromptLogprobs(&prompt.logprobs)),
        prompt_token_ids: show.token_ids.then_some(&prompt.token_ids),
    })
}

fn one_choice(index: usize, choice: &Choice, show: Show) -> ApiResult<ChatChoice<'_>> {
    let finished = choice
        .finished
        .as_ref()
        .ok_or_else(|| generate::unfinished(index))?;
    let has_reasoning = !choice.reasoning.is_empty() && !show.hides_reasoning;
    let reasoning = has_reasoning.then_some(choice.reasoning.as_str());
    let is_text = !choice.text.is_empty() || (reasoning.is_none() && choice.tool_calls.is_empty());
    let tool_calls = choice.tool_calls.iter().map(|call| ToolCall {
        id: &call.id,
        kind: "function",
        function: Function {
            name: &call.name,
            arguments: &call.arguments_json,
        },
    });
    Ok(ChatChoice {
        index,
        message: Message {
            role: "assistant",
            content: is_text.then_some(&choice.text),
            refusal: None,
            reasoning_content: reasoning,
            reasoning,
            tool_calls: tool_calls.collect(),
        },
        logprobs: show
            .logprobs
            .then(|| logprobs::chat(&choice.logprobs, show.tokens_as_ids)),
        finish_reason: answer::finish_reason(finished)?,
        stop_reason: answer::stop_reason(finished, show),
        token_ids: show.token_ids.then_some(&choice.token_ids),
    })
}
