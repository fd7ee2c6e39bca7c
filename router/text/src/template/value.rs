//! JSON values as template values, and template values as JSON text.
//!
//! A number that Rust would print otherwise than it was written (`1e5`, `1.10`, 40 digits) travels as an object
//! that remembers its digits, so that arguments a model wrote come back into the prompt digit for digit.

use std::{fmt, sync::Arc};

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, Object, ObjectRepr, ValueKind},
};

use super::shadow;
use crate::json::{Json, MAX_DEPTH};

/// A number that keeps its digits.
#[derive(Debug)]
pub struct RawNumber(Box<str>);

impl Object for RawNumber {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A JSON value for templates; `map_text` may replace every string that is not a key.
pub fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(digits) => number(digits),
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(to_value).collect(),
        Json::Object(object) => Value::from_pairs(
            object
                .iter()
                .map(|(key, value)| (Value::from(key.as_str()), to_value(value))),
        ),
    }
}

fn number(digits: &str) -> Value {
    if let Ok(integer) = digits.parse::<i64>()
        && integer.to_string() == digits
    {
        return Value::from(integer);
    }
    match digits.parse::<f64>() {
        Ok(float) if float.is_finite() && python_float(float) == digits => Value::from(float),
        _ => Value::from_object(RawNumber(digits.into())),
    }
}

/// `repr(float)` of Python: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    let plain = value.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// Whether a value is a number, an integer, a float: the tests of the same names, which must know `RawNumber`.
pub fn is_number(value: &Value) -> bool {
    value.is_number() || value.downcast_object_ref::<RawNumber>().is_some()
}

pub fn is_integer(value: &Value) -> bool {
    let digits = value.downcast_object_ref::<RawNumber>();
    value.is_integer() || digits.is_some_and(|raw| !raw.0.contains(['.', 'e', 'E']))
}

pub fn is_float(value: &Value) -> bool {
    is_number(value) && !is_integer(value)
}

/// The `tojson` filter as transformers defines it: `json.dumps` with keywords `ensure_ascii` (false unless given),
/// `indent`, `separators` and `sort_keys`. Nothing is escaped for HTML.
pub fn to_json(
    state: &State<'_, '_>,
    value: &Value,
    indent: Option<Value>,
    options: Kwargs,
    shadowed: bool,
) -> Result<Value, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get("indent")?,
    };
    let separators: Option<Vec<String>> = options.get("separators")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let indent = read_indent(indent)?;
    let (item, key) = match separators.as_deref() {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("separators must be two strings")),
    };
    let mut writer = Writer {
        state,
        out: String::new(),
        paid: 0,
        indent,
        item,
        key,
        ensure_ascii: ensure_ascii.unwrap_or(false),
        sort_keys: sort_keys.unwrap_or(false),
        shadowed,
    };
    writer.value(value, 0)?;
    Ok(Value::from(writer.out))
}

fn invalid(reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

/// A count of blanks or a string, per level.
fn read_indent(indent: Option<Value>) -> Result<Option<String>, Error> {
    /// More blanks per level than this serve nobody.
    const MAX_INDENT: usize = 64;
    let Some(indent) = indent.filter(|value| !value.is_none()) else {
        return Ok(None);
    };
    let text = match indent.as_str() {
        Some(text) => text.to_owned(),
        None => match usize::try_from(indent) {
            Ok(count) if count <= MAX_INDENT => " ".repeat(count),
            _ => return Err(invalid(format!("indent must be 0 to {MAX_INDENT} or a string"))),
        },
    };
    if text.len() > MAX_INDENT {
        return Err(invalid(format!("indent must be at most {MAX_INDENT} bytes")));
    }
    Ok(Some(text))
}

struct Writer<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    out: String,
    /// Bytes of `out` that fuel was paid for.
    paid: usize,
    indent: Option<String>,
    item: String,
    key: String,
    ensure_ascii: bool,
    sort_keys: bool,
    shadowed: bool,
}

impl Writer<'_, '_, '_> {
    /// Pays for what was written, so that a large value stops early and not when it is whole.
    fn pay(&mut self) -> Result<(), Error> {
        /// The engine's price for data is one fuel for so many bytes.
        const BYTES_PER_FUEL: usize = 64;
        let units = (self.out.len() - self.paid) / BYTES_PER_FUEL;
        self.paid += units * BYTES_PER_FUEL;
        self.state.consume_fuel(units as u64)
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid("tojson: nested too deeply"));
        }
        self.pay()?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.array(value, depth)?,
            ValueKind::Map => self.object(value, depth)?,
            ValueKind::Undefined => {
                return Err(invalid("tojson: an undefined value is not JSON"));
            }
            _ => match value.downcast_object_ref::<RawNumber>() {
                Some(raw) => self.out.push_str(&raw.0),
                None => return Err(invalid(format!("tojson: {} is not JSON", value.kind()))),
            },
        }
        Ok(())
    }

    fn number(&mut self, value: &Value) {
        let text = match f64::try_from(value.clone()) {
            Ok(float) if !value.is_integer() => python_float(float),
            _ => value.to_string(),
        };
        self.out.push_str(&text);
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        if self.shadowed {
            shadow::write_escaped(text, self.ensure_ascii, &mut self.out);
        } else {
            crate::json::write_escaped(text, self.ensure_ascii, &mut self.out);
        }
        self.out.push('"');
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn next(&mut self, first: bool, depth: usize) {
        if !first {
            self.out.push_str(&self.item);
        }
        self.line(depth + 1);
    }

    fn array(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut first = true;
        for item in value.try_iter()?.checked() {
            self.next(first, depth);
            first = false;
            self.value(&item?, depth + 1)?;
        }
        if !first {
            self.line(depth);
        }
        self.out.push(']');
        Ok(())
    }

    fn object(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut keys = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
        if self.sort_keys {
            keys.sort();
        }
        self.out.push('{');
        let mut first = true;
        for key in keys {
            self.next(first, depth);
            first = false;
            match key.kind() {
                ValueKind::String => self.string(key.as_str().unwrap_or_default()),
                ValueKind::None => self.out.push_str("\"null\""),
                ValueKind::Bool => self.string(if key.is_true() { "true" } else { "false" }),
                _ => {
                    self.out.push('"');
                    self.number(&key);
                    self.out.push('"');
                }
            }
            self.out.push_str(&self.key.clone());
            self.value(&value.get_item(&key)?, depth + 1)?;
        }
        if !first {
            self.line(depth);
        }
        self.out.push('}');
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_as_python_prints_them() {
        for (value, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (1e16, "1e+16"),
            (123456789012345680.0, "1.2345678901234568e+17"),
            (1e15, "1000000000000000.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (1e300, "1e+300"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
        ] {
            assert_eq!(python_float(value), text);
        }
    }

    #[test]
    fn odd_numbers_keep_their_digits() {
        for digits in [
            "1e5",
            "1.10",
            "-0",
            "18446744073709551616",
            "1E400",
            "0.30000000000000004",
        ] {
            let value = number(digits);
            assert_eq!(value.to_string(), digits);
            assert!(is_number(&value), "{digits}");
        }
        assert!(is_integer(&number("18446744073709551616")));
        assert!(is_float(&number("1e5")));
        assert!(is_integer(&number("7")) && !is_float(&number("7")));
    }
}
