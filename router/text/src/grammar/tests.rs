//! Constraints of every kind, bad and explosive ones, reasoning before them, and forced tool calls.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::{
    Text,
    chat::{Chat, ChatMessage, Content, Tool, ToolChoice},
    parse::{End, Format},
    testing::demo,
};

const EOS: u32 = 3071;
const THINK_END: u32 = 3064;

fn text() -> &'static Text {
    static ONCE: std::sync::OnceLock<Text> = std::sync::OnceLock::new();
    ONCE.get_or_init(|| Text::load(&demo()).unwrap())
}

fn compiler() -> &'static GrammarCompiler {
    static ONCE: std::sync::OnceLock<GrammarCompiler> = std::sync::OnceLock::new();
    ONCE.get_or_init(|| text().grammar_compiler(3072).unwrap())
}

fn compile(constraint: &Constraint) -> Result<Grammar> {
    compiler().compile(constraint, None)
}

fn allows(mask: &[u8], token: u32) -> bool {
    mask[token as usize / 8] & (1 << (token % 8)) != 0
}

/// Whether the grammar takes the text, tokenized canonically, and may end after it.
fn accepts(grammar: &Grammar, output: &str) -> bool {
    let mut matcher = grammar.matcher();
    for token in text().tokenizer().encode_literal(output).unwrap() {
        if !allows(&matcher.mask().unwrap(), token) {
            return false;
        }
        matcher.consume(token).unwrap();
    }
    let may_end = matcher.may_end();
    assert_eq!(allows(&matcher.mask().unwrap(), EOS), may_end);
    may_end
}

fn schema(text: &str) -> Constraint {
    Constraint::JsonSchema(text.to_owned())
}

fn regex(text: &str) -> Constraint {
    Constraint::Regex(text.to_owned())
}

fn grammar(text: &str) -> Constraint {
    Constraint::Grammar(text.to_owned())
}

#[test]
fn every_kind_accepts_what_it_says() {
    let choice = Constraint::Choice(vec!["yes".to_owned(), "no \"way\"".to_owned()]);
    for (constraint, good, bad) in [
        (
            schema(
                r#"{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false}"#,
            ),
            r#"{"a": 12}"#,
            r#"{"b": 1}"#,
        ),
        (schema("true"), "[1, null]", "x"),
        (Constraint::JsonObject, r#"{"x": [1.5, "ü"]}"#, "[1]"),
        (regex(r"^[a-c]+\$$"), "abc$", "abd"),
        (regex(r"(a+)+"), "aaa", "b"),
        (choice, "no \"way\"", "maybe"),
        (grammar("start: \"a\" b*\nb: /[0-9]/"), "a12", "b"),
        (grammar("root ::= \"a\" digit*\ndigit ::= [0-9]"), "a12", "b"),
    ] {
        let grammar = compile(&constraint).unwrap();
        assert!(accepts(&grammar, good), "{constraint:?}");
        assert!(!accepts(&grammar, bad), "{constraint:?}");
        assert!(!accepts(&grammar, ""), "{constraint:?}");
    }
}

#[test]
fn masks_are_one_bit_per_logit() {
    let wide = text().grammar_compiler(3085).unwrap();
    let mask = wide.compile(&regex("a"), None).unwrap().matcher().mask().unwrap();
    assert_eq!(mask.len(), 386);
    let allowed: Vec<u32> = (0..3088).filter(|&id| allows(&mask, id)).collect();
    let texts: Vec<&[u8]> = allowed
        .iter()
        .map(|&id| text().tokenizer().token_bytes(id))
        .collect();
    assert_eq!(texts, [b"a"]);
}

#[test]
fn a_finished_text_allows_only_its_end() {
    let mut matcher = compile(&regex("a")).unwrap().matcher();
    matcher
        .consume(text().tokenizer().encode_literal("a").unwrap()[0])
        .unwrap();
    let mask = matcher.mask().unwrap();
    assert!((0..3072).all(|id| allows(&mask, id) == (id == EOS)));
    matcher.consume(EOS).unwrap();
    matcher.consume(EOS).unwrap();
}

#[test]
fn control_tokens_are_never_text() {
    let mut matcher = compile(&regex("(.|\n)*")).unwrap().matcher();
    let mask = matcher.mask().unwrap();
    assert!((3063..3071).all(|id| !allows(&mask, id)));
    assert!(allows(&mask, EOS) && allows(&mask, 32));
}

#[test]
fn a_token_outside_the_mask_is_an_error() {
    let mut matcher = compile(&regex("a")).unwrap().matcher();
    assert!(
        matcher
            .consume(text().tokenizer().encode_literal("b").unwrap()[0])
            .is_err()
    );
    assert!(matcher.mask().is_err());
}

#[test]
fn constraints_begin_after_the_reasoning() {
    let grammar = compiler().compile(&regex("yes"), Some(THINK_END)).unwrap();
    for lead in ["", "\n\n"] {
        let mut matcher = grammar.matcher();
        let thought = text().tokenizer().encode("hm, {\n</think>", false).unwrap();
        for token in thought {
            let mask = matcher.mask().unwrap();
            assert!(allows(&mask, token) && !allows(&mask, EOS));
            assert!(!matcher.may_end());
            matcher.consume(token).unwrap();
        }
        let answer = text().tokenizer().encode_literal(&format!("{lead}yes")).unwrap();
        for token in answer {
            assert!(allows(&matcher.mask().unwrap(), token), "{lead:?}");
            matcher.consume(token).unwrap();
        }
        assert!(matcher.may_end());
    }
}

/// Constraints that cannot be compiled: each is refused in a second, with a reason, and the next one is not harmed.
#[test]
fn bad_constraints_are_refused_and_harm_nothing() {
    let deep = |n: usize| format!("{}{{}}{}", r#"{"items":"#.repeat(n), "}".repeat(n));
    let enormous = format!(r#"{{"enum": [{}"x"]}}"#, "\"value\",".repeat(200_000));
    let bad = [
        regex("foo**"),
        regex("(a"),
        regex(r"[^\s\S]"),
        regex(r"a[^\s\S]b"),
        regex(""),
        regex(r"(?=a)b"),
        regex(r"(a)\1"),
        regex(&"(".repeat(10_000)),
        regex(&"a|".repeat(MAX_CONSTRAINT_BYTES)),
        schema(""),
        schema("[1]"),
        schema("{\"type\": \"nothing\"}"),
        schema("false"),
        schema(r#"{"type": "string", "pattern": "foo**"}"#),
        schema(r#"{"type": "object", "properties": {"a": false}, "required": ["a"]}"#),
        schema(&deep(10_000)),
        schema(&enormous),
        schema(r##"{"$ref": "#/$defs/missing"}"##),
        schema(r##"{"$ref": "http://example.com/schema"}"##),
        schema(r#"{"type": "string", "minLength": 5, "maxLength": 2}"#),
        grammar(""),
        grammar("start: start \"a\""),
        grammar("start: b"),
        grammar("start: \"a"),
        grammar("begin: \"a\""),
        grammar("root ::= \"a"),
        grammar(&format!(
            "start: {}\"a\"{}",
            "(".repeat(10_000),
            ")".repeat(10_000)
        )),
        Constraint::Choice(Vec::new()),
        Constraint::Choice(vec![String::new()]),
        Constraint::Choice(vec!["x".to_owned(); MAX_CHOICES + 1]),
    ];
    let good = schema(r#"{"type": "array", "items": {"type": "boolean"}}"#);
    let (mut slowest, mut compiled) = (Duration::ZERO, Vec::new());
    for constraint in &bad {
        let start = Instant::now();
        let error = match compile(constraint) {
            Err(error) => error,
            Ok(_) => {
                compiled.push(format!("{:.200}", format!("{constraint:?}")));
                continue;
            }
        };
        slowest = slowest.max(start.elapsed());
        assert_eq!(error.field(), Some(constraint.field()));
        let text = error.to_string();
        assert!(text.len() < 800 && !text.contains("backtrace"), "{text}");
        assert!(accepts(&compile(&good).unwrap(), "[true, false]"));
    }
    assert!(compiled.is_empty(), "{compiled:#?}");
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
}

/// Constraints that would explode elsewhere: compiled lazily or refused, and what is too much while masks are made
/// ends for its own request only.
#[test]
fn explosive_constraints_are_bounded() {
    let wide: String = (0..60).map(|i| format!("/(a|b)*a(a|b){{{i}}}/ | ")).collect();
    let numbered = |n: usize, part: &dyn Fn(usize) -> String, join: &str| {
        (0..n).map(part).collect::<Vec<_>>().join(join)
    };
    let properties = numbered(20_000, &|i| format!(r#""p{i}": {{"type": "integer"}}"#), ", ");
    let ambiguous = "start: e\ne: e e | e e e | \"a\" | \"b\" | \"ab\"";
    let nested = (0..60).fold(r#"{"type": "string"}"#.to_owned(), |inner, i| {
        format!(r#"{{"anyOf": [{{"type": "object", "properties": {{"k{i}": {inner}}}}}, {{"type": "array", "items": {{"type": "integer"}}}}]}}"#)
    });
    let allowed_patterns = numbered(
        4,
        &|i| {
            format!(
                r#"{{"pattern": "^(a{{{}}}|b{{{}}})*$"}}"#,
                9973 - 6 * i,
                9901 - 4 * i
            )
        },
        ",",
    );
    let chain = |n: usize| {
        numbered(
            n,
            &|i| {
                format!(
                    r##""d{i}": {{"type": "object", "properties": {{"a": {{"$ref": "#/$defs/d{}"}}}}}}"##,
                    i + 1
                )
            },
            ", ",
        )
    };
    let chained = |n: usize| {
        format!(
            r##"{{"$ref": "#/$defs/d0", "$defs": {{{}, "d{n}": {{"type": "integer"}}}}}}"##,
            chain(n)
        )
    };
    let rules = |n: usize| {
        let rules =
            numbered(n, &|i| format!("r{i}: \"a{i}\" | r{}", i + 1), "\n").replacen("r0:", "start:", 1);
        format!("{rules}\nr{n}: \"z\"")
    };
    let primes = "/(a{997})*/ & /(a{991})*/ & /(a{983})*/";
    for (name, constraint) in [
        ("count", regex("a{1,1000000}")),
        ("counts", regex("((a{1,1000}){1,1000}){1,1000}")),
        ("plus", regex("(a+)+$")),
        ("determinised", grammar(&format!("start: {wide}/x/"))),
        ("dots", regex("(.*a.*){20}b{50}(a|b)*a(a|b){200}")),
        ("words", regex(&numbered(3000, &|i| format!("word{i}"), "|"))),
        ("long literal", regex(&"abcd".repeat(8 << 10))),
        ("ambiguous", grammar(ambiguous)),
        ("intersection", grammar(&format!("start: X\nX: {primes}"))),
        ("rules", grammar(&rules(450))),
        ("too many rules", grammar(&rules(2000))),
        (
            "terminals",
            grammar(
                &numbered(450, &|i| format!("T{i}: \"a{i}\" T{}", i + 1), "\n").replacen(
                    "T0:",
                    "start: T1\nT0:",
                    1,
                ),
            ),
        ),
        ("self", schema(r##"{"$ref": "#"}"##)),
        ("chain", schema(&chained(480))),
        ("too long a chain", schema(&chained(2000))),
        (
            "enum",
            schema(&format!(
                r#"{{"enum": [{}]}}"#,
                numbered(15_000, &|i| format!("\"value{i}\""), ",")
            )),
        ),
        (
            "properties",
            schema(&format!(
                r#"{{"type": "object", "properties": {{{properties}}}}}"#
            )),
        ),
        (
            "patterns together",
            schema(&format!(r#"{{"type": "string", "allOf": [{allowed_patterns}]}}"#)),
        ),
        (
            "too many together",
            schema(&format!(
                r#"{{"allOf": [{}]}}"#,
                numbered(
                    500,
                    &|i| format!(r#"{{"type": "string", "pattern": "a{{{i}}}b*"}}"#),
                    ","
                )
            )),
        ),
        (
            "any of all of",
            schema(&format!(
                r#"{{"allOf": [{}]}}"#,
                numbered(
                    10,
                    &|i| format!(
                        r#"{{"anyOf": [{}]}}"#,
                        numbered(10, &|j| format!(r#"{{"properties": {{"k{i}x{j}": {{}}}}}}"#), ",")
                    ),
                    ","
                )
            )),
        ),
        ("nested", schema(&nested)),
        (
            "items",
            schema(r#"{"type": "array", "minItems": 100000, "items": {"type": "integer"}}"#),
        ),
        (
            "length",
            schema(r#"{"type": "string", "minLength": 1000000, "maxLength": 10000000}"#),
        ),
        (
            "multiple",
            schema(
                r#"{"type": "integer", "multipleOf": 9999, "minimum": -999999999999, "maximum": 999999999999}"#,
            ),
        ),
        (
            "choices",
            Constraint::Choice((0..MAX_CHOICES).map(|i| format!("choice number {i}")).collect()),
        ),
    ] {
        let start = Instant::now();
        let compiled = compile(&constraint);
        let compile_time = start.elapsed();
        let mut slowest = Duration::ZERO;
        let mut outcome = String::new();
        match compiled {
            Err(error) => outcome = error.to_string(),
            Ok(grammar) => {
                let mut matcher = grammar.matcher();
                for token in text().tokenizer().encode_literal(&"ab".repeat(100)).unwrap() {
                    let start = Instant::now();
                    let mask = matcher.mask();
                    slowest = slowest.max(start.elapsed());
                    let Ok(mask) = mask else {
                        outcome = mask.unwrap_err().to_string();
                        break;
                    };
                    let next = if allows(&mask, token) {
                        token
                    } else {
                        (0..3072).find(|&id| allows(&mask, id)).unwrap()
                    };
                    if let Err(error) = matcher.consume(next) {
                        outcome = error.to_string();
                        break;
                    }
                }
            }
        }
        let refused = ["too ", "intersection", "self", "properties", "any of all of"];
        assert!(
            !outcome.is_empty() || !refused.iter().any(|begin| name.starts_with(begin)),
            "{name}"
        );
        assert!(
            slowest < Duration::from_millis(200),
            "{name}: {slowest:?} {outcome}"
        );
        assert!(compile_time < Duration::from_secs(1), "{name}: {compile_time:?}");
    }
    assert!(accepts(&compile(&regex("a")).unwrap(), "a"));
}

#[test]
fn recursive_and_nested_schemas_work() {
    let list = schema(
        r##"{"$defs": {"N": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}}, "required": ["v", "next"], "additionalProperties": false}}, "$ref": "#/$defs/N"}"##,
    );
    let grammar = compile(&list).unwrap();
    assert!(accepts(&grammar, r#"{"v": 1, "next": {"v": 2, "next": null}}"#));
    assert!(!accepts(&grammar, r#"{"v": 1}"#));
}

fn tool_chat(tool_choice: ToolChoice, strict: bool, parallel: bool) -> Chat {
    let tool = |json: &str| Tool {
        function_json: json.to_owned(),
        strict,
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
        let constraint = text().tool_constraint(&prompt.output).unwrap()?;
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
        let constraint = tool_constraint(&format, &prompt.output).unwrap().unwrap();
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

#[test]
fn masks_are_fast() {
    let grammar = compile(&schema(
        r#"{"type": "object", "properties": {"name": {"type": "string"}, "items": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"]}}}, "required": ["name", "items"]}"#,
    ))
    .unwrap();
    let output =
        r#"{"name": "a longer name with words", "items": [{"a": 1.5, "b": "x"}, {"a": -2, "b": "y"}]}"#;
    let ids = text().tokenizer().encode_literal(output).unwrap();
    let mut times = Vec::new();
    for _ in 0..5 {
        let mut matcher = grammar.matcher();
        for &token in &ids {
            let start = Instant::now();
            matcher.mask().unwrap();
            times.push(start.elapsed());
            matcher.consume(token).unwrap();
        }
    }
    times.sort();
    // The shared machine's noise is in the tail; the figure is for the 99th percentile of a quiet one.
    assert!(
        times[times.len() / 2] < Duration::from_millis(1),
        "{:?}",
        times[times.len() / 2]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// A matcher rebuilt from the tokens so far gives the same masks from there on: preemption changes nothing.
    #[test]
    fn rebuilt_from_tokens(cut in 0usize..40, pick in any::<u64>()) {
        let grammar = compile(&schema(r#"{"type": "array", "items": {"type": ["string", "integer"]}}"#)).unwrap();
        let mut straight = grammar.matcher();
        let (mut tokens, mut seed) = (Vec::new(), pick);
        for step in 0..40 {
            let mask = straight.mask().unwrap();
            let allowed: Vec<u32> = (0..3072).filter(|&id| allows(&mask, id) && id != EOS).collect();
            if allowed.is_empty() {
                break;
            }
            if step == cut {
                let mut rebuilt = compile(&schema(r#"{"type": "array", "items": {"type": ["string", "integer"]}}"#)).unwrap().matcher();
                for &token in &tokens {
                    rebuilt.consume(token).unwrap();
                }
                prop_assert_eq!(rebuilt.mask().unwrap(), mask);
                straight = rebuilt;
            }
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let token = allowed[(seed >> 33) as usize % allowed.len()];
            straight.consume(token).unwrap();
            tokens.push(token);
        }
    }
}
