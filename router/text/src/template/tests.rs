//! The released templates against transformers' output, Python compatibility, and the bounds.
//!
//! Proves invariant T2 of ARCHITECTURE.md.

use super::*;
use crate::{
    json::{self, Json},
    testing::{data, timed},
};

fn compile(source: &str) -> ChatTemplate {
    let sources = [("default".to_owned(), source.to_owned())];
    let config = TokenizerConfig {
        special_tokens: vec![("eos_token".to_owned(), "</s>".to_owned())],
        ..TokenizerConfig::default()
    };
    ChatTemplate::compile(&sources, &config).unwrap()
}

fn try_render(template: &ChatTemplate, messages: &str) -> Result<String> {
    let Json::Array(messages) = json::parse(messages).unwrap() else {
        panic!("not a list")
    };
    let variables = Variables {
        messages: &messages,
        tools: None,
        add_generation_prompt: true,
        kwargs: &[],
    };
    template.render(&variables, false)
}

fn render(source: &str) -> String {
    try_render(
        &compile(source),
        r#"[{"role": "user", "content": "hi", "n": 1.10}]"#,
    )
    .unwrap()
}

fn fails(source: &str) -> String {
    let template = compile(source);
    let (result, time) = timed(|| try_render(&template, "[]"));
    // A single step may be under way when the time is over.
    assert!(time < 3 * MAX_TIME, "{source}: {time:?}");
    result.unwrap_err().to_string()
}

#[test]
fn released_templates_render_as_transformers_does() {
    for line in data("text/template_cases.jsonl").lines() {
        let case = json::parse(line).unwrap();
        let name = case.get("name").unwrap().as_str().unwrap();
        assert_eq!(case.get("template"), Some(&Json::from("M2.5")));
        let identity = "You are a helpful assistant. Your name is MiniMax-M2.5 and is built by MiniMax.";
        for (file, own) in [
            ("text/chat_template.jinja", identity),
            ("text/chat_template.M2.jinja", "You are a helpful assistant."),
            ("text/chat_template.M2.7.jinja", &identity.replace("M2.5", "M2.7")),
            (
                "../../models/demo/chat_template.jinja",
                "You are a helpful assistant. Your name is Conclave-Demo.",
            ),
        ] {
            let template = compile(&data(file));
            assert!(template.reads_parts());
            let tools = case.get("tools").filter(|tools| tools.as_array().is_some());
            let variables = Variables {
                messages: case.get("messages").unwrap().as_array().unwrap(),
                tools,
                add_generation_prompt: case.get("add_generation_prompt") == Some(&Json::Bool(true)),
                kwargs: &[],
            };
            let expect = case
                .get("expect")
                .unwrap()
                .as_str()
                .unwrap()
                .replace(identity, own);
            assert_eq!(
                template.render(&variables, false).unwrap(),
                expect,
                "{name}, {file}"
            );
        }
    }
}

#[test]
fn demo_template_follows_the_released_one_beyond_the_cases() {
    let demo = compile(&data("../../models/demo/chat_template.jinja"));
    let released = compile(&data("text/chat_template.jinja"));
    let released_identity = "You are a helpful assistant. Your name is MiniMax-M2.5 and is built by MiniMax.";
    let own_identity = "You are a helpful assistant. Your name is Conclave-Demo.";
    for messages in [
        r#"[{"role": "system", "content": "", "current_date": "1 May", "current_location": "Bonn"}, {"role": "user", "content": "a"}]"#,
        r#"[{"role": "user", "content": ["x", {"type": "image"}, {"type": "text", "text": "y"}]}]"#,
        r#"[{"role": "user", "content": "a"}, {"role": "system", "content": "late"}, {"role": "developer", "content": "d"}]"#,
        r#"[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<think>\n\nc</think>d</think>\n e \n"}]"#,
        r#"[{"role": "user", "content": "a"}, {"role": "assistant", "reasoning_content": "\nr\n", "content": " c </think> d"}, {"role": "user", "content": "e"}, {"role": "assistant", "reasoning_content": "\ns\n", "content": ""}]"#,
        r#"[{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"s": "", "n": null, "b": true, "x": 1e5, "l": [1, {"é": "\"<"}]}}, {"function": {"name": "g", "arguments": {}}}]}, {"role": "tool", "content": [{"output": "o"}, {"type": "text", "text": "t"}]}, {"role": "tool", "content": "u"}, {"role": "user", "content": "v"}]"#,
        r#"[{"role": "tool", "content": "orphan"}]"#,
        r#"[{"role": "assistant", "content": "no call"}, {"role": "tool", "content": "orphan"}]"#,
    ] {
        let messages = json::parse(messages).unwrap();
        for add_generation_prompt in [false, true] {
            let variables = Variables {
                messages: messages.as_array().unwrap(),
                tools: None,
                add_generation_prompt,
                kwargs: &[],
            };
            let expect = released.render(&variables, false);
            let expect = expect.map(|text| text.replace(released_identity, own_identity));
            assert_eq!(demo.render(&variables, false), expect, "{}", messages.to_python());
        }
    }
    let null = json::parse(r#"[{"role": "user", "content": null}]"#).unwrap();
    let variables = Variables {
        messages: null.as_array().unwrap(),
        tools: None,
        add_generation_prompt: false,
        kwargs: &[("model_identity".to_owned(), Json::from("I."))],
    };
    assert_eq!(
        demo.render(&variables, false).unwrap(),
        "]~!b[]~b]system\nI.[e~[\n]~b]user\n[e~[\n"
    );
}

#[test]
fn python_methods() {
    for (source, expect) in [
        ("{{ 'a</think>b</think>c'.split('</think>')[-1] }}", "c"),
        ("{{ '  a b '.split() | join('|') }}", "a|b"),
        ("{{ 'a-b-c'.rsplit('-', 1) | join('|') }}", "a-b|c"),
        (
            "{{ '\n\na\n'.strip('\\n') }}|{{ 'xay'.lstrip('x').rstrip('y') }}",
            "a|a",
        ),
        (
            "{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(('x', 'c')) }}",
            "TrueTrue",
        ),
        ("{{ 'abc'.removeprefix('a').removesuffix('c') }}", "b"),
        ("{{ 'a=b=c'.partition('=') | join('|') }}", "a|=|b=c"),
        ("{{ 'aXa'.replace('a', 'b').lower().upper().title() }}", "Bxb"),
        (
            "{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{{ v }}{% endfor %}",
            "b1a2",
        ),
        (
            "{{ {'a': 1}.get('b', 3) }}{{ {'a': 1}.get('b') is none }}",
            "3True",
        ),
        ("{{ {'a': 1}.keys() | list }}", "['a']"),
        ("{{ 'x'.isdigit() }}{{ '7'.isdigit() }}", "FalseTrue"),
        (
            "{{ messages[-1].content[1:] }}{{ messages[::-1][0].role }}",
            "iuser",
        ),
        ("{{ '{}-{:>3}'.format('a', 7) }}", "a-  7"),
        (
            "{{ '%s-%d' | format('a', 3) }}{{ 'a' ~ 1 ~ none ~ true }}",
            "a-3a1NoneTrue",
        ),
        (
            "{{ none }}|{{ true }}|{{ undefined_name }}|{{ [1, 'a', none, false] }}",
            "None|True||[1, 'a', None, False]",
        ),
    ] {
        assert_eq!(render(source), expect, "{source}");
    }
}

#[test]
fn what_templates_lean_on() {
    for (source, expect) in [
        (
            "{% set ns = namespace(i=0) %}{% for x in [1, 2, 3] %}{% set ns.i = ns.i + x %}{% endfor %}{{ ns.i }}",
            "6",
        ),
        (
            "{% for x in range(9) %}{% if x == 1 %}{% continue %}{% endif %}{% if x == 3 %}{% break %}{% endif %}{{ x }}{% endfor %}",
            "02",
        ),
        (
            "{% set ns = namespace(a=none) %}{{ ns.a is none }}{% set ns.a = messages[0].missing %}{{ ns.a is none }}{{ ns.a is defined }}",
            "TrueFalseFalse",
        ),
        (
            "{{ messages[0].missing == none }}{{ messages[0].missing is defined }}",
            "FalseFalse",
        ),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        (
            "{{ eos_token }}{{ tools is none }}{{ documents is none }}",
            "</s>TrueTrue",
        ),
        (
            "{%- macro f(x, y='d') -%} {{ x }}{{ y }} {%- endmacro -%}{{ f('a') }}",
            "ad",
        ),
        ("  {% if true %}\n  a\n  {% endif %}\nb\n", "  a\nb"),
        (
            "{{ 1 is number }}{{ 1.5 is float }}{{ messages[0].n is number }}{{ messages[0].n }}",
            "TrueTrueTrue1.10",
        ),
        ("{{ strftime_now('%Y')[:2] }}", "20"),
        (
            "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
            "1",
        ),
    ] {
        assert_eq!(render(source), expect, "{source}");
    }
}

#[test]
fn tojson_is_pythons() {
    for (source, expect) in [
        (
            "{{ {'a': [1, 2.0, none, true], 'ü<': 'x\\'y\"&'} | tojson }}",
            r#"{"a": [1, 2.0, null, true], "ü<": "x'y\"&"}"#,
        ),
        (
            "{{ 'ü' | tojson(ensure_ascii=True) }}{{ 'ü' | tojson(ensure_ascii=False) }}",
            r#""\u00fc""ü""#,
        ),
        (
            "{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}",
            "{\n  \"b\": 1,\n  \"a\": [\n    2\n  ]\n}",
        ),
        (
            "{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}",
            r#"{"a":2,"b":1}"#,
        ),
        (
            "{{ messages | tojson }}",
            r#"[{"role": "user", "content": "hi", "n": 1.10}]"#,
        ),
        ("{{ [] | tojson(4) }}{{ {} | tojson(indent=4) }}", "[]{}"),
        ("{{ 1e22 | tojson }}", "1e+22"),
    ] {
        assert_eq!(render(source), expect, "{source}");
    }
    assert!(fails("{{ x | tojson }}").contains("undefined"));
}

#[test]
fn errors_name_the_problem() {
    assert_eq!(
        fails("{{ raise_exception('Roles must alternate') }}"),
        "messages: Roles must alternate"
    );
    assert_eq!(
        fails("{% macro f() %}{{ raise_exception('inner') }}{% endmacro %}{{ f() }}"),
        "messages: inner"
    );
    assert!(fails("\n\n{{ x.y.z }}").contains("line 3"));
    assert!(fails("{{ 'a'.no_such() }}").contains("no_such"));
    assert!(fails("{% include 'other' %}").contains("template not found"));
    let broken = [("default".to_owned(), "{% if %}".to_owned())];
    assert!(ChatTemplate::compile(&broken, &TokenizerConfig::default()).is_err_and(|e| e.contains("line 1")));
    let unnamed = [("a".to_owned(), String::new()), ("b".to_owned(), String::new())];
    assert!(ChatTemplate::compile(&unnamed, &TokenizerConfig::default()).is_err());
}

#[test]
fn bombs_end_in_errors() {
    let steps = "too many steps";
    let loops = "{% for a in range(999) %}{% for b in range(999) %}{% for c in range(999) %}{% endfor %}{% endfor %}{% endfor %}";
    assert!(fails(loops).contains(steps));
    for source in [
        "{{ '-' * 10000000000 }}",
        "{{ '-' * 99999999 * 99 }}",
        "{{ [1] * 10000000000 }}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ range(10000000000) }}",
        "{{ range(100000) | list | tojson(indent=1000000000) }}",
        "{{ 'a' | indent(1000000000, true) }}",
        "{{ 'a' | indent(width=1000000000, first=true) }}",
        "{{ {'a': 1} | tojson(indent=1000000000) }}",
        "{{ ('a' * 1000).replace('a', 'b' * 1000000) }}",
        "{{ ('b' * 1000000).join(range(100000) | list) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 1000000000) }}",
        "{{ '{0:.1000000000f}'.format(1.5) }}",
        "{{ 'a'.center(1000000000) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f() %}{{ [1] * 100000000 }}{% endmacro %}{{ f() }}",
        "{% set x %}{{ [1] * 100000000 }}{% endset %}{{ x | length }}",
        "{% include 'chat_template' %}",
        "{% import 'chat_template' as a %}",
        "{% extends 'chat_template' %}",
    ] {
        fails(source);
    }
    let hundred_megabytes = "{% for i in range(100) %}{{ 'a' * 1000000 }}{% endfor %}";
    assert!(fails(hundred_megabytes).contains("chat template"));
}

#[test]
fn sources_are_bounded() {
    let compile = |source: String| {
        let sources = [("default".to_owned(), source)];
        ChatTemplate::compile(&sources, &TokenizerConfig::default()).err()
    };
    assert_eq!(compile("x".repeat(MAX_SOURCE_BYTES)), None);
    assert!(
        compile("x".repeat(MAX_SOURCE_BYTES + 1))
            .unwrap()
            .contains("at most")
    );
    for deep in ["(", "[", "{'a':", "x[", "x("] {
        assert!(
            compile(format!("{{{{ {}", deep.repeat(20_000))).is_some(),
            "{deep}"
        );
    }
    assert!(compile("{% if true %}".repeat(20_000)).is_some());
}

#[test]
fn a_long_conversation_is_not_a_bomb() {
    let text = "word ".repeat(200);
    let message = |i: usize| {
        let role = if i.is_multiple_of(2) { "user" } else { "assistant" };
        format!(r#"{{"role": "{role}", "content": "{text}"}}"#)
    };
    let messages: Vec<String> = (0..4000).map(message).collect();
    let messages = format!("[{}]", messages.join(","));
    let rendered = try_render(&compile(&data("text/chat_template.jinja")), &messages).unwrap();
    assert!(rendered.len() > 4_000_000);
}

#[test]
fn the_clock_stops_a_template() {
    let mut output = BoundedOutput::new(0);
    output.time = Duration::ZERO;
    assert!(io::Write::write(&mut output, b"x").is_err());
    assert!(output.exceeded.unwrap().contains("ms"));
    let mut output = BoundedOutput::new(0);
    output.time = Duration::MAX;
    assert!(io::Write::write(&mut output, &vec![0; MAX_RESULT_BYTES]).is_ok());
    assert!(io::Write::write(&mut output, b"x").is_err());
}
