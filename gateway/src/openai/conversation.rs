//! A chat request's conversation into `v1::Chat`: messages, tools, and what the template is told.

use conclave_proto::v1;
use serde_json::value::RawValue;

use super::message::Message;
use super::request::Request;
use super::tools::{self, ChoiceIn, ToolIn};
use crate::http::error::{ApiError, ApiResult};
use crate::http::json;

/// What `/v1/chat/completions` and `/tokenize` both take.
#[derive(Default)]
pub(super) struct Conversation {
    pub(super) messages: Option<Vec<Message>>,
    pub(super) tools: Option<Vec<ToolIn>>,
    pub(super) tool_choice: Option<ChoiceIn>,
    pub(super) parallel_tool_calls: Option<bool>,
    pub(super) add_generation_prompt: Option<bool>,
    pub(super) continue_final_message: Option<bool>,
    pub(super) chat_template_kwargs: Option<Box<RawValue>>,
    pub(super) reasoning_effort: Option<String>,
    pub(super) documents: Option<Box<RawValue>>,
}

impl Conversation {
    pub(super) fn of(request: &mut Request) -> Self {
        Self {
            messages: request.messages.take(),
            tools: request.tools.take(),
            tool_choice: request.tool_choice.take(),
            parallel_tool_calls: request.parallel_tool_calls,
            add_generation_prompt: request.add_generation_prompt,
            continue_final_message: request.continue_final_message,
            chat_template_kwargs: request.chat_template_kwargs.take(),
            reasoning_effort: request.reasoning_effort.take(),
            documents: request.documents.take(),
        }
    }
}

pub(super) fn chat(mut given: Conversation) -> ApiResult<v1::Chat> {
    let missing = |message| ApiError::field("messages", message).code("invalid_value");
    let messages = given
        .messages
        .take()
        .ok_or_else(|| missing("messages: missing"))?;
    if messages.is_empty() {
        return Err(missing("messages: at least one message is needed"));
    }
    let messages = messages
        .into_iter()
        .enumerate()
        .map(|(at, message)| one_message(at, message))
        .collect::<ApiResult<_>>()?;
    let tools = tools::tools(given.tools.take().unwrap_or_default())?;
    let choice = given.tool_choice.take();
    if tools.is_empty() && choice.as_ref().is_some_and(tools::ChoiceIn::needs_tools) {
        let message = "tool_choice: asks for a call, but tools is missing or empty";
        return Err(ApiError::field("tool_choice", message).code("invalid_value"));
    }
    let continue_final_message = given.continue_final_message.unwrap_or(false);
    if continue_final_message && given.add_generation_prompt == Some(true) {
        let message = "continue_final_message: cannot go with add_generation_prompt";
        return Err(ApiError::field("continue_final_message", message).code("invalid_value"));
    }
    Ok(v1::Chat {
        messages,
        tools,
        tool_choice: choice.map(|choice| choice.0),
        add_generation_prompt: match given.add_generation_prompt {
            None if continue_final_message => Some(false),
            asked => asked,
        },
        continue_final_message,
        template_kwargs_json: template_kwargs(&mut given)?,
        parallel_tool_calls: given.parallel_tool_calls,
    })
}

fn one_message(at: usize, message: Message) -> ApiResult<v1::ChatMessage> {
    let mut proto = message.proto;
    if !message.extra.is_empty() {
        for (key, value) in &message.extra {
            json::check_raw(value, &format!("messages[{at}].{key}"))?;
        }
        proto.extra_json = object(message.extra.iter().map(|(key, value)| (key.as_str(), &**value)))?;
    }
    Ok(proto)
}

/// Variables for the template: the client's own, and those that OpenAI and vLLM have as fields.
fn template_kwargs(conversation: &mut Conversation) -> ApiResult<String> {
    use std::collections::BTreeMap;
    let mut fields: Vec<(&str, Box<RawValue>)> = Vec::new();
    if let Some(documents) = conversation.documents.take() {
        json::check_raw(&documents, "documents")?;
        fields.push(("documents", documents));
    }
    if let Some(effort) = conversation.reasoning_effort.take() {
        let raw = serde_json::value::to_raw_value(&effort)
            .map_err(|error| ApiError::field("reasoning_effort", error.to_string()))?;
        fields.push(("reasoning_effort", raw));
    }
    let param = "chat_template_kwargs";
    let given = conversation.chat_template_kwargs.take();
    if let Some(given) = &given {
        json::check_object(given, param)?;
    }
    match given {
        Some(given) if fields.is_empty() => Ok(String::from(Box::<str>::from(given))),
        None if fields.is_empty() => Ok(String::new()),
        given => {
            let own: BTreeMap<String, Box<RawValue>> = given
                .map(|given| json::part(&given, param))
                .transpose()?
                .unwrap_or_default();
            fields.retain(|(key, _)| !own.contains_key(*key));
            let fields = fields.iter().map(|(key, value)| (*key, &**value));
            object(fields.chain(own.iter().map(|(key, value)| (key.as_str(), &**value))))
        }
    }
}

/// A JSON object of these fields, in this order.
fn object<'a>(fields: impl Iterator<Item = (&'a str, &'a RawValue)>) -> ApiResult<String> {
    let mut text = String::from("{");
    for (at, (key, value)) in fields.enumerate() {
        let key = serde_json::to_string(key)
            .map_err(|error| ApiError::new(http::StatusCode::BAD_REQUEST, error.to_string()))?;
        text.push_str(if at == 0 { "" } else { "," });
        text.push_str(&key);
        text.push(':');
        text.push_str(value.get());
    }
    text.push('}');
    Ok(text)
}
