//! A request's messages: checked, and as templates read them.

use super::{Chat, ChatMessage, Content, ContentPart, MAX_MESSAGES, MAX_ROLE_BYTES, ToolCall, read_object};
use crate::{
    error::{Result, TextError},
    json::{self, Json, Object, object},
};

/// The key under which templates see arguments that are no JSON object; the one that Anthropic's documentation advises.
const INVALID_ARGUMENTS: &str = "INVALID_JSON";

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
    let arguments = match json::parse(&call.arguments_json) {
        _ if call.arguments_json.trim().is_empty() => Object::new(),
        Ok(Json::Object(arguments)) => arguments,
        // What a model wrote is not the client's fault: an answer that was cut in the middle of a call stays in the
        // conversation, and the turns after it must go on.
        Ok(_) | Err(_) => Object::from_iter([(
            INVALID_ARGUMENTS.to_owned(),
            Json::from(call.arguments_json.as_str()),
        )]),
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
        let with_call = ChatMessage {
            tool_calls: vec![ToolCall::default()],
            ..message("assistant", "")
        };
        assert!(fails(with_call).starts_with("messages[0].tool_calls[0].function.name"));
        let extra = ChatMessage {
            extra_json: "[]".to_owned(),
            ..message("user", "")
        };
        assert!(fails(extra).starts_with("messages[0].extra_json"));
        assert!(template_messages(&Chat::default(), true).is_err());
    }

    #[test]
    fn arguments_that_are_no_object_are_kept_as_text() {
        for (given, seen) in [
            ("", "{}"),
            (r#"{"a": 1.0}"#, r#"{"a": 1.0}"#),
            (
                r#"{"path": "a.py", "te"#,
                r#"{"INVALID_JSON": "{\"path\": \"a.py\", \"te"}"#,
            ),
            ("[1]", r#"{"INVALID_JSON": "[1]"}"#),
        ] {
            let call = ToolCall {
                name: "f".to_owned(),
                arguments_json: given.to_owned(),
                ..ToolCall::default()
            };
            let call = tool_call("messages[0].tool_calls[0]", &call).unwrap();
            let function = call.get("function").unwrap();
            assert_eq!(function.get("arguments").unwrap().to_python(), seen, "{given}");
        }
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
