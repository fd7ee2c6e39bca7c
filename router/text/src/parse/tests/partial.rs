//! What is given out before a call has ended, and of one that never ends.

use super::*;

#[test]
fn strings_stream_as_they_arrive() {
    let format = format("minimax_m2", "minimax_m2");
    let mut parser = format.parser(Some(rules(weather())), false).unwrap();
    let mut push = |text: &str| {
        let mut pieces = Pieces::default();
        parser.push(None, text, &mut pieces);
        pieces
            .tool_calls
            .iter()
            .map(|call| call.arguments.as_str())
            .collect::<String>()
    };
    assert_eq!(
        push("<minimax:tool_call><invoke name=\"f\"><parameter name=\"s\">"),
        "{\"s\": \""
    );
    assert_eq!(push("line\n"), "line\\n");
    assert_eq!(push("a < b <"), "a < b ");
    assert_eq!(push("/div>"), "</div>");
    assert_eq!(push("</parameter><parameter name=\"o\">nu"), "\"");
    assert_eq!(push("mber"), ", \"o\": \"number");
    assert_eq!(push("</parameter><parameter name=\"n\">4"), "\"");
    assert_eq!(push("2</parameter>"), ", \"n\": 42");
    assert_eq!(push("</invoke>"), "}");
}

#[test]
fn a_cut_call_is_a_prefix_and_never_closed() {
    let format = format("minimax_m2", "minimax_m2");
    let cut = |text: &str| {
        let parsed = run_end(
            &format,
            &weather(),
            false,
            &format!("<minimax:tool_call><invoke name=\"f\">{text}"),
            End::Cut,
        );
        parsed.calls[0].1.clone()
    };
    assert_eq!(cut(""), "");
    assert_eq!(cut("<parameter name=\"s\">ab"), "{\"s\": \"ab");
    assert_eq!(cut("<parameter name=\"s\">ab</parameter>"), "{\"s\": \"ab\"");
    assert_eq!(
        cut("<parameter name=\"s\">ab</parameter><parameter name=\"n\">1"),
        "{\"s\": \"ab\""
    );
    assert_eq!(
        cut("<parameter name=\"s\">ab</parameter></invoke>"),
        "{\"s\": \"ab\"}"
    );
}

#[test]
fn wherever_an_output_is_cut_its_arguments_are_a_prefix() {
    for (name, text) in [
        (
            "minimax_m2",
            "a<minimax:tool_call>\n<invoke name=\"f\">\n<parameter name=\"s\">x </p> é</parameter>\n<parameter name=\"n\">12</parameter>\n<parameter name=\"o\">nullx</parameter>\n</invoke>\n<invoke name=\"g\"></invoke></minimax:tool_call>",
        ),
        (
            "qwen3_coder",
            "a<tool_call>\n<function=f>\n<parameter=s>\nx </p> é\n</parameter>\n<parameter=n>\n12\n</parameter>\n</function>\n</tool_call>",
        ),
        (
            "hermes",
            "a<tool_call>\n{\"name\": \"f\", \"arguments\": {\"s\": \"x </t> é\", \"n\": 12}}\n</tool_call>",
        ),
        (
            "deepseek_v31",
            "a<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"s\": \"x <｜ é\", \"n\": 12}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
    ] {
        let format = format(name, "none");
        let whole = run_end(&format, &weather(), false, text, End::Stop);
        assert!(!whole.calls.is_empty(), "{name}");
        for (at, _) in text.char_indices() {
            let cut = run_end(&format, &weather(), false, &text[..at], End::Cut);
            assert!(cut.calls.len() <= whole.calls.len(), "{name}: {}", &text[..at]);
            for ((_, part), (_, all)) in cut.calls.iter().zip(&whole.calls) {
                assert!(all.starts_with(part.as_str()), "{name}: {part} of {all}");
            }
        }
    }
}
