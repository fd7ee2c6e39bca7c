//! Seeded mutations of recorded outputs through every tool parser, and of the released templates through the template
//! engine; `conclave_fuzz` says how long they run and how a failure is replayed.

use std::time::Duration;

use conclave_fuzz::{Random, is_replay, run};

use crate::{
    chat::{Tool, ToolSpec, read_tools},
    json::{self, Json},
    parse::{CallRules, End, Format, OutputParser, ParserNames, Pieces},
    template::{ChatTemplate, MAX_RESULT_BYTES, MAX_TIME, Variables},
    testing::{data, timed},
    tokenizer::TokenizerConfig,
};

/// Cuts, doubles, moves and replaces parts of a text.
fn mutate(text: &mut String, others: &[String], pieces: &[&str], random: &mut Random) {
    for _ in 0..1 + random.below(5) {
        let (from, to) = (random.place(text), random.place(text));
        let (from, to) = (from.min(to), from.max(to));
        match random.below(6) {
            0 => text.insert_str(from, random.pick::<&str>(pieces)),
            1 => text.replace_range(from..to, random.pick::<&str>(pieces)),
            2 if to - from < 200 => text.replace_range(from..to, ""),
            3 if to - from < 500 => {
                let part = text[from..to].to_owned();
                text.insert_str(to, &part);
            }
            4 => {
                let other = random.pick(others);
                let (begin, end) = (random.place(other), random.place(other));
                let part = other[begin.min(end)..begin.max(end)].to_owned();
                text.insert_str(from, &part);
            }
            _ => text.truncate(to),
        }
    }
}

/// What the formats' parsers look for.
const MARKS: &[&str] = &[
    "<think>",
    "</think>",
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    "<invoke name=\"f\">",
    "</invoke>",
    "<parameter name=\"s\">",
    "</parameter>",
    "<tool_call>",
    "</tool_call>",
    "<function=f>",
    "</function>",
    "{\"name\": \"f\", \"arguments\": {",
    "}}",
    "\"",
    "\\",
    "\\u00",
    "é🤔",
    "\n",
    ">",
    "<",
    "[",
    "1e400",
    "null",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<|channel|>",
    "<|message|>",
    "<|call|>",
    "<|end|>",
    "<|start|>assistant",
    "commentary to=functions.f ",
];

const FORMATS: &[&str] = &[
    "minimax_m2",
    "hermes",
    "qwen3_coder",
    "deepseek_v31",
    "harmony",
    "json",
];

fn outputs() -> Vec<String> {
    let cases = data("text/tool_parser_cases.jsonl");
    let output = |line: &str| {
        let case = json::parse(line).unwrap();
        case.get("output").and_then(Json::as_str).unwrap().to_owned()
    };
    let mut all: Vec<String> = cases.lines().map(output).collect();
    all.push("<tool_call>\n{\"name\": \"f\", \"arguments\": {\"s\": \"a\"}}\n</tool_call>".to_owned());
    all.push("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"s\": \"a\"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>".to_owned());
    all.push(
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"s\": \"a\"}<|call|>".to_owned(),
    );
    all
}

fn tools() -> Vec<ToolSpec> {
    let tool = |json: &str| Tool {
        function_json: json.to_owned(),
        ..Tool::default()
    };
    read_tools(&[
        tool(r#"{"name": "f", "parameters": {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}, "l": {"type": "array"}}}}"#),
        tool(r#"{"name": "g"}"#),
    ])
    .unwrap()
}

#[derive(Debug, Default, PartialEq)]
struct Parsed {
    said: [String; 2],
    calls: Vec<(String, String)>,
}

fn parse(parser: &mut dyn OutputParser, pieces: &[&str], end: End) -> Parsed {
    let mut parsed = Parsed::default();
    let mut take = |pieces: Pieces| {
        parsed.said[0] += &pieces.text;
        parsed.said[1] += &pieces.reasoning;
        for delta in pieces.tool_calls {
            if let Some(name) = delta.name {
                assert_eq!(
                    delta.index as usize,
                    parsed.calls.len(),
                    "calls are numbered in their order"
                );
                parsed.calls.push((name, String::new()));
            }
            let call = parsed.calls.last_mut().expect("a call begins with its name");
            call.1 += &delta.arguments;
        }
    };
    for piece in pieces {
        let mut out = Pieces::default();
        parser.push(None, piece, &mut out);
        take(out);
    }
    let mut out = Pieces::default();
    parser.finish(end, &mut out);
    take(out);
    parsed
}

#[test]
fn outputs_are_read_the_same_however_they_are_cut() {
    let (outputs, tools) = (outputs(), tools());
    run("outputs_are_read_the_same_however_they_are_cut", 20, |random| {
        let mut text = random.pick(&outputs).clone();
        if random.below(20) > 0 {
            mutate(&mut text, &outputs, MARKS, random);
        }
        let tool_calls = *random.pick(FORMATS);
        // Harmony reads both together.
        let reasoning = match tool_calls {
            "harmony" => "harmony",
            _ => *random.pick(&["minimax_m2", "none"]),
        };
        let names = ParserNames {
            reasoning: Some(reasoning.to_owned()),
            tool_calls: Some(tool_calls.to_owned()),
        };
        let format = Format::choose(&names, |_| None, None).unwrap();
        let (thinking, stops) = (random.below(2) == 0, random.below(2) == 0);
        let read = |pieces: &[&str]| {
            let rules = CallRules {
                tools: tools.clone().into(),
                max_calls: u32::MAX,
                id_seed: 1,
            };
            let mut parser = format.parser(Some(rules), thinking).unwrap();
            parse(parser.as_mut(), pieces, if stops { End::Stop } else { End::Cut })
        };
        let whole = read(&[&text]);
        let mut places: Vec<usize> = (0..random.below(9)).map(|_| random.place(&text)).collect();
        places.extend([0, text.len()]);
        places.sort_unstable();
        let pieces: Vec<&str> = places.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        assert_eq!(read(&pieces), whole, "{names:?} {text}");
        let chars: Vec<&str> = text.split("").collect();
        assert_eq!(read(&chars), whole, "{names:?} {text}");
        for (_, arguments) in whole.calls.iter().filter(|_| stops) {
            let is_object = matches!(json::parse(arguments), Ok(Json::Object(_)));
            assert!(is_object, "{names:?} {text}: {arguments}");
        }
    });
}

/// What templates are made of, and what makes them explode.
const TAGS: &[&str] = &[
    "{% for a in range(999) %}",
    "{% endfor %}",
    "{% if messages %}",
    "{% endif %}",
    "{% macro f() %}{{ f() }}{% endmacro %}",
    "{% set ns = namespace(x='a') %}",
    "{{ '-' * 10000000000 }}",
    "{{ messages | tojson(indent=1000000) }}",
    "{{ messages }}",
    "{{ [1] * 100000000 }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{% include 'chat_template' %}",
    "{{ loop.index }}",
    "{%- else -%}",
    "}}",
    "{{",
    "%}",
    "{%",
    "{# ",
    "|",
    "(((",
    "[[[",
    "~ 'x' * 9",
    "messages[0]",
    "tools",
    ".split('a')[-1]",
    "| join(range(100000) | list)",
    "'%99999999d' | format(1)",
    "é🤔",
];

/// Of one rendering: a single step may be under way when the time is over.
const MOST_TIME: Duration = MAX_TIME.saturating_mul(3);
/// Renderings by which `ChatTemplate::compile` finds what a template prints.
const PROBES: u32 = 4;

#[test]
fn templates_end_in_text_or_in_an_error() {
    let files = [
        "text/chat_template.jinja",
        "text/chat_template.M2.jinja",
        "text/chat_template.M2.7.jinja",
    ];
    let mut sources: Vec<String> = files.into_iter().map(data).collect();
    sources.push("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}".to_owned());
    let conversations: Vec<Json> = data("text/template_cases.jsonl")
        .lines()
        .map(|line| json::parse(line).unwrap())
        .collect();
    let (mut rendered, mut refused) = (0_u32, 0_u32);
    run("templates_end_in_text_or_in_an_error", 20, |random| {
        let mut source = random.pick(&sources).clone();
        mutate(&mut source, &sources, TAGS, random);
        let case = random.pick(&conversations);
        let messages = case.get("messages").and_then(Json::as_array).unwrap();
        let variables = Variables {
            messages,
            tools: case.get("tools").filter(|tools| tools.as_array().is_some()),
            add_generation_prompt: random.below(2) == 0,
            kwargs: &[],
        };
        let config = TokenizerConfig::default();
        let sources = [("default".to_owned(), source.clone())];
        let (template, time) = timed(|| ChatTemplate::compile(&sources, &config).ok());
        assert!(time < PROBES * MOST_TIME, "compiled in {time:?}: {source}");
        let shadowed = random.below(2) == 0;
        let (result, time) = timed(|| template?.render(&variables, shadowed).ok());
        assert!(time < MOST_TIME, "rendered in {time:?}: {source}");
        match result {
            Some(text) => {
                rendered += 1;
                assert!(text.len() <= MAX_RESULT_BYTES, "{source}");
            }
            None => refused += 1,
        }
    });
    let replayed = is_replay();
    assert!(replayed || (rendered > 0 && refused > 0), "{rendered} {refused}");
}
