//! Conversations of the wire as the text layer's; it checks what is in them.

use conclave_proto::v1 as pb;
use conclave_proto::v1::chat_message::Content as WireContent;
use conclave_text::chat::{Chat, ChatMessage, Content, ContentPart, Tool, ToolCall, ToolChoice};
use tonic::Status;

use super::errors;

pub fn from_wire(chat: pb::Chat) -> Result<Chat, Status> {
    Ok(Chat {
        messages: chat.messages.into_iter().map(message).collect(),
        tools: chat
            .tools
            .into_iter()
            .map(|tool| Tool {
                function_json: tool.function_json,
                strict: tool.strict,
                grammar: tool.grammar,
            })
            .collect(),
        tool_choice: tool_choice(chat.tool_choice)?,
        add_generation_prompt: chat.add_generation_prompt,
        continue_final_message: chat.continue_final_message,
        template_kwargs_json: chat.template_kwargs_json,
        parallel_tool_calls: chat.parallel_tool_calls,
    })
}

fn message(message: pb::ChatMessage) -> ChatMessage {
    ChatMessage {
        role: message.role,
        content: match message.content {
            None => Content::None,
            Some(WireContent::Text(text)) => Content::Text(text),
            Some(WireContent::Parts(parts)) => Content::Parts(
                parts
                    .parts
                    .into_iter()
                    .map(|part| ContentPart {
                        r#type: part.r#type,
                        text: part.text,
                    })
                    .collect(),
            ),
        },
        reasoning_content: message.reasoning_content,
        tool_calls: message
            .tool_calls
            .into_iter()
            .map(|call| ToolCall {
                id: call.id,
                name: call.name,
                arguments_json: call.arguments_json,
            })
            .collect(),
        tool_call_id: message.tool_call_id,
        name: message.name,
        extra_json: message.extra_json,
    }
}

fn tool_choice(choice: Option<pb::ToolChoice>) -> Result<ToolChoice, Status> {
    use pb::tool_choice::Mode;
    let Some(choice) = choice else {
        return Ok(ToolChoice::Auto);
    };
    match Mode::try_from(choice.mode) {
        Ok(Mode::Unspecified | Mode::Auto) => Ok(ToolChoice::Auto),
        Ok(Mode::None) => Ok(ToolChoice::None),
        Ok(Mode::Required) => Ok(ToolChoice::Required),
        Ok(Mode::Named) => Ok(ToolChoice::Named(choice.name)),
        Err(_) => Err(errors::invalid(
            "chat.tool_choice.mode",
            choice.mode,
            "unknown; use auto, none, required or named",
        )),
    }
}
