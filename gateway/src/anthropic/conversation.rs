//! Content blocks into the messages of a chat.
//!
//! A user turn may mix tool results and text: each result becomes a message of role `tool`, the text between them
//! one of role `user`, in their order. An assistant turn's thinking, text and tool uses become one message.

use conclave_proto::v1;
use conclave_proto::v1::chat_message::Content as ProtoContent;
use conclave_proto::v1::tool_choice::Mode;
use serde_json::value::RawValue;

use super::content::{BlockIn, Content};
use super::request::{MessageIn, Request, ToolChoiceIn, ToolIn};
use crate::http::error::{ApiError, ApiResult};
use crate::http::json;

/// Claude Code begins its instructions with a block for Anthropic's accounting. It differs from one conversation to the
/// next, so that no two would share a cached prefix, and tells a model nothing.
const ACCOUNTING: &str = "x-anthropic-billing-header:";

fn wrong(param: String, problem: &str) -> ApiError {
    let message = format!("{param}: {problem}");
    ApiError::field(param, message)
}

pub(super) fn chat(request: &mut Request) -> ApiResult<v1::Chat> {
    let mut messages = Vec::new();
    if let Some(mut system) = request.system.take() {
        if let Content::Blocks(blocks) = &mut system {
            let is_accounting = |text: &String| text.starts_with(ACCOUNTING);
            blocks.retain(|block| !block.text.as_ref().is_some_and(is_accounting));
        }
        let content = texts(system, "system")?;
        messages.push(v1::ChatMessage {
            role: "system".into(),
            content: Some(content),
            ..Default::default()
        });
    }
    if request.messages.is_empty() {
        return Err(wrong("messages".into(), "at least one message is needed"));
    }
    for (at, message) in std::mem::take(&mut request.messages).into_iter().enumerate() {
        one_message(at, message, &mut messages)?;
    }
    let tools = std::mem::take(&mut request.tools).unwrap_or_default();
    let tools = tools
        .into_iter()
        .enumerate()
        .map(|(at, tool)| one_tool(at, tool))
        .collect::<ApiResult<Vec<_>>>()?;
    let (tool_choice, parallel_tool_calls) = choice(request.tool_choice.take(), tools.is_empty())?;
    // An assistant turn at the end is the beginning of the answer.
    let continues = messages
        .last()
        .is_some_and(|last| last.role == "assistant" && last.tool_calls.is_empty());
    Ok(v1::Chat {
        messages,
        tools,
        tool_choice,
        add_generation_prompt: continues.then_some(false),
        continue_final_message: continues,
        template_kwargs_json: template_kwargs(request)?,
        parallel_tool_calls,
    })
}

fn one_message(at: usize, message: MessageIn, out: &mut Vec<v1::ChatMessage>) -> ApiResult<()> {
    let path = format!("messages[{at}].content");
    match (message.role.as_str(), message.content) {
        ("assistant", content) => out.push(assistant(content, &path)?),
        (role @ ("user" | "system"), Content::Text(text)) => out.push(v1::ChatMessage {
            role: role.into(),
            content: Some(ProtoContent::Text(text)),
            ..Default::default()
        }),
        (role @ ("user" | "system"), Content::Blocks(blocks)) => user(role, blocks, &path, out)?,
        (role, _) => {
            return Err(wrong(
                format!("messages[{at}].role"),
                &format!("{role:?} is not user or assistant"),
            ));
        }
    }
    Ok(())
}

fn user(role: &str, blocks: Vec<BlockIn>, path: &str, out: &mut Vec<v1::ChatMessage>) -> ApiResult<()> {
    if blocks.is_empty() {
        return Err(wrong(path.into(), "at least one block is needed"));
    }
    let mut parts = Vec::new();
    let flush = |parts: &mut Vec<v1::ContentPart>, out: &mut Vec<v1::ChatMessage>| {
        if !parts.is_empty() {
            let content = ProtoContent::Parts(v1::ContentParts {
                parts: std::mem::take(parts),
            });
            out.push(v1::ChatMessage {
                role: role.into(),
                content: Some(content),
                ..Default::default()
            });
        }
    };
    for (at, block) in blocks.into_iter().enumerate() {
        let path = format!("{path}[{at}]");
        match block.kind.as_str() {
            "text" => parts.push(text_part(block, &path)?),
            "tool_result" => {
                flush(&mut parts, out);
                out.push(tool_result(block, &path)?);
            }
            other => return Err(unserved(&path, other)),
        }
    }
    flush(&mut parts, out);
    Ok(())
}

fn assistant(content: Content, path: &str) -> ApiResult<v1::ChatMessage> {
    let mut message = v1::ChatMessage {
        role: "assistant".into(),
        ..Default::default()
    };
    let mut text = String::new();
    let mut reasoning = String::new();
    match content {
        Content::Text(whole) => text = whole,
        Content::Blocks(blocks) => {
            for (at, block) in blocks.into_iter().enumerate() {
                let path = format!("{path}[{at}]");
                match block.kind.as_str() {
                    "text" => text.push_str(&text_part(block, &path)?.text),
                    "thinking" => reasoning.push_str(&block.thinking.unwrap_or_default()),
                    // Of another server: nobody here can read it.
                    "redacted_thinking" => {}
                    "tool_use" => message.tool_calls.push(tool_use(block, &path)?),
                    other => return Err(unserved(&path, other)),
                }
            }
        }
    }
    message.content = Some(ProtoContent::Text(text));
    message.reasoning_content = (!reasoning.is_empty()).then_some(reasoning);
    Ok(message)
}

fn unserved(path: &str, kind: &str) -> ApiError {
    ApiError::unsupported(
        path,
        format!("{path}: content of type {kind:?} is not served here: this model reads text"),
    )
}

fn text_part(block: BlockIn, path: &str) -> ApiResult<v1::ContentPart> {
    let text = block
        .text
        .ok_or_else(|| wrong(format!("{path}.text"), "missing"))?;
    Ok(v1::ContentPart {
        r#type: "text".into(),
        text,
    })
}

fn tool_use(block: BlockIn, path: &str) -> ApiResult<v1::ToolCall> {
    let input = block
        .input
        .ok_or_else(|| wrong(format!("{path}.input"), "missing"))?;
    json::check_object(&input, &format!("{path}.input"))?;
    Ok(v1::ToolCall {
        id: block.id.ok_or_else(|| wrong(format!("{path}.id"), "missing"))?,
        name: block
            .name
            .ok_or_else(|| wrong(format!("{path}.name"), "missing"))?,
        arguments_json: String::from(Box::<str>::from(input)),
    })
}

fn tool_result(block: BlockIn, path: &str) -> ApiResult<v1::ChatMessage> {
    let tool_call_id = block
        .tool_use_id
        .ok_or_else(|| wrong(format!("{path}.tool_use_id"), "missing"))?;
    let content = match block.content {
        None => ProtoContent::Text(String::new()),
        Some(content) => texts(content, &format!("{path}.content"))?,
    };
    let extra_json = if block.is_error == Some(true) {
        "{\"is_error\":true}"
    } else {
        ""
    };
    Ok(v1::ChatMessage {
        role: "tool".into(),
        content: Some(content),
        tool_call_id,
        extra_json: extra_json.into(),
        ..Default::default()
    })
}

/// Content that may only be text.
fn texts(content: Content, path: &str) -> ApiResult<ProtoContent> {
    let blocks = match content {
        Content::Text(text) => return Ok(ProtoContent::Text(text)),
        Content::Blocks(blocks) => blocks,
    };
    let part = |(at, block): (usize, BlockIn)| {
        let path = format!("{path}[{at}]");
        if block.kind == "text" {
            text_part(block, &path)
        } else {
            Err(unserved(&path, &block.kind))
        }
    };
    let parts = blocks
        .into_iter()
        .enumerate()
        .map(part)
        .collect::<ApiResult<_>>()?;
    Ok(ProtoContent::Parts(v1::ContentParts { parts }))
}

fn one_tool(at: usize, tool: ToolIn) -> ApiResult<v1::Tool> {
    let path = format!("tools[{at}]");
    if let Some(kind) = tool.kind.filter(|kind| kind != "custom") {
        let message = format!("{path}.type: {kind:?} is not served: describe the tool with an input_schema");
        return Err(ApiError::unsupported(format!("{path}.type"), message));
    }
    if tool.name.is_empty() {
        return Err(wrong(format!("{path}.name"), "must not be empty"));
    }
    let schema = tool
        .input_schema
        .ok_or_else(|| wrong(format!("{path}.input_schema"), "missing"))?;
    json::check_object(&schema, &format!("{path}.input_schema"))?;
    let quote = |text: &str| serde_json::to_string(text).unwrap_or_default();
    let mut function_json = format!("{{\"name\":{}", quote(&tool.name));
    if let Some(description) = &tool.description {
        function_json.push_str(&format!(",\"description\":{}", quote(description)));
    }
    function_json.push_str(&format!(",\"parameters\":{}}}", schema.get()));
    Ok(v1::Tool {
        function_json,
        strict: tool.strict.unwrap_or(false),
        ..Default::default()
    })
}

fn choice(given: Option<ToolChoiceIn>, no_tools: bool) -> ApiResult<(Option<v1::ToolChoice>, Option<bool>)> {
    let Some(given) = given else {
        return Ok((None, None));
    };
    let (mode, name) = match (given.kind.as_str(), given.name) {
        ("auto", _) => (Mode::Auto, String::new()),
        ("none", _) => (Mode::None, String::new()),
        ("any", _) => (Mode::Required, String::new()),
        ("tool", Some(name)) => (Mode::Named, name),
        ("tool", None) => return Err(wrong("tool_choice.name".into(), "missing")),
        (other, _) => {
            return Err(wrong(
                "tool_choice.type".into(),
                &format!("{other:?} is not auto, any, tool or none"),
            ));
        }
    };
    if no_tools && matches!(mode, Mode::Required | Mode::Named) {
        return Err(wrong(
            "tool_choice".into(),
            "asks for a tool, but tools is missing or empty",
        ));
    }
    let parallel = given
        .disable_parallel_tool_use
        .filter(|disable| *disable)
        .map(|_| false);
    Ok((
        Some(v1::ToolChoice {
            mode: mode.into(),
            name,
        }),
        parallel,
    ))
}

/// What templates read about thinking.
fn template_kwargs(request: &Request) -> ApiResult<String> {
    let mut fields = Vec::new();
    match request.thinking.as_ref().map(|thinking| thinking.kind.as_str()) {
        None | Some("adaptive") => {}
        Some("enabled") => fields.push(String::from("\"enable_thinking\":true")),
        Some("disabled") => fields.push(String::from("\"enable_thinking\":false")),
        Some(other) => {
            return Err(wrong(
                "thinking.type".into(),
                &format!("{other:?} is not enabled, disabled or adaptive"),
            ));
        }
    }
    if let Some(effort) = request
        .output_config
        .as_ref()
        .and_then(|config| config.effort.as_ref())
    {
        fields.push(format!(
            "\"reasoning_effort\":{}",
            serde_json::to_string(effort).unwrap_or_default()
        ));
    }
    Ok(if fields.is_empty() {
        String::new()
    } else {
        format!("{{{}}}", fields.join(","))
    })
}

/// Where a request gives the schema of its answer.
pub(super) const SCHEMA_FIELD: &str = "output_config.format.schema";

/// Where this request does: in the field of today, or in the one that it had before.
pub(super) fn schema_field(request: &Request) -> &'static str {
    match request.output_format {
        Some(_) => "output_format.schema",
        None => SCHEMA_FIELD,
    }
}

/// The JSON schema that the answer must follow, if any.
pub(super) fn structured(request: &mut Request) -> ApiResult<Option<v1::StructuredOutput>> {
    let from_config = request
        .output_config
        .as_mut()
        .and_then(|config| config.format.take());
    let (path, format) = match (from_config, request.output_format.take()) {
        (None, None) => return Ok(None),
        (Some(format), None) => ("output_config.format", format),
        (None, Some(format)) => ("output_format", format),
        (Some(_), Some(_)) => {
            return Err(wrong(
                "output_format".into(),
                "cannot go with output_config.format",
            ));
        }
    };
    if format.kind != "json_schema" {
        return Err(wrong(
            format!("{path}.type"),
            &format!("{:?} is not json_schema", format.kind),
        ));
    }
    let schema: Box<RawValue> = format
        .schema
        .ok_or_else(|| wrong(format!("{path}.schema"), "missing"))?;
    json::check_object(&schema, &format!("{path}.schema"))?;
    let kind = v1::structured_output::Kind::JsonSchema(String::from(Box::<str>::from(schema)));
    Ok(Some(v1::StructuredOutput { kind: Some(kind) }))
}
