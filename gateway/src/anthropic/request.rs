//! The body of `/v1/messages` and `/v1/messages/count_tokens`. Unknown fields are ignored.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::content::Content;

#[derive(Debug, Deserialize)]
pub(super) struct Request {
    pub(super) model: Option<String>,
    pub(super) messages: Vec<MessageIn>,
    pub(super) system: Option<Content>,
    pub(super) max_tokens: Option<i64>,
    pub(super) stop_sequences: Option<Vec<String>>,
    pub(super) stream: Option<bool>,
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) top_k: Option<i32>,
    pub(super) tools: Option<Vec<ToolIn>>,
    pub(super) tool_choice: Option<ToolChoiceIn>,
    pub(super) thinking: Option<Thinking>,
    pub(super) output_config: Option<OutputConfig>,
    pub(super) output_format: Option<Format>,
    // Not served: each would need something outside this server.
    pub(super) container: Option<Box<RawValue>>,
    pub(super) mcp_servers: Option<Vec<Box<RawValue>>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct MessageIn {
    pub(super) role: String,
    pub(super) content: Content,
}

#[derive(Debug, Deserialize)]
pub(super) struct ToolIn {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) name: String,
    pub(super) description: Option<String>,
    pub(super) input_schema: Option<Box<RawValue>>,
    pub(super) strict: Option<bool>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ToolChoiceIn {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) name: Option<String>,
    pub(super) disable_parallel_tool_use: Option<bool>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Thinking {
    #[serde(rename = "type")]
    pub(super) kind: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct OutputConfig {
    pub(super) effort: Option<String>,
    pub(super) format: Option<Format>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Format {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) schema: Option<Box<RawValue>>,
}
