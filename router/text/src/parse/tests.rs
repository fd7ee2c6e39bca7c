//! The MiniMax-M2 cases, whole and cut in every way; what all of the parsers' tests share.

mod cuts;
mod formats;
mod malformed;
mod partial;

use std::sync::Arc;

use super::*;
use crate::{
    chat::{Tool, ToolSpec, read_tools},
    json::{self, Json},
    testing::{data, demo},
    tokenizer::Tokenizer,
};

/// A choice's whole output.
#[derive(Clone, Debug, Default, PartialEq)]
struct Parsed {
    reasoning: String,
    content: String,
    calls: Vec<(String, String)>,
}

fn format(tools: &str, reasoning: &str) -> Format {
    let names = ParserNames {
        reasoning: Some(reasoning.to_owned()),
        tool_calls: Some(tools.to_owned()),
    };
    Format::choose(&names, |_| None, None).unwrap()
}

fn rules(tools: Vec<ToolSpec>) -> CallRules {
    CallRules {
        tools: tools.into(),
        max_calls: u32::MAX,
        id_seed: 1,
    }
}

fn tools(functions: &[&str]) -> Vec<ToolSpec> {
    let tool = |json: &&str| Tool {
        function_json: (*json).to_owned(),
        ..Tool::default()
    };
    read_tools(&functions.iter().map(tool).collect::<Vec<_>>()).unwrap()
}

fn weather() -> Vec<ToolSpec> {
    tools(&[
        r#"{"name": "f", "parameters": {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}, "o": {"type": ["string", "null"]}}}}"#,
        r#"{"name": "g"}"#,
    ])
}

fn parse(parser: &mut dyn OutputParser, items: &[(Option<u32>, &str)], end: End) -> Parsed {
    let mut parsed = Parsed::default();
    let mut take = |pieces: Pieces| {
        parsed.content += &pieces.text;
        parsed.reasoning += &pieces.reasoning;
        for delta in pieces.tool_calls {
            if let Some(name) = delta.name {
                assert_eq!(delta.index as usize, parsed.calls.len());
                assert!(delta.id.is_some());
                parsed.calls.push((name, String::new()));
            }
            assert_eq!(delta.index as usize + 1, parsed.calls.len());
            parsed.calls.last_mut().unwrap().1 += &delta.arguments;
        }
    };
    for (id, text) in items {
        let mut pieces = Pieces::default();
        parser.push(*id, text, &mut pieces);
        take(pieces);
    }
    let mut pieces = Pieces::default();
    parser.finish(end, &mut pieces);
    take(pieces);
    parsed
}

/// Parses text whole, by character and cut at every place in two; all must agree.
fn run_end(format: &Format, tools: &[ToolSpec], thinking: bool, text: &str, end: End) -> Parsed {
    let cut = |pieces: &[&str]| {
        let items: Vec<_> = pieces.iter().map(|piece| (None, *piece)).collect();
        let mut parser = format.parser(Some(rules(tools.to_vec())), thinking).unwrap();
        parse(parser.as_mut(), &items, end)
    };
    let whole = cut(&[text]);
    let chars: Vec<String> = text.chars().map(String::from).collect();
    assert_eq!(
        cut(&chars.iter().map(String::as_str).collect::<Vec<_>>()),
        whole,
        "{text}"
    );
    for (at, _) in text.char_indices() {
        assert_eq!(cut(&[&text[..at], &text[at..]]), whole, "cut at {at}: {text}");
    }
    whole
}

fn run(format: &Format, text: &str) -> Parsed {
    let parsed = run_end(format, &weather(), false, text, End::Stop);
    for (_, arguments) in &parsed.calls {
        let whole = json::parse(arguments);
        assert!(matches!(whole, Ok(Json::Object(_))), "{arguments}");
    }
    parsed
}

fn calls(parsed: &Parsed) -> Vec<(&str, &str)> {
    parsed
        .calls
        .iter()
        .map(|(name, text)| (name.as_str(), text.as_str()))
        .collect()
}

fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

struct Case {
    name: String,
    tools: Vec<ToolSpec>,
    output: String,
    expect: Json,
}

fn cases() -> Vec<Case> {
    let text = data("text/tool_parser_cases.jsonl");
    let cases = text.lines().map(|line| json::parse(line).unwrap());
    let cases: Vec<Case> = cases
        .map(|case| {
            let functions = case.get("tools").and_then(Json::as_array).unwrap_or_default();
            let functions: Vec<String> = functions
                .iter()
                .map(|t| t.get("function").unwrap().to_python())
                .collect();
            Case {
                name: case.get("name").unwrap().as_str().unwrap().to_owned(),
                tools: tools(&functions.iter().map(String::as_str).collect::<Vec<_>>()),
                output: case.get("output").unwrap().as_str().unwrap().to_owned(),
                expect: case.get("expect").unwrap().clone(),
            }
        })
        .collect();
    assert_eq!(cases.len(), 36);
    cases
}

fn check(case: &Case, parsed: &Parsed) {
    let text = |key: &str| words(case.expect.get(key).and_then(Json::as_str).unwrap_or_default());
    assert_eq!(words(&parsed.reasoning), text("reasoning"), "{}", case.name);
    assert_eq!(words(&parsed.content), text("content"), "{}", case.name);
    let expect = case.expect.get("tool_calls").and_then(Json::as_array).unwrap();
    assert_eq!(parsed.calls.len(), expect.len(), "{}", case.name);
    for ((name, arguments), expect) in parsed.calls.iter().zip(expect) {
        assert_eq!(expect.get("name"), Some(&Json::from(name.as_str())));
        // Same digits and key order too, which is more than equal values.
        assert_eq!(
            *arguments,
            expect.get("arguments").unwrap().to_python(),
            "{}",
            case.name
        );
    }
}

#[test]
fn minimax_cases_as_text_in_every_cut() {
    let format = format("minimax_m2", "minimax_m2");
    for case in cases() {
        check(
            &case,
            &run_end(&format, &case.tools, true, &case.output, End::Stop),
        );
    }
}

#[test]
fn minimax_cases_as_tokens() {
    let tokenizer = Arc::new(Tokenizer::load(&demo()).unwrap());
    let format = Format::choose(&ParserNames::default(), |text| tokenizer.token_to_id(text), None).unwrap();
    assert_eq!(format.names(), ("minimax_m2", "minimax_m2"));
    for case in cases() {
        let ids = tokenizer.encode(&case.output, false).unwrap();
        let mut detokenizer = crate::detokenize::Detokenizer::new(tokenizer.clone(), true);
        let mut items = Vec::new();
        for &id in &ids {
            let mut text = String::new();
            detokenizer.push(id, &mut text);
            items.push((Some(id), text));
        }
        let items: Vec<_> = items.iter().map(|(id, text)| (*id, text.as_str())).collect();
        let mut parser = format.parser(Some(rules(case.tools.clone())), true).unwrap();
        check(&case, &parse(parser.as_mut(), &items, End::Stop));
    }
}

#[test]
fn with_ids_only_tokens_are_markers() {
    let id = |text: &str| {
        [
            "<think>",
            "</think>",
            "<minimax:tool_call>",
            "</minimax:tool_call>",
        ]
        .iter()
        .position(|marker| *marker == text)
        .map(|index| index as u32 + 1)
    };
    let format = Format::choose(&ParserNames::default(), id, None).unwrap();
    let mut parser = format.parser(Some(rules(weather())), false).unwrap();
    let text = "a</think><minimax:tool_call><invoke name=\"g\"></invoke>";
    let parsed = parse(parser.as_mut(), &[(Some(9), text)], End::Stop);
    assert_eq!((parsed.content.as_str(), parsed.calls.len()), (text, 0));
    let mut parser = format.parser(Some(rules(weather())), true).unwrap();
    let items = [
        (Some(9), "r<thi"),
        (Some(2), "</think>"),
        (Some(3), ""),
        (Some(9), "<invoke name=g>"),
        (Some(4), ""),
        (Some(9), "x"),
    ];
    let parsed = parse(parser.as_mut(), &items, End::Stop);
    assert_eq!(
        (parsed.reasoning.as_str(), parsed.content.as_str()),
        ("r<thi", "x")
    );
    assert_eq!(calls(&parsed), [("g", "{}")]);
}

#[test]
fn line_breaks_of_the_template_are_taken_off() {
    let format = format("minimax_m2", "minimax_m2");
    let parsed = run_end(
        &format,
        &weather(),
        true,
        "\nr\n\n</think>\n\n\na \n\n<minimax:tool_call>\n</minimax:tool_call>\n",
        End::Stop,
    );
    assert_eq!(parsed.reasoning, "\nr\n");
    assert_eq!(parsed.content, "\na \n\n");
    let parsed = run_end(&format, &weather(), true, "r</think>a\n", End::Cut);
    assert_eq!((parsed.reasoning.as_str(), parsed.content.as_str()), ("r", "a\n"));
}

#[test]
fn a_value_may_hold_the_formats_own_tags() {
    let format = format("minimax_m2", "minimax_m2");
    let value = "{{ '<minimax:tool_call>' }}<invoke name=\"x\"></invoke></minimax:tool_call></think>";
    let text = format!(
        "<minimax:tool_call><invoke name=\"f\"><parameter name=\"s\">{value}</parameter></invoke></minimax:tool_call>."
    );
    let parsed = run(&format, &text);
    let arguments = json::object([("s", Json::from(value))]).to_python();
    assert_eq!(calls(&parsed), [("f", arguments.as_str())]);
    assert_eq!(parsed.content, ".");
}

#[test]
fn repeated_parameters_and_self_closing_calls() {
    let format = format("minimax_m2", "minimax_m2");
    let parsed = run(
        &format,
        "<minimax:tool_call><invoke name=\"f\"><parameter name=\"s\">1</parameter><parameter name=\"s\">2</parameter><parameter name=\"o\">\nnull </parameter></invoke><invoke name=\"g\"/></minimax:tool_call>",
    );
    assert_eq!(calls(&parsed), [("f", r#"{"s": "1", "o": null}"#), ("g", "{}")]);
}

#[test]
fn only_one_call_without_parallel_calls() {
    let format = format("minimax_m2", "minimax_m2");
    let rules = CallRules {
        max_calls: 1,
        ..rules(weather())
    };
    let mut parser = format.parser(Some(rules), false).unwrap();
    let text = "<minimax:tool_call><invoke name=\"g\"></invoke><invoke name=\"f\"><parameter name=\"s\">x</parameter></invoke></minimax:tool_call>";
    assert_eq!(
        calls(&parse(parser.as_mut(), &[(None, text)], End::Stop)),
        [("g", "{}")]
    );
}
