//! A tool whose one parameter is a text of a grammar of its own.

use super::limits::{MAX_MASK, compile_timed};
use super::tools::{follow, tool_chat};
use super::*;
use crate::testing::timed;

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

/// As a terminal a grammar is one automaton, and what that may cost is bounded as elsewhere.
#[test]
fn explosive_grammars_of_a_parameter_are_bounded() {
    let numbered = |n: usize, part: &dyn Fn(usize) -> String, join: &str| {
        (0..n).map(part).collect::<Vec<_>>().join(join)
    };
    let doubled = numbered(40, &|i| format!("r{i}: r{0} r{0}", i + 1), "\n").replacen("r0:", "start:", 1);
    let chain = numbered(450, &|i| format!("r{i}: \"a{i}\" | r{}", i + 1), "\n").replacen("r0:", "start:", 1);
    let wide = numbered(60, &|i| format!("/(a|b)*a(a|b){{{i}}}/"), " | ");
    for (name, grammar) in [
        ("count", "start: /a{1,1000000}/".to_owned()),
        ("counts", "start: /((a{1,1000}){1,1000}){1,1000}/".to_owned()),
        ("dots", "start: /(.*a.*){20}b{50}(a|b)*a(a|b){200}/".to_owned()),
        ("doubled", format!("{doubled}\nr40: /[ab]*a/")),
        ("repeated", format!("{doubled}\nr40: /(a|b)*a(a|b){{9}}/")),
        ("rules", format!("{chain}\nr450: \"z\"")),
        ("determinised", format!("start: {wide}")),
        ("lines", "start: (/.*/ LF)+\n%import common.LF".to_owned()),
    ] {
        let chat = edits(&grammar, ToolChoice::Named("edit".to_owned()), false);
        let prompt = text().render_chat(&chat).unwrap();
        let constraint = text().constraint(Some(&prompt.output), None).unwrap().unwrap();
        let (compiled, compile_time) = compile_timed(&constraint);
        assert!(compile_time < Duration::from_secs(1), "{name}: {compile_time:?}");
        let Ok(grammar) = compiled else { continue };
        let mut matcher = grammar.matcher();
        let whole = edit("x");
        let head = whole.strip_prefix("r\n</think>\n\n").unwrap();
        let (head, _) = head.split_once("x</parameter>").unwrap();
        for token in text().tokenizer().encode(head, false).unwrap() {
            assert!(allows(&matcher.mask().unwrap(), token), "{name}");
            matcher.consume(token).unwrap();
        }
        let mut slowest = Duration::ZERO;
        for token in text().tokenizer().encode_literal(&"ab".repeat(100)).unwrap() {
            let (mask, time) = timed(|| matcher.mask());
            slowest = slowest.max(time);
            let Ok(mask) = mask else { break };
            let next = if allows(&mask, token) {
                token
            } else {
                (0..3072).find(|&id| allows(&mask, id)).unwrap()
            };
            if matcher.consume(next).is_err() {
                break;
            }
        }
        assert!(slowest < MAX_MASK, "{name}: {slowest:?}");
    }
}
