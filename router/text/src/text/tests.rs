use super::*;
use crate::{
    chat::{ChatMessage, Content, Tool, ToolCall},
    json::{self, Json},
    testing::{data, demo},
};

fn text() -> Text {
    Text::load(&demo()).unwrap()
}

/// An OpenAI message with arguments as objects.
fn message(json: &Json) -> ChatMessage {
    let string = |key: &str| json.get(key).and_then(Json::as_str).map(str::to_owned);
    let calls = json
        .get("tool_calls")
        .and_then(Json::as_array)
        .unwrap_or_default();
    let call = |call: &Json| {
        let function = call.get("function").unwrap();
        ToolCall {
            id: call
                .get("id")
                .and_then(Json::as_str)
                .unwrap_or_default()
                .to_owned(),
            name: function.get("name").unwrap().as_str().unwrap().to_owned(),
            arguments_json: match function.get("arguments").unwrap() {
                Json::String(text) => text.clone(),
                object => object.to_python(),
            },
        }
    };
    ChatMessage {
        role: string("role").unwrap(),
        content: string("content").map_or(Content::None, Content::Text),
        reasoning_content: string("reasoning_content"),
        tool_calls: calls.iter().map(call).collect(),
        tool_call_id: string("tool_call_id").unwrap_or_default(),
        ..ChatMessage::default()
    }
}

pub fn chat(case: &Json) -> Chat {
    let list = |key: &str| case.get(key).and_then(Json::as_array).unwrap_or_default();
    Chat {
        messages: list("messages").iter().map(message).collect(),
        tools: list("tools")
            .iter()
            .map(|tool| Tool {
                function_json: tool.get("function").unwrap().to_python(),
                strict: false,
            })
            .collect(),
        ..Chat::default()
    }
}

#[test]
fn prompts_have_the_recorded_lengths() {
    let text = text();
    let mut seen = 0;
    for line in data("demo/prompts.jsonl").lines() {
        let case = json::parse(line).unwrap();
        let Some(Json::Number(tokens)) = case.get("prompt_tokens") else {
            continue;
        };
        let rendered = text.render_chat(&chat(&case)).unwrap();
        assert_eq!(rendered.ids.len().to_string(), **tokens, "{}", rendered.text);
        seen += 1;
    }
    assert!(seen >= 22);
}

#[test]
fn eos_comes_from_generation_config_then_from_the_tokenizer() {
    let text = text();
    assert_eq!(text.eos_token_ids(), [3071]);
    let without = Text {
        generation: GenerationConfig::default(),
        ..text
    };
    assert_eq!(without.eos_token_ids(), [3071]);
}

#[test]
fn a_model_without_a_template_says_so() {
    let text = Text {
        template: None,
        ..text()
    };
    assert!(
        text.render_chat(&Chat::default())
            .unwrap_err()
            .to_string()
            .contains("no chat template")
    );
}
