//! Any text cut anywhere, and the time a megabyte of markers takes.
//!
//! Proves invariant T1 of ARCHITECTURE.md.

use proptest::prelude::*;

use super::*;
use crate::testing::timed;

#[test]
fn a_megabyte_of_markers_takes_linear_time() {
    let time = |format: &Format, unit: &str, bytes: usize| {
        let text = unit.repeat(bytes / unit.len());
        let best = (0..5).map(|_| {
            let mut parser = format.parser(Some(rules(weather())), false).unwrap();
            timed(|| parse(parser.as_mut(), &[(None, text.as_str())], End::Stop)).1
        });
        best.min().unwrap()
    };
    for (name, units) in [
        (
            "minimax_m2",
            &[
                "<minimax:tool_call>",
                "<minimax:tool_call></minimax:tool_call>",
                "<minimax:tool_call",
                "<invoke name=",
                "<minimax:tool_call><invoke name=\"f\"><parameter name=\"s\">",
                "<minimax:tool_call><invoke name=\"f\"><parameter name=\"s\">x</invoke>",
            ][..],
        ),
        (
            "hermes",
            &[
                "<tool_call>",
                "<tool_call>{\"name\": \"f\", \"arguments\": {\"s\": \"</tool_call>",
                "<tool_call>{\"name\":",
            ],
        ),
        (
            "deepseek_v31",
            &["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"],
        ),
        ("harmony", &["<|start|>", "<|channel|>analysis<|message|>"]),
        ("json", &["{\"name\": \"f\"}", "[", "{"]),
    ] {
        let format = format(name, "none");
        for unit in units {
            let (small, large) = (time(&format, unit, 1 << 17), time(&format, unit, 1 << 20));
            // Eight times the text; a quadratic parser would take 64 times as long.
            assert!(
                large < small * 32 + std::time::Duration::from_millis(50),
                "{name} {unit}: {small:?} {large:?}"
            );
        }
    }
}

const FRAGMENTS: [&str; 22] = [
    "<think>",
    "</think>",
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    "<invoke name=\"f\">",
    "<invoke name=",
    "</invoke>",
    "<parameter name=\"s\">",
    "<parameter name=\"n\">",
    "<parameter name=",
    "</parameter>",
    ">",
    "\"",
    "\n",
    "7",
    "é🤔",
    "<tool_call>",
    "</tool_call>",
    "{\"name\": \"f\", \"arguments\": {\"s\": \"",
    "{",
    "}",
    "\\",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Whatever the output, pieces do not depend on the cut, and every call of a whole output is JSON.
    #[test]
    fn nothing_depends_on_the_cut(
        parts in prop::collection::vec(prop::sample::select(&FRAGMENTS[..]), 0..20),
        cuts in prop::collection::vec(0usize..400, 0..8),
        thinking in any::<bool>(),
        stop in any::<bool>(),
        name in prop::sample::select(&["minimax_m2", "hermes", "qwen3_coder", "json"][..]),
    ) {
        let format = format(name, "minimax_m2");
        let text = parts.concat();
        let end = if stop { End::Stop } else { End::Cut };
        let run = |pieces: &[&str]| {
            let items: Vec<_> = pieces.iter().map(|piece| (None, *piece)).collect();
            let mut parser = format.parser(Some(rules(weather())), thinking).unwrap();
            parse(parser.as_mut(), &items, end)
        };
        let mut places: Vec<usize> = cuts.into_iter().filter(|&at| text.is_char_boundary(at)).collect();
        places.extend([0, text.len()]);
        places.sort_unstable();
        let pieces: Vec<&str> = places.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        let whole = run(&[&text]);
        prop_assert_eq!(run(&pieces), whole.clone());
        for (_, arguments) in &whole.calls {
            if stop {
                prop_assert!(matches!(json::parse(arguments), Ok(Json::Object(_))), "{} {}", text, arguments);
            }
        }
    }
}
