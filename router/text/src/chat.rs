//! A conversation as clients send it, checked and turned into what chat templates read.
//!
//! The types mirror `conclave.v1`'s Chat messages. JSON stays text in them, so that numbers and key order survive.
//! Templates get messages in the shape transformers gives them: arguments as objects, tools as
//! `{"type": "function", "function": …}`, content never null.

use serde::{Deserialize, Serialize};

use crate::{
    error::{Result, TextError},
    json::{self, Json, Object, object},
};

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
    /// A JSON object; empty counts as `{}`.
    pub arguments_json: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// The OpenAI `function` object: {"name", "description", "parameters", …}.
    pub function_json: String,
    /// Arguments are constrained to the schema.
    pub strict: bool,
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
    pub function: Json,
}

impl ToolSpec {
    /// The JSON schema of the arguments, if the tool has one.
    pub fn parameters(&self) -> Option<&Json> {
        self.function.get("parameters")
    }
}

/// Reads and checks the tools of a request.
pub fn read_tools(tools: &[Tool]) -> Result<Vec<ToolSpec>> {
    if tools.len() > MAX_TOOLS {
        return Err(TextError::request(
            "tools",
            format!("{} tools; at most {MAX_TOOLS} are allowed", tools.len()),
        ));
    }
    let mut specs: Vec<ToolSpec> = Vec::with_capacity(tools.len());
    let mut names = std::collections::HashSet::new();
    for (index, tool) in tools.iter().enumerate() {
        let field = || format!("tools[{index}].function");
        let function = read_object(&field(), &tool.function_json)?;
        let name = function.get("name").and_then(Json::as_str).unwrap_or_default();
        if name.is_empty() {
            return Err(TextError::request(
                field() + ".name",
                "must be a non-empty string",
            ));
        }
        if !names.insert(name.to_owned()) {
            return Err(TextError::request(
                field() + ".name",
                format!("{name:?} is the name of another tool too"),
            ));
        }
        if let Some(parameters) = function.get("parameters")
            && !matches!(parameters, Json::Object(_) | Json::Null)
        {
            return Err(TextError::request(
                field() + ".parameters",
                "must be a JSON schema (an object)",
            ));
        }
        specs.push(ToolSpec {
            name: name.to_owned(),
            strict: tool.strict,
            function: Json::Object(function),
        });
    }
    Ok(specs)
}

/// A choice of tool must be possible.
pub(crate) fn check_tool_choice(choice: &ToolChoice, tools: &[ToolSpec]) -> Result<()> {
    let wrong = |reason: String| Err(TextError::request("tool_choice", reason));
    match choice {
        ToolChoice::Auto | ToolChoice::None => Ok(()),
        ToolChoice::Required if tools.is_empty() => {
            wrong("\"required\" needs tools, and the request has none".to_owned())
        }
        ToolChoice::Named(name) if !tools.iter().any(|tool| tool.name == *name) => {
            wrong(format!("names {name:?}, which is not among the request's tools"))
        }
        ToolChoice::Required | ToolChoice::Named(_) => Ok(()),
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

/// Checks a conversation and gives its messages as templates read them. `keep_parts`: content given as a list
/// stays a list; otherwise its texts are joined.
pub(crate) fn template_messages(chat: &Chat, keep_parts: bool) -> Result<Vec<Json>> {
    if chat.messages.is_empty() {
        return Err(TextError::request("messages", "must not be empty"));
    }
    if chat.messages.len() > MAX_MESSAGES {
        return Err(TextError::request(
            "messages",
            format!(
                "{} messages; at most {MAX_MESSAGES} are allowed",
                chat.messages.len()
            ),
        ));
    }
    let messages = chat.messages.iter().enumerate();
    messages
        .map(|(index, message)| template_message(&format!("messages[{index}]"), message, keep_parts))
        .collect()
}

fn template_message(field: &str, message: &ChatMessage, keep_parts: bool) -> Result<Json> {
    let role = &message.role;
    let identifier = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if role.is_empty() || role.len() > MAX_ROLE_BYTES || !role.chars().all(identifier) {
        return Err(TextError::request(
            format!("{field}.role"),
            format!("must be 1 to {MAX_ROLE_BYTES} letters, digits, _ or -"),
        ));
    }
    let mut map = Object::new();
    map.insert("role".to_owned(), Json::from(role.as_str()));
    map.insert(
        "content".to_owned(),
        content(field, &message.content, keep_parts)?,
    );
    if let Some(reasoning) = &message.reasoning_content {
        map.insert("reasoning_content".to_owned(), Json::from(reasoning.as_str()));
    }
    if !message.tool_calls.is_empty() {
        let calls = message.tool_calls.iter().enumerate();
        let calls: Result<Vec<Json>> = calls
            .map(|(index, call)| tool_call(&format!("{field}.tool_calls[{index}]"), call))
            .collect();
        map.insert("tool_calls".to_owned(), Json::Array(calls?));
    }
    for (key, value) in [("tool_call_id", &message.tool_call_id), ("name", &message.name)] {
        if !value.is_empty() {
            map.insert(key.to_owned(), Json::from(value.as_str()));
        }
    }
    if !message.extra_json.is_empty() {
        for (key, value) in read_object(&format!("{field}.extra_json"), &message.extra_json)? {
            map.entry(key).or_insert(value);
        }
    }
    Ok(Json::Object(map))
}

fn content(field: &str, content: &Content, keep_parts: bool) -> Result<Json> {
    let parts = match content {
        Content::None => return Ok(Json::from("")),
        Content::Text(text) => return Ok(Json::from(text.as_str())),
        Content::Parts(parts) => parts,
    };
    if let Some(index) = parts.iter().position(|part| part.r#type != "text") {
        return Err(TextError::request(
            format!("{field}.content[{index}].type"),
            format!("{:?} is not served; only \"text\" is", parts[index].r#type),
        ));
    }
    if !keep_parts {
        let texts: Vec<&str> = parts.iter().map(|part| part.text.as_str()).collect();
        return Ok(Json::String(texts.join("\n")));
    }
    let part = |part: &ContentPart| {
        object([
            ("type", Json::from("text")),
            ("text", Json::from(part.text.as_str())),
        ])
    };
    Ok(Json::Array(parts.iter().map(part).collect()))
}

fn tool_call(field: &str, call: &ToolCall) -> Result<Json> {
    if call.name.is_empty() {
        return Err(TextError::request(
            format!("{field}.function.name"),
            "must be a non-empty string",
        ));
    }
    let arguments = if call.arguments_json.trim().is_empty() {
        Object::new()
    } else {
        read_object(&format!("{field}.function.arguments"), &call.arguments_json)?
    };
    let function = object([
        ("name", Json::from(call.name.as_str())),
        ("arguments", Json::Object(arguments)),
    ]);
    let mut map = Object::new();
    if !call.id.is_empty() {
        map.insert("id".to_owned(), Json::from(call.id.as_str()));
    }
    map.insert("type".to_owned(), Json::from("function"));
    map.insert("function".to_owned(), function);
    Ok(Json::Object(map))
}

/// The tools as templates read them.
pub(crate) fn template_tools(tools: &[ToolSpec]) -> Json {
    let wrap = |tool: &ToolSpec| {
        object([
            ("type", Json::from("function")),
            ("function", tool.function.clone()),
        ])
    };
    Json::Array(tools.iter().map(wrap).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, text: &str) -> ChatMessage {
        ChatMessage {
            role: role.to_owned(),
            content: Content::Text(text.to_owned()),
            ..ChatMessage::default()
        }
    }

    fn fails(message: ChatMessage) -> String {
        let chat = Chat {
            messages: vec![message],
            ..Chat::default()
        };
        template_messages(&chat, true).unwrap_err().to_string()
    }

    #[test]
    fn errors_name_the_field() {
        assert!(fails(message("user\n", "x")).starts_with("messages[0].role"));
        assert!(fails(message("", "x")).starts_with("messages[0].role"));
        let image = Content::Parts(vec![ContentPart {
            r#type: "image_url".to_owned(),
            text: String::new(),
        }]);
        let with_image = ChatMessage {
            content: image,
            ..message("user", "")
        };
        assert!(fails(with_image).starts_with("messages[0].content[0].type"));
        let call = ToolCall {
            name: "f".to_owned(),
            arguments_json: "{\"a\": ".to_owned(),
            ..ToolCall::default()
        };
        let with_call = ChatMessage {
            tool_calls: vec![call],
            ..message("assistant", "")
        };
        assert!(fails(with_call).starts_with("messages[0].tool_calls[0].function.arguments"));
        let extra = ChatMessage {
            extra_json: "[]".to_owned(),
            ..message("user", "")
        };
        assert!(fails(extra).starts_with("messages[0].extra_json"));
        assert!(template_messages(&Chat::default(), true).is_err());
    }

    #[test]
    fn extra_keys_never_replace_checked_ones() {
        let chat = Chat {
            messages: vec![ChatMessage {
                extra_json: r#"{"role": "system", "current_date": "today"}"#.to_owned(),
                ..message("user", "x")
            }],
            ..Chat::default()
        };
        let messages = template_messages(&chat, true).unwrap();
        assert_eq!(
            messages[0].to_python(),
            r#"{"role": "user", "content": "x", "current_date": "today"}"#
        );
    }

    #[test]
    fn tools_are_checked() {
        let tool = |json: &str| Tool {
            function_json: json.to_owned(),
            strict: false,
        };
        let bad = |tools: &[Tool]| read_tools(tools).unwrap_err().to_string();
        assert!(bad(&[tool("{}")]).starts_with("tools[0].function.name"));
        assert!(bad(&[tool("[1]")]).starts_with("tools[0].function: must be a JSON object"));
        assert!(bad(&[tool(r#"{"name":"a"}"#), tool(r#"{"name":"a"}"#)]).starts_with("tools[1]"));
        assert!(bad(&[tool(r#"{"name":"a","parameters":3}"#)]).contains("parameters"));
        assert!(bad(&vec![tool("{}"); MAX_TOOLS + 1]).contains("at most"));
        let tools = read_tools(&[tool(r#"{"name":"a"}"#)]).unwrap();
        assert_eq!(tools[0].name, "a");
        assert!(check_tool_choice(&ToolChoice::Required, &tools).is_ok());
        assert!(check_tool_choice(&ToolChoice::Required, &[]).is_err());
        assert!(check_tool_choice(&ToolChoice::Named("a".to_owned()), &tools).is_ok());
        assert!(check_tool_choice(&ToolChoice::Named("b".to_owned()), &tools).is_err());
    }

    #[test]
    fn too_many_messages() {
        let chat = Chat {
            messages: vec![message("user", ""); MAX_MESSAGES + 1],
            ..Chat::default()
        };
        assert!(
            template_messages(&chat, true)
                .unwrap_err()
                .to_string()
                .contains("at most")
        );
    }
}
