//! The formats beside MiniMax-M2's, and how a format is chosen.

use super::*;

#[test]
fn hermes() {
    let format = format("hermes", "qwen3");
    let parsed = run(
        &format,
        "<think>\nr\n</think>\n\nHi.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"s\": \"</tool_call>\", \"n\": 1.10}}\n</tool_call>\n<tool_call>{\"arguments\": {}, \"name\": \"g\"}</tool_call>",
    );
    assert_eq!((parsed.reasoning.as_str(), parsed.content.as_str()), ("r", "Hi."));
    assert_eq!(
        calls(&parsed),
        [("f", r#"{"s": "</tool_call>", "n": 1.10}"#), ("g", "{}")]
    );
}

#[test]
fn malformed_hermes_calls_spoil_nothing() {
    let format = format("hermes", "none");
    for (bad, first) in [
        (r#"{"name": "f", "arguments": {"s": "x"#, Some(r#"{"s": "x"}"#)),
        (
            r#"{"name": "f", "arguments": {"s": "x", "n": "#,
            Some(r#"{"s": "x"}"#),
        ),
        (r#"{"name": "f", "arguments": {"s": x}}"#, Some("{}")),
        (r#"{"name": "f", "arguments": 3}"#, Some("{}")),
        (r#"{"name": "f"}"#, Some("{}")),
        (r#"{"name": "f", "arguments": "{\"n\": 2}"}"#, Some(r#"{"n": 2}"#)),
        (
            r#"{"name": "f", "parameters": {"n": 2}} trailing"#,
            Some(r#"{"n": 2}"#),
        ),
        (r#"{"name": 3}"#, None),
        (r#"{"name": "unknown", "arguments": {"s": 1}}"#, None),
        ("nonsense", None),
        ("", None),
    ] {
        for close in ["</tool_call>", "</tool_call>\n", "\n", ""] {
            let text = format!(
                "<tool_call>{bad}{close}<tool_call>{{\"name\": \"g\", \"arguments\": {{}}}}</tool_call>"
            );
            let parsed = run(&format, &text);
            let mut expect: Vec<_> = first.into_iter().map(|arguments| ("f", arguments)).collect();
            expect.push(("g", "{}"));
            assert_eq!(calls(&parsed), expect, "{text}");
        }
    }
}

#[test]
fn qwen3_coder() {
    let format = format("qwen3_coder", "none");
    let parsed = run(
        &format,
        "ok\n<tool_call>\n<function=f>\n<parameter=s>\n\na\nb\n\n</parameter>\n<parameter=n>\n5\n</parameter>\n</function>\n</tool_call>",
    );
    assert_eq!(calls(&parsed), [("f", r#"{"s": "\na\nb\n", "n": 5}"#)]);
}

#[test]
fn deepseek_v31() {
    let format = format("deepseek_v31", "deepseek_v31");
    let text = "r</think>Hi.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"s\": \"a\"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"s\": \"b<｜tool▁call▁end｜><｜tool▁call▁begin｜>nobody<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁call▁begin｜>g<｜tool▁sep｜><｜tool▁call▁end｜><｜tool▁calls▁end｜>.";
    let parsed = run_end(&format, &weather(), true, text, End::Stop);
    assert_eq!(
        (parsed.reasoning.as_str(), parsed.content.as_str()),
        ("r", "Hi..")
    );
    assert_eq!(
        calls(&parsed),
        [("f", r#"{"s": "a"}"#), ("f", r#"{"s": "b"}"#), ("g", "{}")]
    );
    let cut = run_end(
        &format,
        &weather(),
        false,
        "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"s\": \"b",
        End::Cut,
    );
    assert_eq!(calls(&cut), [("f", r#"{"s": "b"#)]);
}

#[test]
fn harmony() {
    let format = format("harmony", "harmony");
    let parsed = run(
        &format,
        "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>commentary<|message|>I call.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"s\": \"x\"}<|call|><|start|>assistant to=functions.g<|channel|>commentary<|message|>{\"a\"<|start|>assistant<|channel|>final<|message|>Done.<|return|>",
    );
    assert_eq!(
        (parsed.reasoning.as_str(), parsed.content.as_str()),
        ("think", "I call.Done.")
    );
    assert_eq!(calls(&parsed), [("f", r#"{"s": "x"}"#), ("g", "{}")]);
    assert_eq!(run(&format, "no header").content, "no header");
    assert_eq!(run(&format, &"x".repeat(600)).content.len(), 600);
}

#[test]
fn plain_json() {
    let format = format("json", "none");
    let parsed = run(
        &format,
        "\n[{\"name\": \"f\", \"parameters\": {\"n\": 1}}, {\"name\": \"g\"}]",
    );
    assert_eq!(calls(&parsed), [("f", r#"{"n": 1}"#), ("g", "{}")]);
    for answer in [
        "{\"name\": \"unknown\"}",
        "[1, 2]",
        "{\"a\": 1} text",
        "{",
        "plain {\"name\": \"f\"}",
        "[]",
    ] {
        let parsed = run(&format, answer);
        assert_eq!((parsed.content.as_str(), parsed.calls.len()), (answer, 0));
    }
}

#[test]
fn parsers_are_chosen_by_name_or_by_the_checkpoint() {
    let choose = |tokens: &'static [&'static str], template: &str| {
        let id = |text: &str| tokens.iter().position(|t| *t == text).map(|i| i as u32);
        Format::choose(&ParserNames::default(), id, Some(template))
            .unwrap()
            .names()
    };
    assert_eq!(
        choose(&["<minimax:tool_call>", "</think>"], ""),
        ("minimax_m2", "minimax_m2")
    );
    assert_eq!(
        choose(&["<｜tool▁calls▁begin｜>"], "</think>"),
        ("deepseek_r1", "deepseek_v31")
    );
    assert_eq!(
        choose(&["<|channel|>", "<|message|>"], ""),
        ("harmony", "harmony")
    );
    assert_eq!(choose(&[], "<tool_call>\n{"), ("none", "hermes"));
    assert_eq!(choose(&[], "<tool_call>\n<function="), ("none", "qwen3_coder"));
    assert_eq!(choose(&[], ""), ("none", "none"));
    let names = |tools: &str, reasoning: &str| {
        let names = ParserNames {
            reasoning: Some(reasoning.to_owned()),
            tool_calls: Some(tools.to_owned()),
        };
        Format::choose(&names, |_| None, None)
    };
    let error = names("hermes2", "none").unwrap_err().to_string();
    assert!(error.contains("tool_call_parser") && error.contains("hermes2") && error.contains("minimax_m2"));
    assert!(names("harmony", "qwen3").is_err());
    assert!(
        names("none", "none")
            .unwrap()
            .parser(Some(rules(weather())), false)
            .is_none()
    );
}

#[test]
fn reasoning_starts_where_the_prompt_says() {
    let id = |text: &str| {
        ["<think>", "</think>"]
            .iter()
            .position(|t| *t == text)
            .map(|i| i as u32 + 1)
    };
    let format = Format::choose(&ParserNames::default(), id, None).unwrap();
    let starts = |prompt: &[u32]| format.starts_in_reasoning(prompt, "", &[9]);
    assert!(starts(&[5, 1, 5]));
    assert!(!starts(&[5, 1, 5, 2]));
    assert!(!starts(&[1, 9, 5]));
    let text = Format::choose(&ParserNames::default(), |_| None, Some("</think>")).unwrap();
    assert!(text.starts_in_reasoning(&[], "a<think>\n", &[]));
    assert!(!text.starts_in_reasoning(&[], "<think></think>", &[]));
}
