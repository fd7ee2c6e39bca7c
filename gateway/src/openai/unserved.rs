//! Fields that would change the answer and are not served: each is refused by name, with what to do instead.

use super::request::Request;
use super::sampling::Endpoint;
use crate::http::error::{ApiError, ApiResult};

/// # Errors
/// The first such field that asks for something.
pub(super) fn refuse(request: &Request, endpoint: Endpoint) -> ApiResult<()> {
    ApiError::unserved([
        (
            "suffix",
            request.suffix.as_ref().is_some_and(|text| !text.is_empty()),
            "text is only continued, not filled in",
        ),
        (
            "use_beam_search",
            request.use_beam_search == Some(true),
            "sample instead",
        ),
        (
            "chat_template",
            request.chat_template.is_some(),
            "templates come from the checkpoint only",
        ),
        ("functions", request.functions.is_some(), "send tools instead"),
        (
            "function_call",
            request.function_call.is_some(),
            "send tool_choice instead",
        ),
        (
            "allowed_token_ids",
            request.allowed_token_ids.is_some(),
            "send structured_outputs instead",
        ),
        (
            "logits_processors",
            request.logits_processors.is_some(),
            "nothing received is executed",
        ),
        (
            "modalities",
            request
                .modalities
                .as_ref()
                .is_some_and(|kinds| kinds.iter().any(|kind| kind != "text")),
            "this model writes text only",
        ),
        (
            "separate_reasoning",
            request.separate_reasoning == Some(false),
            "reasoning comes in reasoning_content; send include_reasoning false to leave it out",
        ),
        (
            "stop_regex",
            request.stop_regex.is_some(),
            "send stop or structured_outputs instead",
        ),
        (
            "lora_path",
            request.lora_path.is_some(),
            "merge the adapter into the checkpoint",
        ),
        (
            "custom_logit_processor",
            request.custom_logit_processor.is_some(),
            "nothing received is executed",
        ),
        (
            "return_hidden_states",
            request.return_hidden_states == Some(true),
            "hidden states stay on the workers",
        ),
        (
            "echo",
            endpoint == Endpoint::Chat && request.echo == Some(true),
            "/v1/completions has it",
        ),
        (
            "best_of",
            endpoint == Endpoint::Chat && request.best_of.is_some(),
            "/v1/completions has it",
        ),
    ])
}
