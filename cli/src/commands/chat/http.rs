//! Answers over HTTP: `/v1/chat/completions` of any OpenAI-compatible server.

use anyhow::Result;
use serde_json::{Value, json};

use super::answer::{CallPiece, Ended, Piece, Usage};
use super::conversation::{Conversation, Message};
use super::options::Options;
use crate::http_client::{self, EventStream};

pub async fn answer(
    address: &str,
    key: Option<&str>,
    conversation: &Conversation,
    options: &Options,
) -> Result<EventStream> {
    let body = body(conversation, options);
    http_client::post_for_events(address, key, "/v1/chat/completions", &body).await
}

fn body(conversation: &Conversation, options: &Options) -> Value {
    let system = conversation
        .system()
        .map(|text| json!({"role": "system", "content": text}));
    let messages = conversation.messages().iter().map(message);
    let mut body = json!({
        "messages": system.into_iter().chain(messages).collect::<Vec<_>>(),
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    if !conversation.tools().is_empty() {
        body["tools"] = json!(conversation.tools().values());
    }
    let fields = [
        ("model", options.model.as_ref().map(|value| json!(value))),
        ("temperature", options.temperature.map(|value| json!(value))),
        ("top_p", options.top_p.map(|value| json!(value))),
        ("top_k", options.top_k.map(|value| json!(value))),
        ("max_tokens", options.max_tokens.map(|value| json!(value))),
        ("seed", options.seed.map(|value| json!(value))),
        ("stop", options.stop.as_ref().map(|value| json!(value))),
    ];
    for (name, value) in fields {
        if let Some(value) = value {
            body[name] = value;
        }
    }
    body
}

fn message(message: &Message) -> Value {
    match message {
        Message::User(text) => json!({"role": "user", "content": text}),
        Message::Tool { call_id, result } => {
            json!({"role": "tool", "tool_call_id": call_id, "content": result})
        }
        Message::Assistant(answer) => {
            let mut said = json!({"role": "assistant", "content": answer.text});
            if !answer.thinking.is_empty() {
                said["reasoning_content"] = json!(answer.thinking);
            }
            let calls: Vec<Value> = answer
                .whole_calls()
                .iter()
                .map(|call| {
                    json!({"id": call.id, "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments}})
                })
                .collect();
            if !calls.is_empty() {
                said["tool_calls"] = json!(calls);
            }
            said
        }
    }
}

/// The pieces of one event.
pub fn pieces(event: &Value) -> Vec<Piece> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut pieces = Vec::new();
    let choice = &event["choices"][0];
    let delta = &choice["delta"];
    // vLLM writes the one or the other.
    let thinking = [&delta["reasoning_content"], &delta["reasoning"]];
    if let Some(thinking) = thinking.into_iter().find(|value| value.is_string()) {
        pieces.push(Piece::Thinking(text(thinking)));
    }
    if delta["content"]
        .as_str()
        .is_some_and(|content| !content.is_empty())
    {
        pieces.push(Piece::Text(text(&delta["content"])));
    }
    for call in delta["tool_calls"].as_array().into_iter().flatten() {
        pieces.push(Piece::Call(CallPiece {
            index: call["index"].as_u64().unwrap_or(0) as usize,
            id: text(&call["id"]),
            name: text(&call["function"]["name"]),
            arguments: text(&call["function"]["arguments"]),
        }));
    }
    match choice["finish_reason"].as_str() {
        None => {}
        Some("length") => pieces.push(Piece::Ended(Ended::Length)),
        Some("tool_calls") => pieces.push(Piece::Ended(Ended::ToolCalls)),
        Some(_) => pieces.push(Piece::Ended(Ended::Stop)),
    }
    if let Some(usage) = event.get("usage").filter(|usage| usage.is_object()) {
        let count = |value: &Value| value.as_u64().unwrap_or(0);
        pieces.push(Piece::Usage(Usage {
            prompt: count(&usage["prompt_tokens"]),
            cached: count(&usage["prompt_tokens_details"]["cached_tokens"]),
            generated: count(&usage["completion_tokens"]),
        }));
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_become_pieces() {
        let event = json!({"choices": [{"delta": {"reasoning_content": "r", "content": "", "tool_calls": [
            {"index": 1, "id": "x", "function": {"name": "f", "arguments": ""}}]}, "finish_reason": "length"}],
            "usage": null});
        let call = CallPiece {
            index: 1,
            id: "x".into(),
            name: "f".into(),
            arguments: String::new(),
        };
        assert_eq!(
            pieces(&event),
            [
                Piece::Thinking("r".into()),
                Piece::Call(call),
                Piece::Ended(Ended::Length)
            ]
        );
        let last = json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}});
        let usage = Usage {
            prompt: 3,
            cached: 0,
            generated: 2,
        };
        assert_eq!(pieces(&last), [Piece::Usage(usage)]);
    }
}
