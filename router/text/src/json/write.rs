//! JSON text as Python's `json.dumps` lays it out.

use std::fmt::Write;

use super::Json;

/// Layout of the output; the default is one line with `", "` and `": "`, and no ASCII escapes.
#[derive(Clone, Debug)]
pub struct Style {
    /// Blanks (or any text) per level; `None` is one line.
    pub indent: Option<String>,
    pub item_separator: String,
    pub key_separator: String,
    /// Write everything above ASCII as `\uXXXX`.
    pub ensure_ascii: bool,
    pub sort_keys: bool,
}

impl Default for Style {
    fn default() -> Self {
        Self {
            indent: None,
            item_separator: ", ".to_owned(),
            key_separator: ": ".to_owned(),
            ensure_ascii: false,
            sort_keys: false,
        }
    }
}

impl Style {
    /// Appends `value` to `out`. Depth is bounded by whoever made the value.
    pub fn write(&self, value: &Json, out: &mut String) {
        self.value(value, 0, out);
    }

    fn value(&self, value: &Json, depth: usize, out: &mut String) {
        match value {
            Json::Null => out.push_str("null"),
            Json::Bool(true) => out.push_str("true"),
            Json::Bool(false) => out.push_str("false"),
            Json::Number(digits) => out.push_str(digits),
            Json::String(text) => write_string(text, self.ensure_ascii, out),
            Json::Array(items) => {
                let mut list = List::new(self, '[', depth, out);
                for item in items {
                    list.next(out);
                    self.value(item, depth + 1, out);
                }
                list.close(']', out);
            }
            Json::Object(object) => {
                let mut pairs: Vec<_> = object.iter().collect();
                if self.sort_keys {
                    pairs.sort_by(|a, b| a.0.cmp(b.0));
                }
                let mut list = List::new(self, '{', depth, out);
                for (key, item) in pairs {
                    list.next(out);
                    write_string(key, self.ensure_ascii, out);
                    out.push_str(&self.key_separator);
                    self.value(item, depth + 1, out);
                }
                list.close('}', out);
            }
        }
    }
}

/// One array or object being written.
struct List<'a> {
    style: &'a Style,
    depth: usize,
    items: usize,
}

impl<'a> List<'a> {
    fn new(style: &'a Style, open: char, depth: usize, out: &mut String) -> Self {
        out.push(open);
        Self {
            style,
            depth,
            items: 0,
        }
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.style.indent {
            out.push('\n');
            for _ in 0..depth {
                out.push_str(indent);
            }
        }
    }

    fn next(&mut self, out: &mut String) {
        if self.items > 0 {
            out.push_str(&self.style.item_separator);
        }
        self.items += 1;
        self.line(self.depth + 1, out);
    }

    fn close(self, close: char, out: &mut String) {
        if self.items > 0 {
            self.line(self.depth, out);
        }
        out.push(close);
    }
}

/// Appends `text` as a JSON string with its quotes.
pub fn write_string(text: &str, ensure_ascii: bool, out: &mut String) {
    out.push('"');
    write_escaped(text, ensure_ascii, out);
    out.push('"');
}

/// Appends `text` as the inside of a JSON string. A text may be escaped piece by piece: the pieces' escapes
/// concatenate to the whole's.
pub(crate) fn write_escaped(text: &str, ensure_ascii: bool, out: &mut String) {
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 => unicode(c as u16, out),
            c if ensure_ascii && !c.is_ascii() => {
                let mut units = [0; 2];
                c.encode_utf16(&mut units)
                    .iter()
                    .for_each(|&unit| unicode(unit, out));
            }
            c => out.push(c),
        }
    }
}

fn unicode(unit: u16, out: &mut String) {
    // Writing to a String cannot fail.
    let _ = write!(out, "\\u{unit:04x}");
}

#[cfg(test)]
mod tests {
    use super::super::{object, parse};
    use super::*;

    #[test]
    fn layouts_match_python() {
        let value = parse(r#"{"b":[1,{}],"a":"ü\n\u0001"}"#).unwrap();
        assert_eq!(value.to_python(), "{\"b\": [1, {}], \"a\": \"ü\\n\\u0001\"}");
        let mut out = String::new();
        let style = Style {
            indent: Some("  ".to_owned()),
            item_separator: ",".to_owned(),
            ensure_ascii: true,
            sort_keys: true,
            ..Style::default()
        };
        style.write(&value, &mut out);
        assert_eq!(
            out,
            "{\n  \"a\": \"\\u00fc\\n\\u0001\",\n  \"b\": [\n    1,\n    {}\n  ]\n}"
        );
    }

    #[test]
    fn escapes_concatenate() {
        let text = "a\"\\\u{1}🤔\n";
        let mut whole = String::new();
        write_escaped(text, true, &mut whole);
        let mut pieces = String::new();
        for c in text.chars() {
            write_escaped(&c.to_string(), true, &mut pieces);
        }
        assert_eq!(whole, pieces);
        assert!(whole.contains("\\ud83e\\udd14"));
    }

    #[test]
    fn empty_containers() {
        assert_eq!(Json::Array(Vec::new()).to_python(), "[]");
        assert_eq!(object([]).to_python(), "{}");
    }
}
