//! Sampling and output options into the proto. Ranges are the router's matter; what is checked here is what
//! the proto's types could not carry.

use std::collections::HashMap;

use conclave_proto::v1;

use super::request::{Logprobs, MaxTokens, Request};
use crate::http::error::{ApiError, ApiResult};
use crate::http::numbers::{float, out_of_range};

/// Choices of one prompt, as the proto bounds them.
const CHOICES_MAX: u32 = 128;

/// OpenAI's bound for `top_logprobs`, and the proto's.
const TOP_LOGPROBS_MAX: i64 = 20;
/// `max_tokens` of a completion that does not say, in OpenAI's API.
const COMPLETION_MAX_TOKENS: i64 = 16;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Endpoint {
    Chat,
    Completions,
}

pub(super) fn sampling(request: &mut Request, endpoint: Endpoint) -> ApiResult<v1::SamplingParams> {
    let max_tokens = match (request.max_completion_tokens, request.max_tokens) {
        (Some(count), _) | (None, MaxTokens::Given(count)) => Some(count),
        (None, MaxTokens::Absent) if endpoint == Endpoint::Completions => Some(COMPLETION_MAX_TOKENS),
        (None, _) => None,
    };
    let mut logit_bias = HashMap::new();
    for (token, bias) in request.logit_bias.take().unwrap_or_default() {
        let id = token.parse::<u32>().map_err(|_| {
            ApiError::field(
                "logit_bias",
                format!("logit_bias: key {token:?} is not a token id"),
            )
            .code("invalid_value")
        })?;
        let bias = float("logit_bias", Some(bias))?.unwrap_or_default();
        logit_bias.insert(id, bias);
    }
    Ok(v1::SamplingParams {
        temperature: float("temperature", request.temperature)?,
        top_p: float("top_p", request.top_p)?,
        top_k: request.top_k,
        min_p: float("min_p", request.min_p)?,
        repetition_penalty: float("repetition_penalty", request.repetition_penalty)?,
        presence_penalty: float("presence_penalty", request.presence_penalty)?,
        frequency_penalty: float("frequency_penalty", request.frequency_penalty)?,
        logit_bias,
        seed: request.seed.map(|seed| seed.0),
        max_tokens,
        min_tokens: request.min_tokens.unwrap_or(0),
        stop: request.stop.take().unwrap_or_default().0,
        stop_token_ids: request.stop_token_ids.take().unwrap_or_default(),
        ignore_eos: request.ignore_eos.unwrap_or(false),
        bad_words: request.bad_words.take().unwrap_or_default(),
    })
}

pub(super) fn output(request: &Request, endpoint: Endpoint) -> ApiResult<v1::OutputOptions> {
    let logprobs = match (endpoint, request.logprobs) {
        (Endpoint::Chat, None | Some(Logprobs::Flag(false))) => {
            if request.top_logprobs.is_some_and(|count| count != 0) {
                let message = "top_logprobs: set logprobs to true as well";
                return Err(ApiError::field("top_logprobs", message).code("invalid_value"));
            }
            None
        }
        (Endpoint::Chat, Some(Logprobs::Flag(true))) => {
            Some(count("top_logprobs", request.top_logprobs.unwrap_or(0))?)
        }
        (Endpoint::Chat, Some(Logprobs::Count(_))) => {
            return Err(ApiError::field("logprobs", "logprobs: expected a boolean").code("invalid_value"));
        }
        (Endpoint::Completions, None) => None,
        (Endpoint::Completions, Some(Logprobs::Count(value))) => Some(count("logprobs", value)?),
        (Endpoint::Completions, Some(Logprobs::Flag(_))) => {
            let message = "logprobs: expected a number from 0 to 20";
            return Err(ApiError::field("logprobs", message).code("invalid_value"));
        }
    };
    let echo = request.echo.unwrap_or(false);
    let prompt_logprobs = match request.prompt_logprobs {
        Some(value) => Some(count("prompt_logprobs", value)?),
        // A completion that echoes its prompt gives the prompt's log-probabilities with its own.
        None if echo && endpoint == Endpoint::Completions => logprobs,
        None => None,
    };
    Ok(v1::OutputOptions {
        logprobs,
        prompt_logprobs,
        echo,
        skip_special_tokens: request.skip_special_tokens,
        include_stop_str_in_output: request.include_stop_str_in_output.unwrap_or(false),
        skip_detokenize: request.detokenize == Some(false),
    })
}

fn count(param: &str, value: i64) -> ApiResult<u32> {
    u32::try_from(value)
        .ok()
        .filter(|_| value <= TOP_LOGPROBS_MAX)
        .ok_or_else(|| out_of_range(param, value, "0 to 20"))
}

/// A count from 1 to what the proto allows.
pub(super) fn choices(param: &'static str, value: Option<i64>) -> ApiResult<u32> {
    let value = value.unwrap_or(1);
    u32::try_from(value)
        .ok()
        .filter(|count| (1..=CHOICES_MAX).contains(count))
        .ok_or_else(|| out_of_range(param, value, "1 to 128"))
}
