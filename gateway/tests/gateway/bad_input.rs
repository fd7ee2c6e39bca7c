//! Bodies that are wrong: each is refused with the field's name, and none reaches the router.

use crate::router::{hello, start_saying};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// A chat with `fields` put over it, as text.
fn chat(fields: &str) -> String {
    format!("{{\"messages\":[{{\"role\":\"user\",\"content\":\"a\"}}],{fields}}}")
}

fn text(fields: &str) -> String {
    format!("{{\"prompt\":\"a\",{fields}}}")
}

/// Path, body, and the field that is wrong in it.
type Case = (&'static str, String, &'static str);

/// Types and ranges of numbers.
fn numbers() -> Vec<Case> {
    vec![
        (CHAT, chat(r#""n":0"#), "n"),
        (CHAT, chat(r#""n":-1"#), "n"),
        (CHAT, chat(r#""n":129"#), "n"),
        (CHAT, chat(r#""n":1000000000"#), "n"),
        (CHAT, chat(r#""n":1.5"#), "n"),
        (CHAT, chat(r#""n":"2""#), "n"),
        (CHAT, chat(r#""max_tokens":9223372036854775808"#), "max_tokens"),
        (CHAT, chat(r#""max_tokens":1e30"#), "max_tokens"),
        (CHAT, chat(r#""max_tokens":"5""#), "max_tokens"),
        (
            CHAT,
            chat(r#""max_completion_tokens":9223372036854775808"#),
            "max_completion_tokens",
        ),
        (CHAT, chat(r#""temperature":"hot""#), "temperature"),
        (CHAT, chat(r#""temperature":1e300"#), "temperature"),
        (CHAT, chat(r#""temperature":[1]"#), "temperature"),
        (CHAT, chat(r#""top_p":-1e300"#), "top_p"),
        (CHAT, chat(r#""top_k":4294967296"#), "top_k"),
        (CHAT, chat(r#""min_p":true"#), "min_p"),
        (CHAT, chat(r#""presence_penalty":{}"#), "presence_penalty"),
        (CHAT, chat(r#""frequency_penalty":"x""#), "frequency_penalty"),
        (CHAT, chat(r#""repetition_penalty":1e39"#), "repetition_penalty"),
        (CHAT, chat(r#""seed":1.5"#), "seed"),
        (CHAT, chat(r#""seed":18446744073709551616"#), "seed"),
        (CHAT, chat(r#""seed":"a""#), "seed"),
        (CHAT, chat(r#""priority":9223372036854775807"#), "priority"),
        (CHAT, chat(r#""priority":-9223372036854775808"#), "priority"),
        (CHAT, chat(r#""min_tokens":1e19"#), "min_tokens"),
        (
            CHAT,
            chat(r#""truncate_prompt_tokens":1e19"#),
            "truncate_prompt_tokens",
        ),
        (CHAT, chat(r#""logprobs":5"#), "logprobs"),
        (CHAT, chat(r#""logprobs":"yes""#), "logprobs"),
        (CHAT, chat(r#""top_logprobs":5"#), "top_logprobs"),
        (CHAT, chat(r#""logprobs":true,"top_logprobs":21"#), "top_logprobs"),
        (CHAT, chat(r#""logprobs":true,"top_logprobs":-1"#), "top_logprobs"),
        (
            CHAT,
            chat(r#""logprobs":true,"top_logprobs":18446744073709551615"#),
            "top_logprobs",
        ),
        (CHAT, chat(r#""prompt_logprobs":-1"#), "prompt_logprobs"),
        (TEXT, text(r#""logprobs":true"#), "logprobs"),
        (TEXT, text(r#""logprobs":21"#), "logprobs"),
        (TEXT, text(r#""logprobs":18446744073709551615"#), "logprobs"),
        (TEXT, text(r#""best_of":129"#), "best_of"),
    ]
}

/// Maps, lists, flags.
fn maps_lists_and_flags() -> Vec<Case> {
    vec![
        (CHAT, chat(r#""logit_bias":{"a":1}"#), "logit_bias"),
        (CHAT, chat(r#""logit_bias":{"-1":1}"#), "logit_bias"),
        (CHAT, chat(r#""logit_bias":{"4294967296":1}"#), "logit_bias"),
        (CHAT, chat(r#""logit_bias":{"1":1e300}"#), "logit_bias"),
        (CHAT, chat(r#""logit_bias":[1]"#), "logit_bias"),
        (CHAT, chat(r#""logit_bias":{"1":"x"}"#), "logit_bias.1"),
        (CHAT, chat(r#""stop":5"#), "stop"),
        (CHAT, chat(r#""stop":["a",5]"#), "stop[1]"),
        (CHAT, chat(r#""stop_token_ids":[-1]"#), "stop_token_ids[0]"),
        (
            CHAT,
            chat(r#""stop_token_ids":[4294967296]"#),
            "stop_token_ids[0]",
        ),
        (CHAT, chat(r#""stream":"yes""#), "stream"),
        (
            CHAT,
            chat(r#""stream_options":{"include_usage":true}"#),
            "stream_options",
        ),
        (
            CHAT,
            chat(r#""stream":true,"stream_options":{"include_usage":1}"#),
            "stream_options.include_usage",
        ),
        (CHAT, chat(r#""ignore_eos":0"#), "ignore_eos"),
        (CHAT, chat(r#""model":5"#), "model"),
        (CHAT, chat(r#""n":1,"n":2"#), "n"),
        (
            CHAT,
            chat(r#""add_generation_prompt":true,"continue_final_message":true"#),
            "continue_final_message",
        ),
    ]
}

/// Prompts.
fn prompts() -> Vec<Case> {
    vec![
        (TEXT, String::from("{}"), "prompt"),
        (TEXT, String::from(r#"{"prompt":null}"#), "prompt"),
        (TEXT, String::from(r#"{"prompt":5}"#), "prompt"),
        (TEXT, String::from(r#"{"prompt":{}}"#), "prompt"),
        (TEXT, String::from(r#"{"prompt":[]}"#), "prompt"),
        (TEXT, String::from(r#"{"prompt":["a",1]}"#), "prompt"),
        (TEXT, String::from(r#"{"prompt":[1,-1]}"#), "prompt[1]"),
        (TEXT, String::from(r#"{"prompt":[4294967296]}"#), "prompt[0]"),
        (TEXT, String::from(r#"{"prompt":[[1],[1.5]]}"#), "prompt[1][0]"),
        (
            TEXT,
            format!("{{\"prompt\":[{}]}}", vec!["\"a\""; 1025].join(",")),
            "prompt",
        ),
        (
            TEXT,
            format!(
                "{{\"prompt\":[{}],\"stop\":\"{}\"}}",
                vec!["\"a\""; 1024].join(","),
                "b".repeat(1 << 15)
            ),
            "prompt",
        ),
    ]
}

/// Messages.
fn messages() -> Vec<Case> {
    vec![
        (CHAT, String::from("{}"), "messages"),
        (CHAT, String::from(r#"{"messages":[]}"#), "messages"),
        (CHAT, String::from(r#"{"messages":"hi"}"#), "messages"),
        (CHAT, String::from(r#"{"messages":["hi"]}"#), "messages[0]"),
        (
            CHAT,
            String::from(r#"{"messages":[{"content":"a"}]}"#),
            "messages[0].role",
        ),
        (
            CHAT,
            String::from(r#"{"messages":[{"role":"","content":"a"}]}"#),
            "messages[0]",
        ),
        (
            CHAT,
            String::from(r#"{"messages":[{"role":5}]}"#),
            "messages[0].role",
        ),
        (
            CHAT,
            String::from(r#"{"messages":[{"role":"user","role":"user"}]}"#),
            "messages[0].role",
        ),
        (
            CHAT,
            String::from(r#"{"messages":[{"role":"user","content":5}]}"#),
            "messages[0].content",
        ),
        (
            CHAT,
            String::from(r#"{"messages":[{"role":"user","content":[{"text":"a"}]}]}"#),
            "messages[0].content[0].type",
        ),
        (
            CHAT,
            String::from(r#"{"messages":[{"role":"user","content":[{"type":"text"}]}]}"#),
            "messages[0].content[0].text",
        ),
        (
            CHAT,
            String::from(
                r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]}"#,
            ),
            "messages[0].content[0]",
        ),
        (
            CHAT,
            String::from(r#"{"messages":[{"role":"user","x":{"a":1,"a":2}}]}"#),
            "messages[0].x",
        ),
        (
            CHAT,
            String::from(r#"{"messages":[{"role":"assistant","tool_calls":[{"id":"a"}]}]}"#),
            "messages[0].tool_calls[0].function",
        ),
        (
            CHAT,
            String::from(
                r#"{"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"a","arguments":5}}]}]}"#,
            ),
            "messages[0].tool_calls[0]",
        ),
    ]
}

/// Tools.
fn tools() -> Vec<Case> {
    vec![
        (CHAT, chat(r#""tools":{}"#), "tools"),
        (CHAT, chat(r#""tools":[5]"#), "tools[0]"),
        (CHAT, chat(r#""tools":[{"type":"retrieval"}]"#), "tools[0].type"),
        (
            CHAT,
            chat(r#""tools":[{"type":"function","function":{"name":5}}]"#),
            "tools[0].function.name",
        ),
        (
            CHAT,
            chat(r#""tools":[{"type":"function"}]"#),
            "tools[0].function",
        ),
        (
            CHAT,
            chat(r#""tools":[{"type":"function","function":{}}]"#),
            "tools[0].function.name",
        ),
        (
            CHAT,
            chat(r#""tools":[{"type":"function","function":{"name":""}}]"#),
            "tools[0].function.name",
        ),
        (
            CHAT,
            chat(r#""tools":[{"type":"function","function":{"name":"a","parameters":{"x":1,"x":2}}}]"#),
            "tools[0].function",
        ),
        (
            CHAT,
            chat(r#""tools":[{"type":"function","function":{"name":"a","parameters":{"x":1e400}}}]"#),
            "tools[0].function",
        ),
        (
            CHAT,
            chat(r#""tools":[{"type":"function","function":{"name":"a","description":"\ud800"}}]"#),
            "tools[0].function",
        ),
        (CHAT, chat(r#""tool_choice":"any""#), "tool_choice"),
        (CHAT, chat(r#""tool_choice":"required""#), "tool_choice"),
        (
            CHAT,
            chat(r#""tool_choice":{"type":"function","function":{"name":"a"}}"#),
            "tool_choice",
        ),
        (
            CHAT,
            chat(r#""tool_choice":{"type":"function"}"#),
            "tool_choice.function",
        ),
    ]
}

/// Constraints.
fn constraints() -> Vec<Case> {
    vec![
        (
            CHAT,
            chat(r#""response_format":{"type":"xml"}"#),
            "response_format.type",
        ),
        (
            CHAT,
            chat(r#""response_format":{"type":"json_schema"}"#),
            "response_format.json_schema.schema",
        ),
        (
            CHAT,
            chat(r#""response_format":{"type":"json_schema","json_schema":{"schema":5}}"#),
            "response_format.json_schema.schema",
        ),
        (
            CHAT,
            chat(r#""response_format":{"type":"json_schema","json_schema":{"schema":{"a":1,"a":1}}}"#),
            "response_format.json_schema.schema",
        ),
        (CHAT, chat(r#""guided_json":"{""#), "guided_json"),
        (CHAT, chat(r#""guided_choice":"a""#), "guided_choice"),
        (
            CHAT,
            chat(r#""guided_regex":"a","guided_choice":["a"]"#),
            "guided_choice",
        ),
        (
            CHAT,
            chat(r#""structured_outputs":{"regex":"a","choice":["a"]}"#),
            "structured_outputs.choice",
        ),
        (CHAT, chat(r#""response_format":5"#), "response_format"),
        (CHAT, chat(r#""response_format":[]"#), "response_format"),
        (CHAT, chat(r#""stream_options":true"#), "stream_options"),
        (
            CHAT,
            chat(r#""structured_outputs":{"structural_tag":{}}"#),
            "structured_outputs.structural_tag",
        ),
        (CHAT, chat(r#""chat_template_kwargs":[]"#), "chat_template_kwargs"),
        (
            CHAT,
            chat(r#""chat_template_kwargs":{"a":1,"a":2}"#),
            "chat_template_kwargs",
        ),
    ]
}

/// Asked for and not served.
fn not_served() -> Vec<Case> {
    vec![
        (TEXT, text(r#""suffix":"b""#), "suffix"),
        (TEXT, text(r#""use_beam_search":true"#), "use_beam_search"),
        (CHAT, chat(r#""chat_template":"{{ x }}""#), "chat_template"),
        (CHAT, chat(r#""functions":[]"#), "functions"),
        (CHAT, chat(r#""allowed_token_ids":[1]"#), "allowed_token_ids"),
        (
            CHAT,
            chat(r#""logits_processors":["os.system"]"#),
            "logits_processors",
        ),
        (CHAT, chat(r#""modalities":["audio"]"#), "modalities"),
        (CHAT, chat(r#""separate_reasoning":false"#), "separate_reasoning"),
        (CHAT, chat(r#""stop_regex":"a+""#), "stop_regex"),
        (TEXT, text(r#""lora_path":"a""#), "lora_path"),
        (
            CHAT,
            chat(r#""custom_logit_processor":"a""#),
            "custom_logit_processor",
        ),
        (
            CHAT,
            chat(r#""return_hidden_states":true"#),
            "return_hidden_states",
        ),
        (CHAT, chat(r#""regex":"a","ebnf":"root ::= \"a\"""#), "ebnf"),
        (CHAT, chat(r#""echo":true"#), "echo"),
        (CHAT, chat(r#""best_of":2"#), "best_of"),
    ]
}

#[tokio::test]
async fn wrong_fields_are_named() {
    let setup = start_saying(hello()).await;
    let cases = [
        numbers(),
        maps_lists_and_flags(),
        prompts(),
        messages(),
        tools(),
        constraints(),
        not_served(),
    ]
    .concat();
    for (path, body, param) in &cases {
        let reply = setup.client.post_text(path, body).await;
        let shown: String = body.chars().take(120).collect();
        assert_eq!(reply.status, 400, "{shown}: {reply:?}");
        let (_, message, found, _) = reply.error();
        assert_eq!(found, *param, "{shown}: {message}");
        // What is wrong is said in JSON's words.
        for rust in ["struct ", "f64", "i32", "i64", "u32", "a sequence", "a map"] {
            assert!(!message.contains(rust), "{shown}: {message}");
        }
    }
    assert!(cases.len() > 100);
    assert!(
        setup.seen.generate.lock().unwrap().is_empty(),
        "nothing of it reached the router"
    );
}
