//! Bounds on constraints that the grammar library does not have.
//!
//! Its fuel counts steps, and some steps are unbounded: intersecting many patterns took minutes and gigabytes, a
//! product of two `multipleOf` seconds, a chain of 5,000 rules overflowed the stack. So what leads there is refused
//! before it is compiled. Each bound is far above what schemas in use have, and its test shows what it stops.

use serde_json::Value;

use super::schema_bounds::check_schema;

/// Longest regular expression, in bytes.
pub const MAX_REGEX_BYTES: usize = 32 << 10;
/// Longest single string in a schema (an enum's value, a property's name) or a choice, in bytes.
pub const MAX_LITERAL_BYTES: usize = 16 << 10;
/// Longest Lark or EBNF grammar of a client, in bytes.
pub const MAX_GRAMMAR_BYTES: usize = 64 << 10;
/// Rules of a client's grammar: the compiler may recurse through all of them, and an error in the last one is told
/// once more by each rule before it.
pub const MAX_RULES: usize = 500;

/// Stack of the thread that compiles. `MAX_NESTING` levels of a schema use about 20 MB, `MAX_RULES` rules 15 MB.
pub const STACK_BYTES: usize = 64 << 20;

pub type Check = std::result::Result<(), String>;

/// Checks a regular expression.
pub fn check_regex(regex: &str) -> Check {
    if regex.len() > MAX_REGEX_BYTES {
        return Err(format!(
            "is {} bytes long; at most {MAX_REGEX_BYTES} are compiled",
            regex.len()
        ));
    }
    match repeated_quantifier(regex) {
        Some(at) => Err(format!(
            "{regex:.100?}: a quantifier follows a quantifier at byte {at}"
        )),
        None => Ok(()),
    }
}

/// Checks a single text that the output may have to spell out.
pub fn check_literal(text: &str) -> Check {
    if text.len() > MAX_LITERAL_BYTES {
        return Err(format!(
            "holds a string of {} bytes; at most {MAX_LITERAL_BYTES} are compiled",
            text.len()
        ));
    }
    Ok(())
}

/// Where a quantifier is itself quantified (`a**`). The library would read it as `(a*)*`, others refuse it or read
/// it as possessive: a request that holds one is mistaken.
fn repeated_quantifier(regex: &str) -> Option<usize> {
    let (mut in_class, mut after_quantifier) = (false, false);
    let mut chars = regex.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let quantifier = !in_class && matches!(c, '*' | '+' | '?' | '{');
        // One `?` makes the quantifier before it lazy.
        if quantifier && after_quantifier && c != '?' {
            return Some(at);
        }
        let mut braced = quantifier && c == '{';
        match c {
            '\\' => {
                let letter = chars.next().map(|(_, c)| c);
                let takes_braces = matches!(letter, Some('p' | 'P' | 'x' | 'u' | 'U'));
                braced = takes_braces && chars.next_if(|(_, c)| *c == '{').is_some();
            }
            '[' => in_class = true,
            ']' => in_class = false,
            _ => {}
        }
        if braced {
            while chars.next().is_some_and(|(_, c)| c != '}') {}
        }
        after_quantifier = quantifier && !(after_quantifier && c == '?');
    }
    None
}

/// Checks a client's Lark grammar.
pub fn check_lark(text: &str) -> Check {
    if text.len() > MAX_GRAMMAR_BYTES {
        return Err(format!(
            "is {} bytes; at most {MAX_GRAMMAR_BYTES} are compiled",
            text.len()
        ));
    }
    let outside = outside_literals(text)?;
    let rules = outside.matches(':').count();
    if rules > MAX_RULES {
        return Err(format!("has {rules} rules; at most {MAX_RULES} are compiled"));
    }
    if outside.contains('&') {
        return Err("intersection (&) is not served: it may need unbounded memory".to_owned());
    }
    let mut complements = outside.match_indices('~').map(|(at, _)| &outside[at + 1..]);
    // `a~3..5` is a repetition.
    if complements.any(|rest| !rest.trim_start().starts_with(|c: char| c.is_ascii_digit())) {
        return Err("complement (~) is not served: it may need unbounded memory".to_owned());
    }
    Ok(())
}

/// A grammar without its strings, regular expressions and comments; those are checked here. JSON after `%json` is
/// made of strings and punctuation, and its schemas are checked as they stand.
fn outside_literals(text: &str) -> std::result::Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['"', '/', '#', '%']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if rest.starts_with("//") || rest.starts_with('#') {
            rest = &rest[rest.find('\n').unwrap_or(rest.len())..];
        } else if let Some(json) = rest.strip_prefix("%json") {
            let mut values = serde_json::Deserializer::from_str(json).into_iter::<Value>();
            let schema = values
                .next()
                .and_then(|value| value.ok())
                .ok_or("%json: is not followed by valid JSON")?;
            check_schema(&schema)?;
            rest = &json[values.byte_offset()..];
        } else if rest.starts_with('%') {
            out.push('%');
            rest = &rest[1..];
        } else {
            let quote = if rest.starts_with('"') { '"' } else { '/' };
            let end = end_of_literal(&rest[1..], quote).ok_or("a string or regex is not closed")?;
            let inner = &rest[1..=end];
            if quote == '/' {
                check_regex(inner)?
            } else {
                check_literal(inner)?
            }
            out.push(' ');
            rest = &rest[end + 2..];
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// The byte of the closing quote.
pub(super) fn end_of_literal(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    text.char_indices().find_map(|(at, c)| {
        let ends = !escaped && c == quote;
        escaped = !escaped && c == '\\';
        ends.then_some(at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_quantifiers_are_found() {
        for (regex, at) in [
            ("foo**", Some(4)),
            ("a{2}+", Some(4)),
            ("a?*", Some(2)),
            (r"\p{L}{2}{3}", Some(8)),
            ("a*?*", None),
            ("a*?b+?", None),
            (r"[**]\*\**", None),
            (r"\p{L}{1,3}\x{41}+\d{2}", None),
            ("(a+)+", None),
            ("", None),
        ] {
            assert_eq!(repeated_quantifier(regex), at, "{regex}");
        }
    }

    #[test]
    fn lark_is_checked_outside_of_its_literals() {
        for good in [
            "start: \"a & ~ : b\" /x&~y/ // & ~\n# &",
            "start: x~3..5\nx: \"\\\"&\"",
            "start: %json {\"a\": \"& ~ / \"} x\nx: \"y\"",
            "%ignore /[ ]/\nstart: \"a\"",
        ] {
            assert_eq!(check_lark(good), Ok(()), "{good}");
        }
        for bad in [
            "start: A & B",
            "A: ~/x/",
            "start: \"a",
            "start: /foo**/",
            "start: %json {\"pattern\": \"foo**\"}",
            "start: %json x",
            &"x:a\n".repeat(MAX_RULES + 1),
            &" ".repeat(MAX_GRAMMAR_BYTES + 1),
        ] {
            assert!(check_lark(bad).is_err(), "{bad:.50}");
        }
    }
}
