//! Forced and strict tool calls.

use super::*;

fn tool_chat(tool_choice: ToolChoice, strict: bool, parallel: bool) -> Chat {
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
fn follow(grammar: &Grammar, output: &str) -> (bool, bool) {
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

/// As a coding agent gives the form of its edits.
const PATCH: &str = r#"start: begin hunk+ end
begin: "*** Begin Patch" LF
end: "*** End Patch" LF?
hunk: "*** Update File: " /.+/ LF line+
line: ("+" | "-" | " ") /.*/ LF -> line
%import common.LF
"#;

/// A tool whose one parameter is a text of this grammar.
fn edits(grammar: &str, tool_choice: ToolChoice, strict: bool) -> Chat {
    Chat {
        tools: vec![
            Tool {
                function_json: r#"{"name": "edit", "parameters": {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}}"#.to_owned(),
                strict,
                grammar: grammar.to_owned(),
            },
            tool_chat(ToolChoice::Auto, false, true).tools.remove(1),
        ],
        ..tool_chat(tool_choice, strict, true)
    }
}

fn edit(input: &str) -> String {
    format!(
        "r\n</think>\n\n\n<minimax:tool_call>\n<invoke name=\"edit\">\n<parameter name=\"input\">{input}</parameter>\n</invoke>\n</minimax:tool_call>"
    )
}

#[test]
fn a_parameter_may_have_a_grammar_of_its_own() {
    let compile = |grammar: &str, choice, strict| {
        let prompt = text().render_chat(&edits(grammar, choice, strict)).unwrap();
        let constraint = text().constraint(Some(&prompt.output), None).unwrap()?;
        Some(compiler().compile(&constraint, Some(THINK_END)).unwrap())
    };
    let named = || ToolChoice::Named("edit".to_owned());
    let patch = "*** Begin Patch\n*** Update File: a.html\n-<p></p\n+<b>é</i>\n*** End Patch";
    for (choice, strict) in [
        (named(), false),
        (ToolChoice::Auto, true),
        (ToolChoice::Required, true),
    ] {
        let held = compile(PATCH, choice, strict).unwrap();
        assert_eq!(follow(&held, &edit(patch)), (true, true));
        assert_eq!(follow(&held, &edit(&format!("{patch}\n"))), (true, true));
        for wrong in [
            "",
            "Begin",
            &patch.replace("-<p>", "<p>"),
            &patch.replace("*** End Patch", ""),
            // The tag ends the value wherever it is: within a line it would cut it.
            &patch.replace("</p", "</parameter>"),
        ] {
            assert_eq!(follow(&held, &edit(wrong)), (false, false), "{wrong}");
        }
    }
    // What takes any text takes all but the closing tag.
    let any = compile("start: /(.|\\n)+/", named(), false).unwrap();
    assert_eq!(follow(&any, &edit("a\n</b> <")), (true, true));
    let digits = compile("start: /[0-9]{3}/", named(), false).unwrap();
    assert_eq!(follow(&digits, &edit("123")), (true, true));
    assert_eq!(follow(&digits, &edit("12")), (false, false));
    // Where calls are not held to a schema, they are not to a grammar.
    assert!(compile(PATCH, ToolChoice::Auto, false).is_none());
    let required = compile(PATCH, ToolChoice::Required, false).unwrap();
    assert_eq!(follow(&required, &edit("Begin")), (true, true));
}

#[test]
fn a_grammar_that_cannot_be_followed_is_an_error_where_it_was_promised() {
    let nested = "start: \"(\" start? \")\"";
    let constraint = |grammar: &str, strict| {
        let prompt = text()
            .render_chat(&edits(grammar, ToolChoice::Named("edit".to_owned()), strict))
            .unwrap();
        text().constraint(Some(&prompt.output), None)
    };
    let error = constraint(nested, true).unwrap_err();
    assert_eq!(error.field(), Some("tools: \"edit\".grammar"));
    assert!(error.to_string().contains("start: refers to itself"), "{error}");
    let free = compiler()
        .compile(&constraint(nested, false).unwrap().unwrap(), Some(THINK_END))
        .unwrap();
    assert_eq!(follow(&free, &edit("((")), (true, true));
    // What is no grammar at all is one wherever it is read.
    let broken = constraint("start: /[/", false).unwrap().unwrap();
    let error = compiler().compile(&broken, Some(THINK_END)).err().unwrap();
    assert_eq!(error.field(), Some("tools"));
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
