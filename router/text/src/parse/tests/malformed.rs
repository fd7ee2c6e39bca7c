//! Malformed MiniMax-M2 calls, and those after them.

use super::*;

#[test]
fn malformed_minimax_calls_spoil_nothing() {
    let format = format("minimax_m2", "minimax_m2");
    let good = "<minimax:tool_call>\n<invoke name=\"f\">\n<parameter name=\"n\">1</parameter>\n</invoke>\n</minimax:tool_call>";
    for (bad, first) in [
        (
            "<minimax:tool_call><invoke name=\"f\"><parameter name=\"s\">x</minimax:tool_call>",
            Some(r#"{"s": "x"}"#),
        ),
        (
            "<minimax:tool_call><invoke name=\"f\"><parameter name=\"s\">x",
            Some(r#"{"s": "x"}"#),
        ),
        (
            "<minimax:tool_call><invoke name=\"f\"><parameter name=\"n\">7</invoke></minimax:tool_call>",
            Some(r#"{"n": 7}"#),
        ),
        (
            "<minimax:tool_call><invoke name=\"f\"><parameter name=\"s\"</minimax:tool_call>",
            Some("{}"),
        ),
        ("<minimax:tool_call><invoke name=\"f\"", None),
        ("<minimax:tool_call><invoke name=", None),
        ("<minimax:tool_call><invoke", None),
        ("<minimax:tool_call></parameter></invoke>", None),
        (
            "<minimax:tool_call><parameter name=\"s\">x</parameter></minimax:tool_call>",
            None,
        ),
        ("<minimax:tool_call><minimax:tool_call>", None),
    ] {
        let parsed = run(&format, &format!("a{bad}{good}z"));
        let mut expect: Vec<_> = first.into_iter().map(|arguments| ("f", arguments)).collect();
        expect.push(("f", r#"{"n": 1}"#));
        assert_eq!(calls(&parsed), expect, "{bad}");
        assert_eq!(parsed.content, "az", "{bad}");
    }
    let next = "<minimax:tool_call><invoke name=\"f\"><parameter name=\"s\">x\n<invoke name=\"g\">\n<parameter name=\"y\">2</parameter></invoke></minimax:tool_call>";
    assert_eq!(
        calls(&run(&format, next)),
        [("f", r#"{"s": "x\n"}"#), ("g", r#"{"y": "2"}"#)]
    );
}

#[test]
fn a_name_without_end_is_no_name() {
    let long = "é".repeat(700);
    let minimax = format("minimax_m2", "minimax_m2");
    let text =
        format!("<minimax:tool_call><invoke name=\"{long}<invoke name=\"g\"></invoke></minimax:tool_call>");
    assert_eq!(calls(&run(&minimax, &text)), [("g", "{}")]);
    let deepseek = format("deepseek_v31", "none");
    let text = format!(
        "<｜tool▁call▁begin｜>{long}<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁call▁begin｜>g<｜tool▁sep｜>{{}}"
    );
    assert_eq!(calls(&run(&deepseek, &text)), [("g", "{}")]);
}
