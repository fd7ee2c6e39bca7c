//! A conversation as clients send it, checked and turned into what chat templates read.
//!
//! The types mirror `conclave.v1`'s Chat messages. JSON stays text in them, so that numbers and key order survive.
//! Templates get messages in the shape transformers gives them: arguments as objects, tools as
//! `{"type": "function", "function": …}`, content never null.

mod messages;
mod roles;
mod tools;

use serde::{Deserialize, Serialize};

use crate::{
    error::{Result, TextError},
    json::{self, Json, Object},
};

pub(crate) use messages::template_messages;
pub(crate) use roles::Roles;
pub use tools::read_tools;
pub(crate) use tools::{check_tool_choice, template_tools};

/// Messages per conversation.
pub const MAX_MESSAGES: usize = 100_000;
/// Tools per conversation.
pub const MAX_TOOLS: usize = 4096;
/// Bytes of a role. A role is an identifier: it becomes part of control text in many templates.
pub const MAX_ROLE_BYTES: usize = 64;

/// A conversation and how to render it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Chat {
    pub messages: Vec<ChatMessage>,
    pub tools: Vec<Tool>,
    pub tool_choice: ToolChoice,
    /// `None` is true, unless `continue_final_message`.
    pub add_generation_prompt: Option<bool>,
    /// The last message is left open and continued.
    pub continue_final_message: bool,
    /// A JSON object of further template variables; empty is none.
    pub template_kwargs_json: String,
    /// `None` is true: several calls may follow one another.
    pub parallel_tool_calls: Option<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ChatMessage {
    pub role: String,
    pub content: Content,
    pub reasoning_content: Option<String>,
    pub tool_calls: Vec<ToolCall>,
    /// Empty is none.
    pub tool_call_id: String,
    /// Empty is none.
    pub name: String,
    /// A JSON object of further keys that the template may read; empty is none.
    pub extra_json: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// Null or absent: rendered as the empty string.
    #[default]
    None,
    Text(String),
    Parts(Vec<ContentPart>),
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentPart {
    /// Only "text" is served.
    pub r#type: String,
    pub text: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    pub id: String,
    pub name: String,
    /// A JSON object; empty counts as `{}`. Anything else is shown to the template as text.
    pub arguments_json: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// The OpenAI `function` object: {"name", "description", "parameters", …}.
    pub function_json: String,
    /// Arguments are constrained to the schema.
    pub strict: bool,
    /// A Lark grammar for the one parameter, a string; empty is none.
    pub grammar: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolChoice {
    #[default]
    Auto,
    None,
    Required,
    Named(String),
}

/// A checked tool: its name and its function object.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolSpec {
    pub name: String,
    pub strict: bool,
    /// A Lark grammar for the one parameter.
    pub grammar: Option<String>,
    pub function: Json,
}

impl ToolSpec {
    /// The JSON schema of the arguments, if the tool has one.
    pub fn parameters(&self) -> Option<&Json> {
        self.function.get("parameters")
    }
}

/// Reads a JSON object out of a request's string field.
pub(crate) fn read_object(field: &str, text: &str) -> Result<Object> {
    match json::parse(text) {
        Ok(Json::Object(object)) => Ok(object),
        Ok(other) => Err(TextError::request(
            field,
            format!("must be a JSON object, is {}", other.type_name()),
        )),
        Err(error) => Err(TextError::request(field, format!("is not valid JSON: {error}"))),
    }
}
