//! The router's words about a field back into the client's.

use crate::http::error::ApiError;

/// Field names that differ between request and proto.
#[derive(Clone, Copy, Debug)]
pub(super) struct Words {
    pub(super) logprobs: &'static str,
    pub(super) max_tokens: &'static str,
    pub(super) prompt: &'static str,
    pub(super) structured: &'static str,
}

impl Default for Words {
    fn default() -> Self {
        Self {
            logprobs: "logprobs",
            max_tokens: "max_tokens",
            prompt: "prompt",
            structured: "response_format",
        }
    }
}

impl Words {
    /// Puts the proto path in `error.param` into the client's words.
    pub(super) fn speak(&self, error: ApiError) -> ApiError {
        error.with_field(|proto| self.field(proto))
    }

    fn field(&self, proto: &str) -> String {
        let bare = ["sampling.", "output.", "chat.", "prompt."]
            .iter()
            .find_map(|prefix| proto.strip_prefix(prefix))
            .unwrap_or(proto);
        match bare {
            "logprobs" => self.logprobs.to_owned(),
            "max_tokens" => self.max_tokens.to_owned(),
            "prompt" | "text" => self.prompt.to_owned(),
            "template_kwargs_json" => String::from("chat_template_kwargs"),
            "chat" => String::from("messages"),
            _ if bare.starts_with("structured") => self.structured.to_owned(),
            _ if bare.starts_with("token_ids") => self.prompt.to_owned(),
            _ => bare
                .replace("function_json", "function")
                .replace("arguments_json", "function.arguments"),
        }
    }
}
