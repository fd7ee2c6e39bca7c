//! Bodies that are wrong, each with the field that its refusal names.

use conclave_tests::Client;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
pub const TEXT: &str = "/v1/completions";

/// One body and what it must be answered with.
pub struct Case {
    path: &'static str,
    body: Vec<u8>,
    status: u16,
    /// The field that the answer names; empty: none can be named.
    field: String,
}

impl Case {
    pub fn new(path: &'static str, body: impl Into<Vec<u8>>, status: u16, field: &str) -> Case {
        Case {
            path,
            body: body.into(),
            status,
            field: field.into(),
        }
    }

    /// A complete request with one field set to `value`, which is JSON or something like it.
    pub fn field(path: &'static str, field: &str, value: &str) -> Case {
        let prompt = if path == CHAT {
            r#""messages":[{"role":"user","content":"a"}]"#
        } else {
            r#""prompt":"a""#
        };
        Case::new(path, format!("{{{prompt},\"{field}\":{value}}}"), 400, field)
    }

    pub fn check(&self, client: &Client) {
        let shown = String::from_utf8_lossy(&self.body[..self.body.len().min(120)]).into_owned();
        let answer = client.post_bytes(self.path, &self.body);
        let what = format!("{} {shown}: {answer:?}", self.path);
        assert_eq!(answer.status, self.status, "{what}");
        let error = &answer.body["error"];
        let message = error["message"].as_str().unwrap_or_default();
        assert!(!message.is_empty(), "{what}");
        if self.field.is_empty() {
            assert_eq!(error["param"], Value::Null, "{what}");
        } else {
            assert_eq!(error["param"], json!(self.field), "{what}");
        }
    }
}

/// Every numeric field with every value that is no number of its kind, or no number that fits.
pub fn numbers() -> Vec<Case> {
    const NOT_NUMBERS: [&str; 4] = ["\"x\"", "[]", "{}", "true"];
    const NOT_INTEGERS: [&str; 4] = ["1.5", "1e30", "18446744073709551616", "-9223372036854775809"];
    const NOT_FLOATS: [&str; 4] = ["1e39", "-1e39", "1e308", "-1e308"];
    let integers = [
        "n",
        "max_tokens",
        "seed",
        "top_k",
        "min_tokens",
        "priority",
        "truncate_prompt_tokens",
    ];
    let floats = [
        "temperature",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    ];
    let mut cases = Vec::new();
    for path in [CHAT, TEXT] {
        for (fields, wrong) in [(&integers[..], NOT_INTEGERS), (&floats[..], NOT_FLOATS)] {
            for field in fields {
                for value in NOT_NUMBERS.into_iter().chain(wrong) {
                    cases.push(Case::field(path, field, value));
                }
            }
        }
    }
    cases
}

/// Numbers of the right kind that mean nothing.
pub fn ranges() -> Vec<Case> {
    let wrong: [(&str, &[&str]); 12] = [
        ("n", &["0", "-1", "129", "1000000000"]),
        (
            "max_tokens",
            &["0", "-1", "40000", "9223372036854775807", "9223372036854775808"],
        ),
        ("min_tokens", &["-1", "40000"]),
        ("temperature", &["-0.1", "100.5", "1e30"]),
        ("top_p", &["0", "-1", "1.01", "1e-40"]),
        ("top_k", &["-2", "2147483648"]),
        ("min_p", &["-0.1", "1.1"]),
        ("presence_penalty", &["2.1", "-2.1"]),
        ("frequency_penalty", &["2.1", "-2.1"]),
        ("repetition_penalty", &["0", "-1", "101", "1e-40", "0.009"]),
        ("truncate_prompt_tokens", &["0", "-2", "9223372036854775807"]),
        ("cache_salt", &["5", "[]"]),
    ];
    let mut cases = Vec::new();
    for path in [CHAT, TEXT] {
        for (field, values) in wrong {
            cases.extend(values.iter().map(|value| Case::field(path, field, value)));
        }
    }
    cases
}

/// What is no JSON, no UTF-8, or too much of it.
pub fn bodies() -> Vec<Case> {
    let not_json: [&[u8]; 14] = [
        b"",
        b" ",
        b"\0",
        b"{",
        b"{}{}",
        b"\xef\xbb\xbf{\"prompt\":\"a\"}",
        b"\xff\xfe{\0}\0",
        b"{\"prompt\":\"\xff\"}",
        b"{\"prompt\":\"\xed\xa0\x80\"}",
        br#"{"prompt":"\ud800"}"#,
        br#"{"prompt":"a","temperature":NaN}"#,
        br#"{"prompt":"a","temperature":-Infinity}"#,
        br#"{"prompt":"a","temperature":1e400}"#,
        br#"{"prompt":"a","max_tokens":0x10}"#,
    ];
    let mut cases: Vec<Case> = not_json
        .into_iter()
        .flat_map(|body| [Case::new(TEXT, body, 400, ""), Case::new(CHAT, body, 400, "")])
        .collect();
    for open in ["[", "{\"a\":"] {
        let nested = format!("{{\"prompt\":\"a\",\"x\":{}", open.repeat(10_000));
        cases.push(Case::new(TEXT, nested, 400, ""));
    }
    let of_size = |bytes: usize| format!("{{\"prompt\":\"{}\"}}", "a".repeat(bytes - 13));
    // At the limit it is a prompt that is too long, one byte more is no body.
    cases.push(Case::new(TEXT, of_size(10 << 20), 400, "prompt"));
    cases.push(Case::new(TEXT, of_size((10 << 20) + 1), 413, ""));
    cases
}

/// Prompts, names and lists.
pub fn contents() -> Vec<Case> {
    let many = |item: &str, count: usize| format!("[{}]", vec![item; count].join(","));
    let text = |fields: String| format!("{{\"prompt\":\"a\",{fields}}}");
    vec![
        Case::new(TEXT, "{}", 400, "prompt"),
        Case::new(CHAT, "{}", 400, "messages"),
        Case::new(CHAT, r#"{"messages":[]}"#, 400, "messages"),
        Case::new(TEXT, r#"{"prompt":""}"#, 400, "prompt"),
        Case::new(TEXT, r#"{"prompt":[]}"#, 400, "prompt"),
        Case::new(TEXT, r#"{"prompt":[5,3072]}"#, 400, "prompt[1]"),
        Case::new(TEXT, r#"{"prompt":[4294967295]}"#, 400, "prompt[0]"),
        Case::new(TEXT, r#"{"prompt":[-1]}"#, 400, "prompt[0]"),
        Case::new(
            TEXT,
            format!("{{\"prompt\":{}}}", many("7", 32768)),
            400,
            "prompt",
        ),
        Case::new(
            TEXT,
            format!("{{\"prompt\":\"{}\"}}", "word ".repeat(200_000)),
            400,
            "prompt",
        ),
        Case::new(
            CHAT,
            format!(
                "{{\"messages\":{}}}",
                many(r#"{"role":"user","content":""}"#, 300_000)
            ),
            400,
            "messages",
        ),
        Case::new(
            TEXT,
            text(format!("\"stop\":{}", many("\"x\"", 100_000))),
            400,
            "stop",
        ),
        Case::new(
            TEXT,
            text(format!("\"stop\":{}", many("\"\"", 1))),
            400,
            "stop[0]",
        ),
        Case::new(
            TEXT,
            text(format!(
                "\"logit_bias\":{{{}}}",
                (0..3072)
                    .map(|id| format!("\"{id}\":1"))
                    .collect::<Vec<_>>()
                    .join(",")
            )),
            400,
            "logit_bias",
        ),
        Case::new(TEXT, text(r#""logit_bias":{"3072":1}"#.into()), 400, "logit_bias"),
        Case::new(
            TEXT,
            text(r#""logit_bias":{"7":101}"#.into()),
            400,
            "logit_bias[7]",
        ),
        Case::new(
            TEXT,
            text(r#""stop_token_ids":[3072]"#.into()),
            400,
            "stop_token_ids",
        ),
        Case::new(TEXT, text(r#""n":1,"n":2"#.into()), 400, "n"),
        Case::new(TEXT, text(r#""model":"gpt-4""#.into()), 404, "model"),
        Case::new(TEXT, text(r#""model":"\u0000""#.into()), 404, "model"),
        Case::new("/v1/messages", r#"{"messages":[],"max_tokens":5}"#, 400, ""),
        Case::new(
            "/v1/responses",
            r#"{"input":"a","max_output_tokens":0}"#,
            400,
            "max_output_tokens",
        ),
    ]
}
