//! `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::{Request as HttpRequest, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::answer::{self, StopReason, Usage};
use super::completions_stream;
use super::logprobs::{self, CompletionLogprobs, PromptLogprobs};
use super::request::Request;
use super::sampling::Endpoint;
use super::translate::{Show, translate};
use crate::app::App;
use crate::generate::{self, Answers, Choice, PromptAnswer};
use crate::http::error::ApiResult;
use crate::http::{now_unix, receive, reply};

pub(crate) async fn completions(State(app): State<Arc<App>>, request: HttpRequest) -> Response {
    answer(app, request)
        .await
        .unwrap_or_else(IntoResponse::into_response)
}

async fn answer(app: Arc<App>, request: HttpRequest) -> ApiResult<Response> {
    let (context, request) = receive::<Request>(&app, request).await?;
    let limits = app.config.limits.clone();
    let job = translate(request, Endpoint::Completions, &context, &limits)?;
    let id = format!("cmpl-{}", context.id);
    let prompts = job.calls.len();
    let events = generate::events(app, context, job.calls);
    let words = job.words;
    if let Some(options) = job.stream {
        let events = generate::opened(events, limits.keep_alive_interval)
            .await
            .map_err(|error| words.speak(error))?;
        let shape = completions_stream::Shape {
            prompts,
            choices: job.generated,
            options,
            show: job.show,
        };
        return Ok(completions_stream::respond(&limits, events, id, shape));
    }
    let mut answers = generate::collect(events, prompts, job.generated, limits.response_bytes)
        .await
        .map_err(|error| words.speak(error))?;
    if job.wanted < job.generated {
        for prompt in &mut answers.prompts {
            keep_best(prompt, job.wanted as usize);
        }
    }
    if job.show.echo && job.show.logprobs {
        for prompt in &mut answers.prompts {
            let choice = &prompt.choices[0];
            logprobs::name_first(
                &mut prompt.logprobs,
                &prompt.token_ids,
                &choice.logprobs,
                &choice.text,
            );
        }
    }
    whole(&answers, &id, job.wanted as usize, job.show).map(|completion| reply::json(&limits, &completion))
}

/// Puts the likeliest choices first and drops the others. Equal ones keep their order.
fn keep_best(prompt: &mut PromptAnswer, wanted: usize) {
    prompt.choices.sort_by(|a, b| b.score().total_cmp(&a.score()));
    prompt.choices.truncate(wanted);
}

#[derive(Serialize)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<CompletionChoice<'a>>,
    service_tier: Option<()>,
    system_fingerprint: Option<()>,
    usage: Usage,
}

#[derive(Serialize)]
struct CompletionChoice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<CompletionLogprobs<'a>>,
    finish_reason: &'static str,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
}

fn whole<'a>(answers: &'a Answers, id: &'a str, wanted: usize, show: Show) -> ApiResult<Completion<'a>> {
    let mut choices = Vec::with_capacity(answers.prompts.len() * wanted);
    for (at, prompt) in answers.prompts.iter().enumerate() {
        for (index, choice) in prompt.choices.iter().enumerate() {
            choices.push(one_choice(at * wanted + index, prompt, choice, show)?);
        }
    }
    Ok(Completion {
        id,
        object: "text_completion",
        created: now_unix(),
        model: &answers.model,
        choices,
        service_tier: None,
        system_fingerprint: None,
        usage: Usage::of(&answers.tokens),
    })
}

fn one_choice<'a>(
    index: usize,
    prompt: &'a PromptAnswer,
    choice: &'a Choice,
    show: Show,
) -> ApiResult<CompletionChoice<'a>> {
    let finished = choice
        .finished
        .as_ref()
        .ok_or_else(|| generate::unfinished(index))?;
    let echoed = if show.echo {
        prompt.logprobs.as_slice()
    } else {
        &[]
    };
    let entries = echoed.iter().chain(&choice.logprobs);
    Ok(CompletionChoice {
        index,
        text: &choice.text,
        logprobs: show
            .logprobs
            .then(|| logprobs::completion(entries, show.tokens_as_ids)),
        finish_reason: answer::finish_reason(finished)?,
        stop_reason: answer::stop_reason(finished, show),
        prompt_logprobs: show.prompt_logprobs.then_some(PromptLogprobs(&prompt.logprobs)),
        prompt_token_ids: show.token_ids.then_some(&prompt.token_ids),
        token_ids: show.token_ids.then_some(&choice.token_ids),
    })
}
