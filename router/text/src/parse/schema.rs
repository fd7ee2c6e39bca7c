//! Which JSON types a tool's parameter may have, and text turned into the first of them that fits.
//!
//! Formats that write arguments as bare text (MiniMax-M2, Qwen3-Coder) leave the type to the schema.

use crate::json::{self, Json};

/// The types a JSON schema allows at its top level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Types(u8);

const NULL: u8 = 1;
const INTEGER: u8 = 2;
const NUMBER: u8 = 4;
const BOOLEAN: u8 = 8;
const OBJECT: u8 = 16;
const ARRAY: u8 = 32;
const STRING: u8 = 64;

/// References and combinations followed within one another.
const MAX_SCHEMA_DEPTH: usize = 16;
/// Subschemas looked at for one parameter.
const MAX_SUBSCHEMAS: usize = 256;

impl Types {
    pub const NULLABLE_STRING: Self = Self(STRING | NULL);

    /// Types of the parameter `name` of a tool with these `parameters`; a string if nothing is known of it.
    pub fn of_parameter(parameters: Option<&Json>, name: &str) -> Self {
        let schema = parameters.and_then(|p| p.get("properties")?.get(name));
        let mut types = Self::default();
        if let (Some(root), Some(schema)) = (parameters, schema) {
            types.collect(root, schema, 0, &mut 0);
        }
        if types.0 == 0 { Self(STRING) } else { types }
    }

    fn collect(&mut self, root: &Json, schema: &Json, depth: usize, seen: &mut usize) {
        *seen += 1;
        if depth > MAX_SCHEMA_DEPTH || *seen > MAX_SUBSCHEMAS {
            return;
        }
        match schema.get("type") {
            Some(Json::String(name)) => self.add(name),
            Some(Json::Array(names)) => names.iter().filter_map(Json::as_str).for_each(|n| self.add(n)),
            _ => {}
        }
        let values = schema.get("enum").and_then(Json::as_array).unwrap_or_default();
        for value in values.iter().chain(schema.get("const")) {
            self.add(value.type_name());
        }
        for key in ["anyOf", "oneOf", "allOf"] {
            for part in schema.get(key).and_then(Json::as_array).unwrap_or_default() {
                self.collect(root, part, depth + 1, seen);
            }
        }
        let reference = schema.get("$ref").and_then(Json::as_str);
        if let Some(target) = reference.and_then(|path| resolve(root, path)) {
            self.collect(root, target, depth + 1, seen);
        }
    }

    fn add(&mut self, name: &str) {
        self.0 |= match name {
            "null" => NULL,
            "integer" => INTEGER,
            "number" => NUMBER,
            "boolean" => BOOLEAN,
            "object" => OBJECT,
            "array" => ARRAY,
            "string" => STRING,
            _ => 0,
        };
    }

    fn has(self, types: u8) -> bool {
        self.0 & types != 0
    }

    /// Any text is a value of this type as it stands.
    pub fn is_string(self) -> bool {
        self.0 == STRING
    }

    /// Any text but the word null is a value of this type as it stands.
    pub fn is_nullable_string(self) -> bool {
        self == Self::NULLABLE_STRING
    }

    /// The JSON text of a value written as bare text. Tried in this order: null, integer, number, boolean, object,
    /// array, string; what fits none is a string.
    pub fn coerce(self, text: &str) -> String {
        let trimmed = text.trim();
        if self.has(NULL) && trimmed == "null" {
            return "null".to_owned();
        }
        if self.has(INTEGER)
            && let Some(digits) = integer(trimmed)
        {
            return digits;
        }
        if self.has(NUMBER)
            && let Some(digits) = number(trimmed)
        {
            return digits;
        }
        if self.has(BOOLEAN) {
            for word in ["true", "false"] {
                if trimmed.eq_ignore_ascii_case(word) {
                    return word.to_owned();
                }
            }
        }
        if self.has(OBJECT | ARRAY)
            && let Ok(value) = json::parse(trimmed)
        {
            let kind = if value.as_object().is_some() {
                OBJECT
            } else {
                ARRAY
            };
            let container = value.as_object().is_some() || value.as_array().is_some();
            if container && self.has(kind) {
                return value.to_python();
            }
        }
        Json::from(text).to_python()
    }
}

/// `#/a/b` within the schema. Other references are not followed.
fn resolve<'a>(root: &'a Json, path: &str) -> Option<&'a Json> {
    let mut target = root;
    for key in path.strip_prefix('#')?.split('/').skip(1) {
        target = target.get(&key.replace("~1", "/").replace("~0", "~"))?;
    }
    Some(target)
}

/// An integer's JSON text: digits as they are, without a plus and leading zeros. A number with an empty fraction
/// (`3.0`) is an integer for JSON schema.
fn integer(text: &str) -> Option<String> {
    let digits = number(text)?;
    let whole = match digits.split_once('.') {
        None => !digits.contains(['e', 'E']),
        Some((_, fraction)) => fraction.bytes().all(|digit| digit == b'0'),
    };
    whole.then_some(digits)
}

/// A finite number's JSON text, digits as they are but for a plus, leading zeros and a bare point (`.5`, `5.`).
fn number(text: &str) -> Option<String> {
    let (sign, rest) = match text.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    let split = rest.find(['e', 'E']).unwrap_or(rest.len());
    let (mantissa, exponent) = rest.split_at(split);
    let (whole, fraction) = match mantissa.split_once('.') {
        Some((whole, fraction)) if !(whole.is_empty() && fraction.is_empty()) => (whole, Some(fraction)),
        Some(_) => return None,
        None => (mantissa, None),
    };
    let zeros = whole.trim_start_matches('0');
    let whole = if zeros.is_empty() && (!whole.is_empty() || fraction.is_some()) {
        "0"
    } else {
        zeros
    };
    let mut digits = format!("{sign}{whole}");
    if let Some(fraction) = fraction {
        digits.push('.');
        digits.push_str(if fraction.is_empty() { "0" } else { fraction });
    }
    digits.push_str(exponent);
    let finite = digits.parse::<f64>().is_ok_and(f64::is_finite);
    (finite && matches!(json::parse(&digits), Ok(Json::Number(_)))).then_some(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn types(schema: &str) -> Types {
        let root = json::parse(&format!(
            r##"{{"$defs": {{"N": {{"type": ["integer", "null"]}}, "L": {{"$ref": "#/$defs/L"}}}}, "properties": {{"p": {schema}}}}}"##
        ));
        Types::of_parameter(Some(&root.unwrap()), "p")
    }

    #[test]
    fn types_of_schemas() {
        assert_eq!(types(r#"{"type": "string"}"#), Types(STRING));
        assert_eq!(types(r#"{"type": ["string", "null"]}"#), Types(STRING | NULL));
        assert_eq!(
            types(r#"{"enum": [1, 2.5, "a", null]}"#),
            Types(INTEGER | NUMBER | STRING | NULL)
        );
        assert_eq!(
            types(r#"{"anyOf": [{"type": "array"}, {"oneOf": [{"type": "object"}]}]}"#),
            Types(ARRAY | OBJECT)
        );
        assert_eq!(types(r##"{"$ref": "#/$defs/N"}"##), Types(INTEGER | NULL));
        assert_eq!(types(r##"{"$ref": "#/$defs/L"}"##), Types(STRING));
        assert_eq!(types("{}"), Types(STRING));
        assert_eq!(types("true"), Types(STRING));
        assert_eq!(Types::of_parameter(None, "p"), Types(STRING));
    }

    #[test]
    fn a_wide_schema_is_not_searched_for_ever() {
        let mut schema = r#"{"type": "integer"}"#.to_owned();
        for _ in 0..6 {
            schema = format!(r#"{{"anyOf": [{}]}}"#, [schema.as_str(); 6].join(","));
        }
        let root = format!(r#"{{"properties": {{"p": {schema}}}}}"#);
        let root = json::parse(&root).unwrap();
        assert_eq!(Types::of_parameter(Some(&root), "p"), Types(INTEGER));
    }

    #[test]
    fn integers_and_numbers() {
        let integer = Types(INTEGER);
        for (text, json) in [
            ("12", "12"),
            (" -12\n", "-12"),
            ("007", "7"),
            ("+5", "5"),
            ("-0", "-0"),
            ("9007199254740993", "9007199254740993"),
            ("123456789012345678901234567890", "123456789012345678901234567890"),
            ("3.0", "3.0"),
            ("3.5", "\"3.5\""),
            ("1e3", "\"1e3\""),
            ("ten", "\"ten\""),
            ("", "\"\""),
            ("-", "\"-\""),
            ("1_000", "\"1_000\""),
        ] {
            assert_eq!(integer.coerce(text), json, "{text}");
        }
        let number = Types(NUMBER);
        for (text, json) in [
            ("1.10", "1.10"),
            ("1e5", "1e5"),
            (".5", "0.5"),
            ("-.5", "-0.5"),
            ("5.", "5.0"),
            ("1e999", "\"1e999\""),
            ("nan", "\"nan\""),
            ("inf", "\"inf\""),
            ("Infinity", "\"Infinity\""),
            (".", "\".\""),
            ("0x10", "\"0x10\""),
            ("1e", "\"1e\""),
        ] {
            assert_eq!(number.coerce(text), json, "{text}");
        }
    }

    #[test]
    fn other_types() {
        assert_eq!(Types(BOOLEAN).coerce(" TRUE"), "true");
        assert_eq!(Types(BOOLEAN).coerce("yes"), "\"yes\"");
        assert_eq!(Types(STRING | NULL).coerce("null"), "null");
        assert_eq!(Types(STRING | NULL).coerce("None"), "\"None\"");
        assert_eq!(Types(STRING).coerce("null"), "\"null\"");
        assert_eq!(Types(OBJECT).coerce("{\"a\":\n1.10}"), "{\"a\": 1.10}");
        assert_eq!(Types(OBJECT).coerce("[1]"), "\"[1]\"");
        assert_eq!(Types(ARRAY).coerce("[1,2]"), "[1, 2]");
        assert_eq!(Types(STRING | INTEGER).coerce(" 5"), "5");
        assert_eq!(Types(STRING | INTEGER).coerce(" x\n"), "\" x\\n\"");
    }
}
