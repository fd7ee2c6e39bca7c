//! What a request for a chat completion becomes on its way to the router.

use conclave_proto::v1;
use conclave_proto::v1::generate_request::Prompt;
use conclave_proto::v1::structured_output::Kind;
use conclave_proto::v1::tool_choice::Mode;
use serde_json::json;

use crate::chat::request;
use crate::router::{hello, start, start_saying};

const PATH: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_conversation_reaches_the_router_whole() {
    let setup = start_saying(hello()).await;
    let body = json!({
        "model": "demo",
        "messages": [
            {"role": "developer", "content": "be brief", "current_date": "today"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "reasoning": "hm", "refusal": null, "annotations": [],
             "tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": "{\"z\": 1.0, \"a\": 2}"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "strict": true, "parameters": {"type": "object", "properties": {"z": {"maximum": 4242424242_u64}}}}}],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "parallel_tool_calls": false,
        "chat_template_kwargs": {"enable_thinking": false},
        "reasoning_effort": "low",
        "add_generation_prompt": true,
        "user": "u", "metadata": {"a": "b"}, "prediction": {"type": "content"}, "service_tier": "auto", "store": true,
        "nobody_knows_this": [1, {"a": 2}],
    });
    // The number must not pass through this test's own JSON values.
    let body = body
        .to_string()
        .replace("4242424242", "123456789012345678901234567890");
    let reply = setup
        .client
        .send(
            "POST",
            PATH,
            &[("content-type", "application/json")],
            body.as_bytes(),
        )
        .await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let Some(Prompt::Chat(chat)) = setup.seen.only().prompt else {
        panic!("no chat")
    };
    let roles: Vec<_> = chat
        .messages
        .iter()
        .map(|message| message.role.as_str())
        .collect();
    assert_eq!(roles, ["developer", "user", "assistant", "tool"]);
    assert_eq!(chat.messages[0].extra_json, r#"{"current_date":"today"}"#);
    let Some(v1::chat_message::Content::Parts(parts)) = &chat.messages[1].content else {
        panic!("no parts")
    };
    assert_eq!(
        parts
            .parts
            .iter()
            .map(|part| part.text.as_str())
            .collect::<Vec<_>>(),
        ["a", "b"]
    );
    let assistant = &chat.messages[2];
    assert_eq!(
        assistant.content,
        Some(v1::chat_message::Content::Text(String::new()))
    );
    assert_eq!(assistant.reasoning_content.as_deref(), Some("hm"));
    assert_eq!(assistant.tool_calls[0].arguments_json, r#"{"z": 1.0, "a": 2}"#);
    assert!(assistant.extra_json.is_empty());
    assert_eq!(chat.messages[3].tool_call_id, "c1");
    assert!(
        chat.tools[0].strict
            && chat.tools[0]
                .function_json
                .contains("123456789012345678901234567890")
    );
    let choice = chat.tool_choice.unwrap();
    assert_eq!((choice.mode(), choice.name.as_str()), (Mode::Named, "add"));
    assert_eq!(chat.parallel_tool_calls, Some(false));
    assert_eq!(
        chat.template_kwargs_json,
        r#"{"reasoning_effort":"low","enable_thinking":false}"#
    );
}

#[tokio::test]
async fn options_reach_the_router_in_its_words() {
    let setup = start_saying(hello()).await;
    let body = json!({
        "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": -0.5, "frequency_penalty": 0.25, "logit_bias": {"5": -100, "6": 1.5},
        "seed": -1, "max_tokens": 5, "max_completion_tokens": 7, "min_tokens": 2, "stop": "end",
        "stop_token_ids": [3], "ignore_eos": true, "bad_words": ["no"], "skip_special_tokens": false,
        "include_stop_str_in_output": true, "priority": 3, "cache_salt": "tenant", "truncate_prompt_tokens": 9,
        "continue_final_message": true, "user": null, "tools": null, "response_format": {"type": "text"},
    });
    let reply = setup.client.post(PATH, &request(body)).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let seen = setup.seen.only();
    let sampling = seen.sampling.unwrap();
    assert_eq!(sampling.temperature, Some(0.5));
    assert_eq!(sampling.top_k, Some(-1));
    assert_eq!(sampling.seed, Some(u64::MAX));
    assert_eq!(sampling.max_tokens, Some(7));
    assert_eq!(sampling.min_tokens, 2);
    assert_eq!(sampling.stop, ["end"]);
    assert_eq!(sampling.logit_bias.get(&5), Some(&-100.0));
    assert!(sampling.ignore_eos);
    let output = seen.output.unwrap();
    assert_eq!(
        (output.skip_special_tokens, output.include_stop_str_in_output),
        (Some(false), true)
    );
    // vLLM: low first; the proto: high first.
    assert_eq!(seen.priority, -3);
    assert_eq!(
        (seen.cache_salt.as_str(), seen.truncate_prompt_tokens, seen.n),
        ("tenant", Some(9), 1)
    );
    let Some(Prompt::Chat(chat)) = seen.prompt else {
        panic!("no chat")
    };
    assert_eq!(
        (chat.continue_final_message, chat.add_generation_prompt),
        (true, Some(false))
    );
}

#[tokio::test]
async fn what_was_not_said_stays_unsaid() {
    let setup = start_saying(hello()).await;
    setup
        .client
        .post(PATH, &json!({"messages": [{"role": "user", "content": "hi"}]}))
        .await;
    let seen = setup.seen.only();
    assert_eq!(seen.sampling, Some(v1::SamplingParams::default()));
    assert_eq!(seen.output, Some(v1::OutputOptions::default()));
    assert_eq!(
        (seen.model.as_str(), seen.structured, seen.priority),
        ("", None, 0)
    );
}

#[tokio::test]
async fn every_spelling_of_a_constraint_becomes_one() {
    let setup = start(|_| Ok(crate::router::say(hello()))).await;
    let schema = || json!({"type": "object"});
    for (field, expected) in [
        (
            json!({"response_format": {"type": "json_object"}}),
            Kind::JsonObject(true),
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema()}}}),
            Kind::JsonSchema(schema().to_string()),
        ),
        (
            json!({"structured_outputs": {"json": schema()}}),
            Kind::JsonSchema(schema().to_string()),
        ),
        (
            json!({"structured_outputs": {"regex": "a+"}}),
            Kind::Regex("a+".into()),
        ),
        (
            json!({"structured_outputs": {"choice": ["a", "b"]}}),
            Kind::Choice(v1::Choices {
                values: vec!["a".into(), "b".into()],
            }),
        ),
        (
            json!({"guided_json": schema().to_string()}),
            Kind::JsonSchema(schema().to_string()),
        ),
        (json!({"guided_regex": "a+"}), Kind::Regex("a+".into())),
        (
            json!({"guided_choice": ["a"]}),
            Kind::Choice(v1::Choices {
                values: vec!["a".into()],
            }),
        ),
        (
            json!({"guided_grammar": "start: \"a\""}),
            Kind::Grammar("start: \"a\"".into()),
        ),
        (
            json!({"json_schema": schema().to_string()}),
            Kind::JsonSchema(schema().to_string()),
        ),
        (json!({"regex": "a+"}), Kind::Regex("a+".into())),
        (
            json!({"ebnf": "root ::= \"a\""}),
            Kind::Grammar("root ::= \"a\"".into()),
        ),
    ] {
        let reply = setup.client.post(PATH, &request(field.clone())).await;
        assert_eq!(reply.status, 200, "{field}: {reply:?}");
        let seen = setup.seen.generate.lock().unwrap().pop().unwrap();
        assert_eq!(seen.structured.unwrap().kind, Some(expected), "{field}");
    }
    let two = request(json!({"guided_regex": "a", "response_format": {"type": "json_object"}}));
    assert_eq!(setup.client.post(PATH, &two).await.status, 400);
}
