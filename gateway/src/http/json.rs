//! JSON in: strict syntax, bounded depth, and errors that name the field.
//!
//! Fields whose JSON goes to the router as text (tool schemas, grammars, template variables) are kept as the
//! client wrote them: key order and the digits of numbers carry over. They are checked here all the same.

use std::collections::HashSet;
use std::fmt;

use http::{HeaderMap, StatusCode, header};
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::body::Held;
use super::error::{ApiError, ApiResult};
use super::faults;

/// Objects and arrays within each other. serde_json itself stops at 128.
pub(crate) const DEPTH_MAX: usize = 100;
/// Bodies larger than this are decoded off the runtime's threads: at about 1 GB/s it is 0.25 ms.
const DECODE_INLINE_BYTES: usize = 256 << 10;

/// Decodes a request body.
///
/// # Errors
/// 415 for another content type, 400 for anything that is not the JSON of a `T`, with the field in `param`.
pub(crate) async fn read<T>(headers: &HeaderMap, body: Held) -> ApiResult<T>
where
    T: DeserializeOwned + Send + 'static,
{
    check_content_type(headers)?;
    if body.bytes.len() <= DECODE_INLINE_BYTES {
        return decode(&body.bytes);
    }
    tokio::task::spawn_blocking(move || decode(&body.bytes))
        .await
        .unwrap_or_else(|error| {
            Err(ApiError::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("decoding the body failed: {error}"),
            ))
        })
}

/// A form post of a web page carries no JSON content type: refusing it keeps pages from calling a local
/// gateway behind their visitor's back.
fn check_content_type(headers: &HeaderMap) -> ApiResult<()> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return Ok(());
    };
    let essence = value
        .to_str()
        .unwrap_or_default()
        .split(';')
        .next()
        .unwrap_or_default()
        .trim();
    if essence.eq_ignore_ascii_case("application/json") || essence.to_ascii_lowercase().ends_with("+json") {
        return Ok(());
    }
    Err(ApiError::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        format!("content type {essence:?} is not served: send application/json"),
    )
    .code("unsupported_media_type"))
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> ApiResult<T> {
    let bad = |message: String| ApiError::new(StatusCode::BAD_REQUEST, message).code("invalid_json");
    if bytes.is_empty() {
        return Err(bad(String::from("the request body is empty: send a JSON object")));
    }
    if bytes.starts_with(b"\xef\xbb\xbf") {
        return Err(bad(String::from(
            "the request body begins with a byte order mark: send plain UTF-8",
        )));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        bad(format!(
            "the request body is not UTF-8: invalid at byte {}",
            error.valid_up_to()
        ))
    })?;
    if text.trim_start().starts_with('[') {
        // Serde would read a list as the fields in order.
        return Err(bad(String::from(
            "the request body is a list: send a JSON object",
        )));
    }
    check_depth(bytes)?;
    let mut json = serde_json::Deserializer::from_str(text);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = named(error.path());
        let inner = error.into_inner();
        if !inner.is_data() {
            let place = path.as_deref().unwrap_or("the request body is not valid JSON");
            return bad(format!("{place}: {inner}"));
        }
        faults::refuse(path, &inner)
    })?;
    json.end()
        .map_err(|error| bad(format!("after the JSON object: {error}")))?;
    Ok(value)
}

/// One pass over the bytes, without recursion: the decoders behind it may then recurse.
fn check_depth(bytes: &[u8]) -> ApiResult<()> {
    let mut depth = 0_usize;
    let mut in_string = false;
    let mut escaped = false;
    for &byte in bytes {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => continue,
        }
        if depth > DEPTH_MAX {
            let message = format!("the request's JSON is nested more than {DEPTH_MAX} levels deep");
            return Err(ApiError::new(StatusCode::BAD_REQUEST, message).code("invalid_json"));
        }
    }
    Ok(())
}

/// The path of a value; within a key, and at the root, it has none.
fn named(path: &serde_path_to_error::Path) -> Option<String> {
    Some(path.to_string()).filter(|path| !path.is_empty() && path != "." && path != "?")
}

/// Reads a part of a body that was kept as text, and stands in `param`.
pub(crate) fn part<T: DeserializeOwned>(raw: &RawValue, param: &str) -> ApiResult<T> {
    let mut json = serde_json::Deserializer::from_str(raw.get());
    serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let within = match named(error.path()) {
            Some(path) if path.starts_with('[') => format!("{param}{path}"),
            Some(path) => format!("{param}.{path}"),
            None => param.to_owned(),
        };
        faults::refuse(Some(within), error.inner())
    })
}

/// Checks JSON that is passed on as text: keys once, strings valid Unicode, numbers in range.
pub(crate) fn check_raw(raw: &RawValue, param: &str) -> ApiResult<()> {
    let mut json = serde_json::Deserializer::from_str(raw.get());
    Strict
        .deserialize(&mut json)
        .map_err(|error| faults::refuse(Some(param.to_owned()), &error))
}

/// [`check_raw`], and it must be an object.
pub(crate) fn check_object(raw: &RawValue, param: &str) -> ApiResult<()> {
    if !raw.get().starts_with('{') {
        return Err(ApiError::field(param, format!("{param} must be a JSON object")).code("invalid_value"));
    }
    check_raw(raw, param)
}

/// Reads any JSON and keeps nothing.
struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Strict)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            map.next_value_seed(Strict)?;
            if let Some(key) = seen.replace(key) {
                return Err(A::Error::custom(format_args!("duplicate key `{key}`")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Outer {
        inner: Vec<Inner>,
        text: Option<String>,
    }

    #[derive(Debug, Deserialize)]
    struct Inner {
        number: Option<i64>,
    }

    #[test]
    fn names_the_field() {
        for (body, param, code) in [
            (
                &br#"{"inner":[{"number":1},{"number":"x"}]}"#[..],
                Some("inner[1].number"),
                "invalid_value",
            ),
            (
                br#"{"inner":[{"number":9223372036854775808}]}"#,
                Some("inner[0].number"),
                "invalid_value",
            ),
            (
                br#"{"inner":[{"number":1,"number":2}]}"#,
                Some("inner[0].number"),
                "invalid_value",
            ),
            (br#"{}"#, Some("inner"), "invalid_value"),
            (br#"{"inner":[{"number":1e400}]}"#, None, "invalid_json"),
            (br#"{"inner":[{"number":NaN}]}"#, None, "invalid_json"),
            (br#"{"inner":[]} x"#, None, "invalid_json"),
            (br#"{"inner":["#, None, "invalid_json"),
            (b"{inner", None, "invalid_json"),
            (b"", None, "invalid_json"),
            (b"\xef\xbb\xbf{}", None, "invalid_json"),
            (b"{\"inner\": \"\xff\"}", None, "invalid_json"),
            (br#"{"inner":[],"text":"\ud800"}"#, None, "invalid_json"),
        ] {
            let error = decode::<Outer>(body).unwrap_err();
            let text = String::from_utf8_lossy(body);
            assert_eq!(error.param.as_deref(), param, "{text}: {}", error.message);
            assert_eq!(error.code.as_deref(), Some(code), "{text}: {}", error.message);
            assert!(!error.message.contains('?'), "{text}: {}", error.message);
        }
        let good: Outer = decode(br#"{"inner":[{"number":0,"unknown":[1]}]} "#).unwrap();
        assert_eq!((good.inner[0].number, good.text), (Some(0), None));
    }

    #[test]
    fn depth_is_bounded_at_one_level_more() {
        let nested = |levels: usize| {
            let mut body = br#"{"inner":[],"x":"#.to_vec();
            body.extend(std::iter::repeat_n(b'[', levels));
            body.extend(std::iter::repeat_n(b']', levels));
            body.push(b'}');
            body
        };
        assert!(decode::<Outer>(&nested(DEPTH_MAX - 1)).is_ok());
        assert!(decode::<Outer>(&nested(DEPTH_MAX)).is_err());
        assert!(decode::<Outer>(&nested(1_000_000)).is_err());
        assert!(decode::<Outer>(br#"{"inner":[],"x":"[[[\"[[["}"#).is_ok());
    }

    #[test]
    fn raw_json_is_checked_but_not_rewritten() {
        let raw = |text: &str| RawValue::from_string(text.to_owned()).unwrap();
        assert!(check_object(&raw(r#"{"a":1.0,"b":[{"a":12345678901234567890123}]}"#), "x").is_ok());
        for bad in [
            r#"{"a":1,"a":2}"#,
            r#"{"a":[{"b":1,"b":1}]}"#,
            r#"{"a":1e400}"#,
            r#"{"a":"\ud800"}"#,
            "[]",
        ] {
            assert!(check_object(&raw(bad), "x").is_err(), "{bad}");
        }
    }
}
