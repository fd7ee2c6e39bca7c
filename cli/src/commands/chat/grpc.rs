//! Answers over gRPC: `conclave.v1` of a router.

use anyhow::{Context, Result, bail};
use conclave_proto::v1::chat_message::Content;
use conclave_proto::v1::conclave_client::ConclaveClient;
use conclave_proto::v1::generate_request::Prompt;
use conclave_proto::v1::generate_response::Event;
use conclave_proto::v1::{
    Chat, ChatMessage, FinishReason, GenerateRequest, GenerateResponse, SamplingParams, Tool, ToolCall,
};
use tonic::Streaming;
use tonic::transport::Channel;

use super::answer::{CallPiece, Ended, Piece, Usage};
use super::conversation::{Conversation, Message};
use super::options::Options;
use crate::grpc_client::refused;

pub async fn answer(
    client: &ConclaveClient<Channel>,
    conversation: &Conversation,
    options: &Options,
) -> Result<Streaming<GenerateResponse>> {
    let request = GenerateRequest {
        model: options.model.clone().unwrap_or_default(),
        prompt: Some(Prompt::Chat(chat(conversation))),
        sampling: Some(SamplingParams {
            temperature: options.temperature,
            top_p: options.top_p,
            top_k: options.top_k,
            seed: options.seed,
            max_tokens: options.max_tokens.map(i64::from),
            stop: options.stop.iter().cloned().collect(),
            ..SamplingParams::default()
        }),
        ..GenerateRequest::default()
    };
    let stream = client.clone().generate(request).await;
    Ok(stream.map_err(refused)?.into_inner())
}

fn chat(conversation: &Conversation) -> Chat {
    let system = conversation.system().map(|text| message("system", text));
    let messages = conversation.messages().iter().map(|said| match said {
        Message::User(text) => message("user", text),
        Message::Tool { call_id, result } => ChatMessage {
            tool_call_id: call_id.clone(),
            ..message("tool", result)
        },
        Message::Assistant(answer) => ChatMessage {
            reasoning_content: Some(answer.thinking.clone()).filter(|thinking| !thinking.is_empty()),
            tool_calls: answer
                .whole_calls()
                .into_iter()
                .map(|call| ToolCall {
                    id: call.id,
                    name: call.name,
                    arguments_json: call.arguments,
                })
                .collect(),
            ..message("assistant", &answer.text)
        },
    });
    let tools = conversation.tools().values().iter();
    Chat {
        messages: system.into_iter().chain(messages).collect(),
        tools: tools
            .map(|tool| Tool {
                function_json: tool["function"].to_string(),
                strict: tool["function"]["strict"].as_bool().unwrap_or(false),
                ..Default::default()
            })
            .collect(),
        ..Chat::default()
    }
}

fn message(role: &str, text: &str) -> ChatMessage {
    ChatMessage {
        role: role.to_owned(),
        content: Some(Content::Text(text.to_owned())),
        ..ChatMessage::default()
    }
}

/// The pieces of one message.
pub fn pieces(response: GenerateResponse) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    match response.event.context("the router sent an empty message")? {
        Event::Delta(delta) => {
            if !delta.reasoning.is_empty() {
                pieces.push(Piece::Thinking(delta.reasoning));
            }
            if !delta.text.is_empty() {
                pieces.push(Piece::Text(delta.text));
            }
            pieces.extend(delta.tool_calls.into_iter().map(|call| {
                Piece::Call(CallPiece {
                    index: call.index as usize,
                    id: call.id,
                    name: call.name,
                    arguments: call.arguments,
                })
            }));
        }
        Event::Finished(finished) => match finished.reason() {
            FinishReason::Length => pieces.push(Piece::Ended(Ended::Length)),
            FinishReason::ToolCalls => pieces.push(Piece::Ended(Ended::ToolCalls)),
            FinishReason::Error | FinishReason::Unsatisfiable => bail!("{}", finished.error),
            _ => pieces.push(Piece::Ended(Ended::Stop)),
        },
        Event::Usage(usage) => pieces.push(Piece::Usage(Usage {
            prompt: usage.prompt_tokens.into(),
            cached: usage.cached_tokens.into(),
            generated: usage.completion_tokens.into(),
        })),
        Event::Started(_) | Event::KeepAlive(_) => {}
    }
    Ok(pieces)
}
