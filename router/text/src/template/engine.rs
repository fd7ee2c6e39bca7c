//! The Jinja environment as transformers sets it up, and its errors in words.

use std::error::Error as _;

use minijinja::{
    Environment, Error, ErrorKind, Output, State, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, ValueKind, from_args},
};

use super::value;
use crate::tokenizer::TokenizerConfig;

/// A message the template itself raised.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

pub fn environment(config: &TokenizerConfig, shadowed: bool) -> Environment<'static> {
    let mut environment = Environment::new();
    // The options are constants, so this cannot fail.
    if let Ok(syntax) = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
    {
        environment.set_syntax(syntax);
    }
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(print_value);
    environment.set_unknown_method_callback(method);
    environment.add_filter(
        "tojson",
        move |state: &State, value: &Value, indent: Option<Value>, options: Kwargs| {
            value::to_json(state, value, indent, options, shadowed)
        },
    );
    environment.add_test("number", |value: &Value| value::is_number(value));
    environment.add_test("integer", |value: &Value| value::is_integer(value));
    environment.add_test("float", |value: &Value| value::is_float(value));
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        let detail = message.clone();
        Err(Error::new(ErrorKind::InvalidOperation, detail).with_source(Raised(message)))
    });
    environment.add_function("strftime_now", strftime_now);
    for (name, text) in &config.special_tokens {
        environment.add_global(name.clone(), text.clone());
    }
    environment
}

/// Most items in a printed list or mapping, those of its parts included: the engine charges for the text only once it is
/// there, and `[1] * 10 ** 8` inside a macro has taken seconds.
const MAX_PRINTED_ITEMS: usize = 200_000;

/// Lists within lists; a namespace that holds itself has no end.
const MAX_PRINTED_DEPTH: usize = 64;

/// Whether a value has no more than `left` items, counting those of its parts; takes them off.
fn is_modest(value: &Value, left: &mut usize, depth: usize) -> bool {
    if !matches!(
        value.kind(),
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable
    ) {
        return true;
    }
    let Some(deeper) = depth.checked_sub(1) else {
        return false;
    };
    // Without a length it is no list that a template can repeat.
    let Some(rest) = value.len().map_or(Some(*left), |len| left.checked_sub(len)) else {
        return false;
    };
    *left = rest;
    let is_map = value.kind() == ValueKind::Map;
    value.len().is_none()
        || value.try_iter().is_ok_and(|mut items| {
            items.all(|item| match is_map {
                true => value
                    .get_item(&item)
                    .is_ok_and(|item| is_modest(&item, left, deeper)),
                false => is_modest(&item, left, deeper),
            })
        })
}

fn print_value(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    let mut left = MAX_PRINTED_ITEMS;
    if is_modest(value, &mut left, MAX_PRINTED_DEPTH) {
        return minijinja::escape_formatter(out, state, value);
    }
    let detail = format!(
        "a list or mapping of more than {MAX_PRINTED_ITEMS} items or {MAX_PRINTED_DEPTH} levels is not printed"
    );
    Err(Error::new(ErrorKind::InvalidOperation, detail))
}

/// The time in UTC, as `datetime.now().strftime` prints it.
fn strftime_now(format: &str) -> Result<String, Error> {
    let now = jiff::Timestamp::now().to_zoned_datetime(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &now)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
}

/// Python's methods: the ones of minijinja-contrib and a few that templates use beyond them.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), name) {
        (Some(text), "removeprefix") => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        (Some(text), "removesuffix") => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        (Some(text), "rsplit") => {
            let (separator, count): (&str, Option<i64>) = from_args(args)?;
            rsplit(text, separator, count)
        }
        (Some(text), "partition" | "rpartition") => {
            let (separator,): (&str,) = from_args(args)?;
            partition(text, separator, name == "rpartition")
        }
        (Some(text), "format") if !modest_format(text) => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("format: widths above {MAX_FORMAT_WIDTH} are refused"),
        )),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// Largest width or precision in `str.format`, whose results the engine's fuel does not see before they exist.
const MAX_FORMAT_WIDTH: usize = 1000;

/// Whether no field of a format string asks for more than `MAX_FORMAT_WIDTH` characters, or takes its width from
/// an argument.
fn modest_format(text: &str) -> bool {
    let modest =
        |digits: &str| digits.is_empty() || digits.parse().is_ok_and(|n: usize| n <= MAX_FORMAT_WIDTH);
    let fields = text.split('{').skip(1);
    let mut specs = fields.map(|field| field.split_once(':').map_or("", |(_, spec)| spec));
    specs.all(|spec| {
        // A spec that is not closed before the next brace holds a nested field.
        (spec.is_empty() || spec.contains('}')) && spec.split(|c: char| !c.is_ascii_digit()).all(modest)
    })
}

fn not_empty(separator: &str) -> Result<(), Error> {
    if separator.is_empty() {
        return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
    }
    Ok(())
}

fn rsplit(text: &str, separator: &str, count: Option<i64>) -> Result<Value, Error> {
    not_empty(separator)?;
    let pieces = match count.map(usize::try_from) {
        Some(Ok(count)) => count.saturating_add(1),
        _ => usize::MAX,
    };
    let mut parts: Vec<Value> = text.rsplitn(pieces, separator).map(Value::from).collect();
    parts.reverse();
    Ok(Value::from(parts))
}

fn partition(text: &str, separator: &str, last: bool) -> Result<Value, Error> {
    not_empty(separator)?;
    let found = if last {
        text.rsplit_once(separator)
    } else {
        text.split_once(separator)
    };
    let parts = match found {
        Some((before, after)) => [before, separator, after],
        None if last => ["", "", text],
        None => [text, "", ""],
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

/// One line: what a template raised, or what is wrong with it and where.
pub fn describe(error: &Error) -> String {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
    while let Some(inner) = cause {
        if let Some(raised) = inner.downcast_ref::<Raised>() {
            return raised.0.clone();
        }
        cause = inner.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return "the chat template does too many steps or makes too much text".to_owned();
    }
    let detail = error
        .detail()
        .map(|detail| format!(": {detail}"))
        .unwrap_or_default();
    let line = error
        .line()
        .map(|line| format!(" (line {line})"))
        .unwrap_or_default();
    format!("chat template: {}{detail}{line}", error.kind())
}
