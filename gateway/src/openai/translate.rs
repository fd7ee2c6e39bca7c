//! A whole request into `v1::GenerateRequest`s, one per prompt.

use conclave_proto::v1;
use conclave_proto::v1::generate_request::Prompt as ProtoPrompt;
use prost::Message as _;

use super::conversation::{self, Conversation};
use super::prompt::OnePrompt;
use super::request::{Request, StreamOptions};
use super::sampling::{self, Endpoint};
use super::structured::structured;
use super::unserved::refuse;
use super::words::Words;
use crate::config::Limits;
use crate::http::context::RequestContext;
use crate::http::error::{ApiError, ApiResult};
use crate::http::numbers;

/// Options of all calls of one request together, when it has several prompts.
const OPTIONS_BYTES_MAX: usize = 16 << 20;

/// What an endpoint needs to know to make the calls and to write the answer.
pub(super) struct Translated {
    /// One per prompt, the same but for prompt and id.
    pub(super) calls: Vec<v1::GenerateRequest>,
    /// Choices that each call generates.
    pub(super) generated: u32,
    /// Choices that the client gets of each call: fewer with `best_of`.
    pub(super) wanted: u32,
    pub(super) stream: Option<StreamOptions>,
    pub(super) show: Show,
    /// How the client spells what the proto calls something else.
    pub(super) words: Words,
}

/// Which optional parts an answer has.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Show {
    pub(super) logprobs: bool,
    pub(super) prompt_logprobs: bool,
    pub(super) echo: bool,
    pub(super) token_ids: bool,
    /// What the model thought is left out.
    pub(super) hides_reasoning: bool,
    /// Tokens of log-probabilities as `token_id:N` instead of text.
    pub(super) tokens_as_ids: bool,
    /// A stop string is a number: as the reason of a stop it stays text.
    pub(super) numbers_stop: bool,
}

pub(super) fn translate(
    mut request: Request,
    endpoint: Endpoint,
    context: &RequestContext,
    limits: &Limits,
) -> ApiResult<Translated> {
    refuse(&request, endpoint)?;
    let stream = stream_options(&request)?;
    let wanted = sampling::choices("n", request.n)?;
    let generated = sampling::choices("best_of", request.best_of.or(request.n))?;
    if generated < wanted {
        let message = format!("best_of: {generated} is less than n ({wanted})");
        return Err(ApiError::field("best_of", message).code("invalid_value"));
    }
    if generated > wanted && stream.is_some() {
        return Err(ApiError::unsupported("best_of", "best_of: cannot be streamed"));
    }
    let words = Words {
        logprobs: if endpoint == Endpoint::Chat {
            "top_logprobs"
        } else {
            "logprobs"
        },
        max_tokens: if request.max_completion_tokens.is_some() {
            "max_completion_tokens"
        } else {
            "max_tokens"
        },
        prompt: if endpoint == Endpoint::Chat {
            "messages"
        } else {
            "prompt"
        },
        ..Words::default()
    };
    let constraint = structured(&mut request)?;
    let words = Words {
        structured: constraint.as_ref().map_or(words.structured, |(param, _)| *param),
        ..words
    };
    let mut output = sampling::output(&request, endpoint)?;
    let show = Show {
        logprobs: output.logprobs.is_some(),
        prompt_logprobs: request.prompt_logprobs.is_some(),
        echo: output.echo,
        token_ids: request.return_token_ids.unwrap_or(false),
        hides_reasoning: request.include_reasoning == Some(false),
        tokens_as_ids: request.return_tokens_as_token_ids.unwrap_or(false),
        numbers_stop: request
            .stop
            .as_ref()
            .is_some_and(|stop| stop.0.iter().any(|text| text.parse::<u32>().is_ok())),
    };
    if generated > wanted && output.logprobs.is_none() {
        // The best ones are found by their tokens' log-probabilities.
        output.logprobs = Some(0);
    }
    let template = v1::GenerateRequest {
        request_id: context.id.clone(),
        model: request.model.take().unwrap_or_default(),
        prompt: None,
        sampling: Some(sampling::sampling(&mut request, endpoint)?),
        n: generated,
        output: Some(output),
        priority: numbers::priority(request.priority)?,
        cache_salt: request.cache_salt.take().unwrap_or_default(),
        truncate_prompt_tokens: request.truncate_prompt_tokens,
        add_special_tokens: request.add_special_tokens,
        structured: constraint.map(|(_, structured)| structured),
    };
    let calls = match endpoint {
        Endpoint::Chat => {
            let chat = conversation::chat(Conversation::of(&mut request))?;
            vec![v1::GenerateRequest {
                prompt: Some(ProtoPrompt::Chat(chat)),
                ..template
            }]
        }
        Endpoint::Completions => per_prompt(&mut request, &template, limits)?,
    };
    Ok(Translated {
        calls,
        generated,
        wanted,
        stream,
        show,
        words,
    })
}

fn per_prompt(
    request: &mut Request,
    template: &v1::GenerateRequest,
    limits: &Limits,
) -> ApiResult<Vec<v1::GenerateRequest>> {
    let missing = || ApiError::field("prompt", "prompt: missing").code("invalid_value");
    let prompts = request.prompt.take().ok_or_else(missing)?.0;
    if prompts.len() > limits.prompts_per_request {
        let most = limits.prompts_per_request;
        let message = format!("prompt: {} prompts in one request, at most {most}", prompts.len());
        return Err(ApiError::field("prompt", message).code("invalid_value"));
    }
    let single = prompts.len() == 1;
    // Each call carries all options: a large `stop` must not be multiplied by many prompts.
    if !single && prompts.len().saturating_mul(template.encoded_len()) > OPTIONS_BYTES_MAX {
        let message = format!(
            "prompt: {} prompts with options this large: send fewer at a time",
            prompts.len()
        );
        return Err(ApiError::field("prompt", message).code("invalid_value"));
    }
    let call = |(at, prompt)| {
        let request_id = &template.request_id;
        v1::GenerateRequest {
            request_id: if single {
                request_id.clone()
            } else {
                format!("{request_id}-{at}")
            },
            prompt: Some(match prompt {
                OnePrompt::Text(text) => ProtoPrompt::Text(text),
                OnePrompt::Ids(ids) => ProtoPrompt::TokenIds(v1::TokenIds { ids }),
            }),
            ..template.clone()
        }
    };
    Ok(prompts.into_iter().enumerate().map(call).collect())
}

fn stream_options(request: &Request) -> ApiResult<Option<StreamOptions>> {
    match (request.stream.unwrap_or(false), request.stream_options) {
        (true, options) => Ok(Some(options.unwrap_or_default())),
        (false, None) => Ok(None),
        (false, Some(_)) => {
            let message = "stream_options: only allowed when stream is true";
            Err(ApiError::field("stream_options", message).code("invalid_value"))
        }
    }
}
