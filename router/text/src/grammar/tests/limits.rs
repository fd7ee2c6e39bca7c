//! Bad and explosive constraints, and the time a mask takes.

use super::*;
use crate::testing::timed;

/// The longest a mask may take, whatever the grammar: its fuel is worth a tenth of it.
pub(super) const MAX_MASK: Duration = Duration::from_millis(200);

/// Compiles; tells the processor time, that of the thread that compiled included.
pub(super) fn compile_timed(constraint: &Constraint) -> (Result<Grammar>, Duration) {
    let mut compiling = Duration::ZERO;
    let (result, rest) = timed(|| compiler().compile_timed(constraint, None, &mut compiling));
    (result, compiling + rest)
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
        let (result, time) = compile_timed(constraint);
        slowest = slowest.max(time);
        let error = match result {
            Err(error) => error,
            Ok(_) => {
                compiled.push(format!("{:.200}", format!("{constraint:?}")));
                continue;
            }
        };
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
        let (compiled, compile_time) = compile_timed(&constraint);
        let mut slowest = Duration::ZERO;
        let mut outcome = String::new();
        match compiled {
            Err(error) => outcome = error.to_string(),
            Ok(grammar) => {
                let mut matcher = grammar.matcher();
                for token in text().tokenizer().encode_literal(&"ab".repeat(100)).unwrap() {
                    let (mask, time) = timed(|| matcher.mask());
                    slowest = slowest.max(time);
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
        assert!(slowest < MAX_MASK, "{name}: {slowest:?} {outcome}");
        assert!(compile_time < Duration::from_secs(1), "{name}: {compile_time:?}");
    }
    assert!(accepts(&compile(&regex("a")).unwrap(), "a"));
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
            times.push(timed(|| matcher.mask().unwrap()).1);
            matcher.consume(token).unwrap();
        }
    }
    times.sort();
    let p99 = times[times.len() * 99 / 100];
    assert!(p99 < Duration::from_millis(1), "{p99:?}");
}

/// Every bound that is set in the library, reached: with the bound lowered, a usual constraint fails in its own
/// request, in compiling or in a mask.
#[test]
fn every_limit_of_the_library_is_reached() {
    let schema = schema(
        r#"{"type": "object", "properties": {"a": {"type": "string", "pattern": "^[a-z]{1,20}$"}, "b": {"type": "array", "items": {"type": "integer"}}}}"#,
    );
    let ambiguous = grammar("start: e\ne: e e | e e e | \"a\" | \"b\" | \"ab\"");
    type Lower = fn(&mut ParserLimits);
    let lower: [(&str, &Constraint, Lower); 6] = [
        ("initial_lexer_fuel", &schema, |limits| {
            limits.initial_lexer_fuel = 10
        }),
        ("step_lexer_fuel", &schema, |limits| limits.step_lexer_fuel = 1),
        ("step_max_items", &ambiguous, |limits| limits.step_max_items = 10),
        ("max_items_in_row", &ambiguous, |limits| {
            limits.max_items_in_row = 3
        }),
        ("max_lexer_states", &schema, |limits| limits.max_lexer_states = 2),
        ("max_grammar_size", &schema, |limits| limits.max_grammar_size = 10),
    ];
    for (name, constraint, lower) in lower {
        let mut compiler = text().grammar_compiler(3072).unwrap();
        assert!(run(&compiler, constraint).is_ok(), "{name}");
        lower(compiler.factory.limits_mut());
        let error = run(&compiler, constraint);
        assert!(error.is_err(), "{name}");
        println!("{name}: {:?}", error.unwrap_err().to_string());
    }
}

/// Compiles and writes some text the grammar allows.
fn run(compiler: &GrammarCompiler, constraint: &Constraint) -> Result<()> {
    let mut matcher = compiler.compile(constraint, None)?.matcher();
    for token in text().tokenizer().encode_literal(&"ab".repeat(20)).unwrap() {
        let mask = matcher.mask()?;
        let first = || (0..EOS).find(|&id| allows(&mask, id));
        let Some(next) = Some(token).filter(|&id| allows(&mask, id)).or_else(first) else {
            break;
        };
        matcher.consume(next)?;
    }
    Ok(())
}
