//! Token counts of a request, and the ends of a choice that are failures.

use conclave_proto::v1;
use http::StatusCode;

use crate::http::error::ApiError;

/// Tokens counted over all prompts of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Tokens {
    pub(crate) prompt: u64,
    pub(crate) completion: u64,
    /// Of the prompt's.
    pub(crate) cached: u64,
    /// Of the completion's.
    pub(crate) reasoning: u64,
}

impl Tokens {
    pub(crate) fn add(&mut self, usage: &v1::Usage) {
        self.prompt += u64::from(usage.prompt_tokens);
        self.completion += u64::from(usage.completion_tokens);
        self.cached += u64::from(usage.cached_tokens);
        self.reasoning += u64::from(usage.reasoning_tokens);
    }
}

/// Why a choice's end makes the whole answer an error: the router gave it up, and nothing may look whole.
pub(crate) fn finish_error(finished: &v1::Finished) -> Option<ApiError> {
    match finished.reason() {
        v1::FinishReason::Stop | v1::FinishReason::Length | v1::FinishReason::ToolCalls => None,
        v1::FinishReason::Cancelled => Some(
            ApiError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "the router cancelled the request",
            )
            .code("cancelled"),
        ),
        v1::FinishReason::Unsatisfiable => {
            Some(ApiError::new(StatusCode::BAD_REQUEST, message(finished)).code("unsatisfiable"))
        }
        v1::FinishReason::Error | v1::FinishReason::Unspecified => {
            let error = ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message(finished));
            Some(error.code("generation_failed"))
        }
    }
}

fn message(finished: &v1::Finished) -> &str {
    match finished.error.as_str() {
        "" => "generation failed",
        error => error,
    }
}
