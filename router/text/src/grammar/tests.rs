//! Constraints of every kind, and reasoning before them.

mod forms;
mod limits;
mod tools;

use std::time::Duration;

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

#[test]
fn recursive_and_nested_schemas_work() {
    let list = schema(
        r##"{"$defs": {"N": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}}, "required": ["v", "next"], "additionalProperties": false}}, "$ref": "#/$defs/N"}"##,
    );
    let grammar = compile(&list).unwrap();
    assert!(accepts(&grammar, r#"{"v": 1, "next": {"v": 2, "next": null}}"#));
    assert!(!accepts(&grammar, r#"{"v": 1}"#));
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
