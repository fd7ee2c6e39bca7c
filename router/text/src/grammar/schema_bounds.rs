//! Bounds on JSON schemas: see `bounds`.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::bounds::{Check, check_literal, check_regex};

/// Nesting of a schema and of all definitions it refers to, added up: the compiler may recurse through all of it.
pub const MAX_NESTING: usize = 2000;
/// Patterns, formats and lengths that one string must satisfy together.
pub const MAX_PATTERNS_TOGETHER: usize = 4;
/// Largest `multipleOf`, without its decimal point: the automaton has as many states.
pub const MAX_MULTIPLE: u64 = 10_000;
/// Different values of `multipleOf` in one schema.
pub const MAX_MULTIPLES: usize = 16;

/// Checks a JSON schema.
pub fn check_schema(schema: &Value) -> Check {
    if schema.get("x-guidance").is_some() {
        return Err("x-guidance: is set by the server".to_owned());
    }
    let mut walk = Walk {
        root: schema,
        targets: HashSet::new(),
        multiples: HashSet::new(),
        nesting: 0,
    };
    walk.nesting = depth(schema);
    walk.visit(schema)?;
    let mut meeting = Meeting {
        root: schema,
        known: HashMap::new(),
    };
    meeting.demands(schema).map(|_| ())
}

struct Walk<'a> {
    root: &'a Value,
    targets: HashSet<&'a str>,
    multiples: HashSet<String>,
    nesting: usize,
}

impl<'a> Walk<'a> {
    /// Looks at every value of the schema once. Recursion is bounded by the reader's own bound on nesting.
    fn visit(&mut self, value: &'a Value) -> Check {
        match value {
            Value::String(text) => check_literal(text),
            Value::Array(items) => items.iter().try_for_each(|item| self.visit(item)),
            Value::Object(map) => {
                for (key, value) in map {
                    check_literal(key)?;
                    match (key.as_str(), value) {
                        ("pattern", Value::String(regex)) => {
                            check_regex(regex).map_err(|reason| format!("pattern {reason}"))?
                        }
                        ("patternProperties", Value::Object(patterns)) => {
                            patterns.keys().try_for_each(|regex| check_regex(regex))?;
                        }
                        ("multipleOf", Value::Number(number)) => self.multiple(&number.to_string())?,
                        ("$ref", Value::String(path)) => self.reference(path)?,
                        _ => {}
                    }
                    self.visit(value)?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn multiple(&mut self, digits: &str) -> Check {
        let coefficient: String = digits.chars().filter(char::is_ascii_digit).collect();
        let coefficient = coefficient.trim_start_matches('0').trim_end_matches('0');
        if digits.contains(['e', 'E']) || coefficient.parse().is_ok_and(|n: u64| n > MAX_MULTIPLE) {
            return Err(format!(
                "multipleOf {digits}: at most {MAX_MULTIPLE} is compiled, without its decimal point"
            ));
        }
        self.multiples.insert(digits.to_owned());
        if self.multiples.len() > MAX_MULTIPLES {
            return Err(format!("has more than {MAX_MULTIPLES} values of multipleOf"));
        }
        Ok(())
    }

    fn reference(&mut self, path: &'a str) -> Check {
        if self.targets.insert(path)
            && let Some(target) = resolve(self.root, path)
        {
            self.nesting += depth(target);
        }
        if self.nesting > MAX_NESTING {
            return Err(format!(
                "is nested more than {MAX_NESTING} deep, references counted"
            ));
        }
        Ok(())
    }
}

fn resolve<'a>(root: &'a Value, path: &str) -> Option<&'a Value> {
    path.strip_prefix('#').and_then(|pointer| root.pointer(pointer))
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// What values of a schema must satisfy at once.
#[derive(Clone, Debug, Default)]
struct Demands {
    /// Patterns, formats and lengths of the value itself.
    patterns: usize,
    multiples: usize,
    /// The most patterns and multiples that meet in a part of the value, by name of the part.
    parts: HashMap<String, (usize, usize)>,
}

impl Demands {
    /// Both must be satisfied.
    fn and(&mut self, other: Demands) {
        self.patterns += other.patterns;
        self.multiples += other.multiples;
        for (name, (patterns, multiples)) in other.parts {
            let part = self.parts.entry(name).or_default();
            part.0 += patterns;
            part.1 += multiples;
        }
    }

    /// One of both must be satisfied.
    fn or(&mut self, other: Demands) {
        self.patterns = self.patterns.max(other.patterns);
        self.multiples = self.multiples.max(other.multiples);
        for (name, (patterns, multiples)) in other.parts {
            let part = self.parts.entry(name).or_default();
            *part = (part.0.max(patterns), part.1.max(multiples));
        }
    }

    /// The most that meets anywhere.
    fn most(&self) -> (usize, usize) {
        let own = (self.patterns, self.multiples);
        self.parts
            .values()
            .fold(own, |most, part| (most.0.max(part.0), most.1.max(part.1)))
    }

    fn check(&self) -> Check {
        let (patterns, multiples) = self.most();
        if patterns > MAX_PATTERNS_TOGETHER {
            return Err(format!(
                "{patterns} patterns, formats and lengths meet in one string; at most {MAX_PATTERNS_TOGETHER} are compiled"
            ));
        }
        if multiples > 1 {
            return Err("several multipleOf meet in one number".to_owned());
        }
        Ok(())
    }
}

/// Adds up what meets in one value, through allOf and references.
struct Meeting<'a> {
    root: &'a Value,
    /// Definitions seen; one that is being looked at counts as nothing, which ends cycles.
    known: HashMap<&'a str, Demands>,
}

impl<'a> Meeting<'a> {
    fn demands(&mut self, schema: &'a Value) -> std::result::Result<Demands, String> {
        let mut all = Demands::default();
        let Value::Object(map) = schema else {
            return Ok(all);
        };
        let has = |key: &str| usize::from(map.contains_key(key));
        all.patterns = has("pattern") + has("format") + has("minLength").max(has("maxLength"));
        all.multiples = has("multipleOf");
        for (key, value) in map {
            match (key.as_str(), value) {
                ("allOf", Value::Array(parts)) => {
                    for part in parts {
                        let part = self.demands(part)?;
                        all.and(part);
                    }
                }
                ("anyOf" | "oneOf", Value::Array(parts)) => {
                    let mut any = Demands::default();
                    for part in parts {
                        any.or(self.demands(part)?);
                    }
                    all.and(any);
                }
                ("$ref", Value::String(path)) => {
                    let target = self.target(path)?;
                    all.and(target);
                }
                ("enum" | "const" | "default" | "examples", _) => {}
                ("properties" | "patternProperties", Value::Object(children)) => {
                    for (name, child) in children {
                        self.part(&mut all, name, child)?;
                    }
                }
                (_, Value::Object(_)) => self.part(&mut all, key, value)?,
                (_, Value::Array(children)) => {
                    for child in children {
                        self.part(&mut all, key, child)?;
                    }
                }
                _ => {}
            }
        }
        all.check()?;
        Ok(all)
    }

    /// A part of the value: what meets in it, or deeper within it.
    fn part(&mut self, all: &mut Demands, name: &str, schema: &'a Value) -> Check {
        let most = self.demands(schema)?.most();
        let part = all.parts.entry(name.to_owned()).or_default();
        *part = (part.0.max(most.0), part.1.max(most.1));
        Ok(())
    }

    fn target(&mut self, path: &'a str) -> std::result::Result<Demands, String> {
        if let Some(known) = self.known.get(path) {
            return Ok(known.clone());
        }
        self.known.insert(path, Demands::default());
        let demands = match resolve(self.root, path) {
            Some(target) => self.demands(target)?,
            None => Demands::default(),
        };
        self.known.insert(path, demands.clone());
        Ok(demands)
    }
}

#[cfg(test)]
mod tests {
    use super::super::bounds::{MAX_LITERAL_BYTES, MAX_REGEX_BYTES};
    use super::*;
    use serde_json::json;

    fn refused(schema: &Value) -> bool {
        check_schema(schema).is_err()
    }

    #[test]
    fn patterns_meet_through_all_of_references_and_properties() {
        let patterns =
            |n: usize| -> Vec<Value> { (0..n).map(|i| json!({"pattern": format!("a{i}")})).collect() };
        assert!(!refused(&json!({"allOf": patterns(MAX_PATTERNS_TOGETHER)})));
        assert!(refused(&json!({"allOf": patterns(MAX_PATTERNS_TOGETHER + 1)})));
        assert!(!refused(&json!({"anyOf": patterns(100)})));
        assert!(refused(
            &json!({"pattern": "a", "allOf": patterns(MAX_PATTERNS_TOGETHER)})
        ));
        let properties: Vec<Value> = patterns(5)
            .into_iter()
            .map(|p| json!({"properties": {"x": p}}))
            .collect();
        assert!(refused(&json!({"allOf": properties})));
        let others: Vec<Value> = (0..50)
            .map(|i| json!({"properties": {format!("x{i}"): {"pattern": "a"}}}))
            .collect();
        assert!(!refused(&json!({"allOf": others})));
        let chain = json!({"$ref": "#/$defs/a", "$defs": {
            "a": {"pattern": "1", "$ref": "#/$defs/b"}, "b": {"pattern": "2", "allOf": [{"$ref": "#/$defs/c"}, {"$ref": "#/$defs/c"}]},
            "c": {"pattern": "3", "format": "date", "allOf": [{"$ref": "#/$defs/a"}]}}});
        assert!(refused(&chain));
        let cycle = json!({"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"next": {"$ref": "#/$defs/a"}, "v": {"pattern": "1"}}}}});
        assert!(!refused(&cycle));
    }

    #[test]
    fn a_net_of_references_is_looked_at_once() {
        let mut definitions = serde_json::Map::new();
        for i in 0..400 {
            let both = json!({"$ref": format!("#/$defs/d{}", i + 1)});
            definitions.insert(format!("d{i}"), json!({"anyOf": [both, {"items": both}]}));
        }
        definitions.insert("d400".to_owned(), json!({}));
        assert!(!refused(&json!({"$ref": "#/$defs/d0", "$defs": definitions})));
    }

    #[test]
    fn other_bounds() {
        assert!(!refused(&json!({"multipleOf": 10_000})) && !refused(&json!({"multipleOf": 0.01})));
        assert!(refused(&json!({"multipleOf": 10_001})) && refused(&json!({"multipleOf": 1e-30})));
        assert!(refused(&json!({"allOf": [{"multipleOf": 3}, {"multipleOf": 7}]})));
        let many: Vec<Value> = (0..=MAX_MULTIPLES)
            .map(|i| json!({"multipleOf": i + 2}))
            .collect();
        assert!(refused(&json!({"anyOf": many})) && !refused(&json!({"anyOf": many[1..]})));
        assert!(!refused(&json!({"enum": ["x".repeat(MAX_LITERAL_BYTES)]})));
        assert!(refused(&json!({"enum": ["x".repeat(MAX_LITERAL_BYTES + 1)]})));
        assert!(refused(&json!({"x-guidance": {}})));
        assert!(check_regex(&"a".repeat(MAX_REGEX_BYTES)).is_ok());
        assert!(check_regex(&"a".repeat(MAX_REGEX_BYTES + 1)).is_err());
        assert!(refused(&json!({"properties": {"p": {"pattern": "foo**"}}})));
        assert!(refused(&json!({"patternProperties": {"foo**": {}}})));
        assert!(!refused(&json!({"properties": {"pattern": {"type": "string"}}})));
        let chain = |n: usize| {
            let mut definitions: serde_json::Map<String, Value> = (0..n)
                .map(|i| {
                    (
                        format!("d{i}"),
                        json!({"items": {"$ref": format!("#/$defs/d{}", i + 1)}}),
                    )
                })
                .collect();
            definitions.insert(format!("d{n}"), json!({}));
            json!({"$ref": "#/$defs/d0", "$defs": definitions})
        };
        assert!(!refused(&chain(MAX_NESTING / 2 - 10)) && refused(&chain(MAX_NESTING / 2 + 1)));
    }
}
