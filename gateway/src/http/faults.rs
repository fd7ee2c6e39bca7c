//! What serde says of a value that has the wrong form, in JSON's words: its own are Rust's (`expected struct StreamOptions`,
//! `expected f64`).
//!
//! Only data errors come here: the JSON itself was whole. The position is left out, since the field's name says where,
//! and a part that was read by itself counts from its own beginning.

use http::StatusCode;

use super::error::ApiError;

/// 400 about `param`, or about a field in it. Without `param` the value is the whole body.
pub(super) fn refuse(param: Option<String>, error: &serde_json::Error) -> ApiError {
    let (field, problem) = of(error);
    let param = match (param, field) {
        (Some(param), Some(field)) => Some(format!("{param}.{field}")),
        (param, field) => param.or(field),
    };
    let message = match &param {
        Some(param) => format!("{param}: {problem}"),
        None => problem,
    };
    ApiError {
        param,
        ..ApiError::new(StatusCode::BAD_REQUEST, message).code("invalid_value")
    }
}

/// The field of the object that the error is about, where the object lacks it or has it twice, and the problem.
fn of(error: &serde_json::Error) -> (Option<String>, String) {
    let text = error.to_string();
    let position = format!(" at line {} column {}", error.line(), error.column());
    let text = text.strip_suffix(&position).unwrap_or(&text);
    for (start, problem) in [
        ("missing field `", "missing"),
        ("duplicate field `", "given twice"),
    ] {
        if let Some((name, _)) = text.strip_prefix(start).and_then(|rest| rest.split_once('`')) {
            return (Some(name.to_owned()), problem.to_owned());
        }
    }
    let Some((found, expected)) = text.rsplit_once(", expected ") else {
        return (None, text.to_owned());
    };
    (
        None,
        format!("{}, expected {}", json_found(found), json_expected(expected)),
    )
}

/// `invalid type: sequence`: what the value is. What it holds, a string's text, stays as it is.
fn json_found(found: &str) -> &str {
    match found {
        "invalid type: sequence" => "invalid type: list",
        "invalid type: map" => "invalid type: object",
        other => other,
    }
}

fn json_expected(expected: &str) -> &str {
    match expected {
        "f32" | "f64" => "a number",
        "i32" => "a 32-bit integer",
        "i64" => "a 64-bit integer",
        "u32" => "a 32-bit integer that is not negative",
        "u64" => "a 64-bit integer that is not negative",
        "a sequence" => "a list",
        "a map" => "an object",
        _ if expected.starts_with("struct ") => "an object",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "read, and never looked at")]
    struct Options {
        share: Option<f64>,
        count: Option<u32>,
        seed: Option<i64>,
        list: Option<Vec<String>>,
        map: Option<BTreeMap<String, i32>>,
        inner: Option<Box<Options>>,
    }

    #[test]
    fn no_word_is_rusts() {
        for (json, problem) in [
            (
                r#"{"share":"a"}"#,
                r#"invalid type: string "a", expected a number"#,
            ),
            (
                r#"{"count":-1}"#,
                "invalid value: integer `-1`, expected a 32-bit integer that is not negative",
            ),
            (
                r#"{"seed":1.5}"#,
                "invalid type: floating point `1.5`, expected a 64-bit integer",
            ),
            (r#"{"list":{}}"#, "invalid type: object, expected a list"),
            (r#"{"map":[]}"#, "invalid type: list, expected an object"),
            (
                r#"{"map":{"a":true}}"#,
                "invalid type: boolean `true`, expected a 32-bit integer",
            ),
            (r#"{"inner":5}"#, "invalid type: integer `5`, expected an object"),
            (r#"{"inner":[]}"#, "invalid length 0, expected an object"),
            (
                r#"{"share":"b, expected a map"}"#,
                r#"invalid type: string "b, expected a map", expected a number"#,
            ),
        ] {
            let error = serde_json::from_str::<Options>(json).unwrap_err();
            assert_eq!(of(&error), (None, problem.to_owned()), "{json}");
        }
        let twice = serde_json::from_str::<Options>(r#"{"seed":1,"seed":1}"#).unwrap_err();
        assert_eq!(of(&twice), (Some("seed".to_owned()), "given twice".to_owned()));
    }
}
