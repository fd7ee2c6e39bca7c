//! Forced and strict tool calls.

use super::*;

pub(super) fn tool_chat(tool_choice: ToolChoice, strict: bool, parallel: bool) -> Chat {
    let tool = |json: &str| Tool {
        function_json: json.to_owned(),
        strict,
        grammar: String::new(),
    };
    Chat {
        messages: vec![ChatMessage {
            role: "user".to_owned(),
            content: Content::Text("go".to_owned()),
            ..ChatMessage::default()
        }],
        tools: vec![
            tool(
                r#"{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}, "days": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}}, "required": ["city", "unit", "days"]}}"#,
            ),
            tool(r#"{"name": "now", "parameters": {"type": "object", "properties": {}}}"#),
        ],
        tool_choice,
        parallel_tool_calls: Some(parallel),
        ..Chat::default()
    }
}

/// Feeds an output with control tokens; says how many tokens the grammar took, and whether it may end.
pub(super) fn follow(grammar: &Grammar, output: &str) -> (bool, bool) {
    let mut matcher = grammar.matcher();
    for token in text().tokenizer().encode(output, false).unwrap() {
        if !allows(&matcher.mask().unwrap(), token) {
            return (false, false);
        }
        matcher.consume(token).unwrap();
    }
    (true, matcher.may_end())
}

#[test]
fn forced_calls_are_in_the_models_format() {
    let call = |body: &str| format!("r\n</think>\n\n\n<minimax:tool_call>\n{body}</minimax:tool_call>");
    let weather = "<invoke name=\"get_weather\">\n<parameter name=\"city\">Bonn\n</i></parameter>\n<parameter name=\"unit\">c</parameter>\n<parameter name=\"days\">3</parameter>\n</invoke>\n";
    let now = "<invoke name=\"now\">\n</invoke>\n";
    let compile = |choice, strict, parallel| {
        let prompt = text().render_chat(&tool_chat(choice, strict, parallel)).unwrap();
        let constraint = text().constraint(Some(&prompt.output), None).unwrap()?;
        let end = text().reasoning_end(Some(&prompt.output));
        assert_eq!(end, Some(THINK_END));
        Some(compiler().compile(&constraint, end).unwrap())
    };
    assert!(compile(ToolChoice::Auto, false, true).is_none());
    assert!(compile(ToolChoice::None, true, true).is_none());

    let required = compile(ToolChoice::Required, true, true).unwrap();
    assert_eq!(follow(&required, &call(weather)), (true, true));
    assert_eq!(follow(&required, &call(&format!("{now}{weather}"))), (true, true));
    assert_eq!(follow(&required, "r\n</think>\n\nNo."), (false, false));
    assert_eq!(
        follow(&required, &call("<invoke name=\"other\">\n</invoke>\n")),
        (false, false)
    );
    assert_eq!(
        follow(&required, &call(&weather.replace(">3<", ">three<"))),
        (false, false)
    );
    assert_eq!(
        follow(&required, &call(&weather.replace(">c<", ">k<"))),
        (false, false)
    );
    let tags = "<parameter name=\"tags\">[\"a\", \"b\"]</parameter>\n</invoke>";
    assert_eq!(
        follow(&required, &call(&weather.replace("</invoke>", tags))),
        (true, true)
    );

    let named = compile(ToolChoice::Named("now".to_owned()), false, false).unwrap();
    assert_eq!(follow(&named, &call(now)), (true, true));
    assert_eq!(follow(&named, &call(&format!("{now}{now}"))), (false, false));
    assert_eq!(follow(&named, &call(weather)), (false, false));

    // The one tool that must be called follows its schema, strict or not.
    let only = compile(ToolChoice::Named("get_weather".to_owned()), false, true).unwrap();
    assert_eq!(follow(&only, &call(weather)), (true, true));
    assert_eq!(
        follow(&only, &call(&weather.replace(">c<", ">k<"))),
        (false, false)
    );
    let without_days = weather.replace("<parameter name=\"days\">3</parameter>\n", "");
    assert_eq!(follow(&only, &call(&without_days)), (false, false));
    // What the grammar cannot say of it is left open.
    let mut chat = tool_chat(ToolChoice::Required, false, true);
    chat.tools.truncate(1);
    let odd = r#""days": {"type": "integer", "not": {"const": 3}}"#;
    let odd = chat.tools[0]
        .function_json
        .replace(r#""days": {"type": "integer"}"#, odd);
    chat.tools[0].function_json = odd;
    let prompt = text().render_chat(&chat).unwrap();
    let constraint = text().constraint(Some(&prompt.output), None).unwrap().unwrap();
    let odd = compiler().compile(&constraint, Some(THINK_END)).unwrap();
    assert_eq!(follow(&odd, &call(weather)), (true, true));

    let loose = compile(ToolChoice::Required, false, true).unwrap();
    assert_eq!(
        follow(&loose, &call(&weather.replace(">3<", ">three<"))),
        (true, true)
    );

    let auto = compile(ToolChoice::Auto, true, true).unwrap();
    assert_eq!(follow(&auto, "r</think>\n\nJust text."), (true, true));
    assert_eq!(follow(&auto, &format!("{}More.", call(weather))), (true, true));
    assert_eq!(
        follow(&auto, &call(&weather.replace(">3<", ">three<"))),
        (false, false)
    );

    // What a forced grammar lets through, the parser reads as a whole call.
    let prompt = text()
        .render_chat(&tool_chat(ToolChoice::Required, true, true))
        .unwrap();
    let mut output = text()
        .output(Default::default(), Some(&prompt.output), 0)
        .unwrap();
    let ids = text().tokenizer().encode(&call(weather), false).unwrap();
    let (first, last) = (output.push(&ids), output.finish(End::Stop));
    assert_eq!(
        first.tool_calls[0].arguments,
        r#"{"city": "Bonn\n</i>", "unit": "c", "days": 3}"#
    );
    assert_eq!((first.text + &last.text, output.tool_calls()), (String::new(), 1));
}

#[test]
fn forced_calls_of_other_formats() {
    use crate::parse::ParserNames;
    let tokenizer = text().tokenizer().clone();
    for (name, output) in [
        (
            "hermes",
            "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
        ),
        (
            "qwen3_coder",
            "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        ),
        ("json", "{\"name\": \"now\", \"parameters\": {}}"),
        (
            "deepseek_v31",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        (
            "harmony",
            "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}",
        ),
    ] {
        let names = ParserNames {
            reasoning: Some("none".to_owned()),
            tool_calls: Some(name.to_owned()),
        };
        let format = Format::choose(&names, |_| None, None).unwrap();
        let prompt = text()
            .render_chat(&tool_chat(ToolChoice::Required, true, true))
            .unwrap();
        let constraint = tool_constraint(&format, &prompt.output, None).unwrap().unwrap();
        let grammar = compile(&constraint).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(accepts(&grammar, output), "{name}");
        let mut parser = format
            .parser(
                Some(crate::parse::CallRules {
                    tools: prompt.output.tools.clone(),
                    max_calls: 9,
                    id_seed: 0,
                }),
                false,
            )
            .unwrap();
        let mut pieces = crate::parse::Pieces::default();
        parser.push(None, output, &mut pieces);
        parser.finish(End::Stop, &mut pieces);
        assert_eq!(pieces.tool_calls[0].name.as_deref(), Some("now"), "{name}");
    }
    assert!(!tokenizer.added_tokens().is_empty());
}

/// With tools that may be called, an answer of a given form is one of two outputs; with forced ones it is a mistake.
#[test]
fn calls_or_an_answer_of_the_form_asked_for() {
    let answer =
        schema(r#"{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}"#);
    let constraint = |choice| {
        let prompt = text().render_chat(&tool_chat(choice, false, true)).unwrap();
        text().constraint(Some(&prompt.output), Some(answer.clone()))
    };
    let either = constraint(ToolChoice::Auto).unwrap().unwrap();
    let either = compiler().compile(&either, Some(THINK_END)).unwrap();
    let now = "<minimax:tool_call>\n<invoke name=\"now\">\n</invoke>\n</minimax:tool_call>";
    for (output, taken) in [
        ("r\n</think>\n\n{\"ok\": true}".to_owned(), (true, true)),
        (format!("r\n</think>\n\n{now}"), (true, true)),
        (format!("r\n</think>\n\n\n{now}"), (true, true)),
        ("r\n</think>\n\nYes.".to_owned(), (false, false)),
        ("r\n</think>\n\n{\"ok\": 1}".to_owned(), (false, false)),
    ] {
        assert_eq!(follow(&either, &output), taken, "{output}");
    }
    assert_eq!(constraint(ToolChoice::None).unwrap(), Some(answer.clone()));
    let error = constraint(ToolChoice::Required).unwrap_err();
    assert_eq!(error.field(), Some("structured"));
}

#[test]
fn a_schema_that_is_none_is_refused_by_its_tools_name() {
    for strict in [false, true] {
        let mut chat = tool_chat(ToolChoice::Named("now".to_owned()), strict, true);
        chat.tools[1].function_json =
            r#"{"name": "now", "parameters": {"type": "object", "properties": {"zone": {"type": "place"}}}}"#
                .to_owned();
        let prompt = text().render_chat(&chat).unwrap();
        let constraint = text().constraint(Some(&prompt.output), None).unwrap().unwrap();
        let error = compile(&constraint).map(drop).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tools: \"now\".parameters: Invalid type: place",
            "strict: {strict}"
        );
    }
}

#[test]
fn errors_show_no_line_that_the_client_did_not_write() {
    let error = compile(&regex("a(")).map(drop).unwrap_err().to_string();
    assert!(
        error.starts_with("regex: ") && error.contains("unclosed group"),
        "{error}"
    );
    assert!(!error.contains("start:"), "{error}");
    let error = compile(&grammar("start: \"a\" b\n"))
        .map(drop)
        .unwrap_err()
        .to_string();
    assert!(error.contains("start: \"a\" b"), "{error}");
}
