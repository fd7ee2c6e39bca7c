//! What a request may ask of its output's form, and how it becomes a grammar.

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use serde_json::{Value, json};

use super::{bounds, ebnf, schema_bounds};
use crate::{
    error::{Result, TextError},
    json,
};

/// Longest schema, regex, grammar or list of choices, in bytes.
pub const MAX_CONSTRAINT_BYTES: usize = 256 << 10;
/// Most choices.
pub const MAX_CHOICES: usize = 10_000;
/// How the grammar of tool calls refers to that of an answer.
pub(super) const ANSWER: &str = "answer";

/// The form of an output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Constraint {
    /// A JSON schema, as JSON text.
    JsonSchema(String),
    /// Any JSON object.
    JsonObject,
    /// A regular expression that the whole output matches.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A Lark grammar, or an EBNF one (`root ::= …`).
    Grammar(String),
    /// Tool calls in the model's format; from `tool_constraint`.
    Tools(ToolRules),
    /// Tool calls (which refer to the other as `@answer`), or an answer of this form.
    ToolsOr(ToolRules, Box<Constraint>),
}

/// A Lark grammar of tool calls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolRules {
    pub(super) lark: String,
    /// The tools that the rules `t0`, `t1` and so on, and those whose names begin so, are about.
    pub(super) names: Vec<String>,
}

impl Constraint {
    /// The request's field, for errors.
    pub(super) fn field(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "json_schema",
            Self::JsonObject => "json_object",
            Self::Regex(_) => "regex",
            Self::Choice(_) => "choice",
            Self::Grammar(_) => "grammar",
            Self::Tools(_) => "tools",
            Self::ToolsOr(_, answer) => answer.field(),
        }
    }

    fn wrong(&self, reason: impl Into<String>) -> TextError {
        TextError::request(self.field(), reason)
    }

    fn bytes(&self) -> usize {
        match self {
            Self::JsonObject => 0,
            Self::JsonSchema(text) | Self::Regex(text) | Self::Grammar(text) => text.len(),
            Self::Tools(tools) => tools.lark.len(),
            Self::Choice(values) => values.iter().map(String::len).sum(),
            Self::ToolsOr(tools, answer) => tools.lark.len() + answer.bytes(),
        }
    }

    /// The grammar. After reasoning the template's two line breaks may come first.
    pub(super) fn to_grammar(&self, after_reasoning: bool) -> Result<TopLevelGrammar> {
        if self.bytes() > MAX_CONSTRAINT_BYTES {
            return Err(self.wrong(format!(
                "is {} bytes; at most {MAX_CONSTRAINT_BYTES} are compiled",
                self.bytes()
            )));
        }
        let mut grammars = vec![self.body()?];
        if after_reasoning {
            const BODY: &str = "body";
            grammars[0].name = Some(BODY.to_owned());
            let lead = GrammarWithLexer::from_lark(format!("start: (\"\\n\" | \"\\n\\n\")? @{BODY}"));
            grammars.insert(0, lead);
        }
        if let Self::ToolsOr(_, answer) = self {
            let mut answer = answer.body()?;
            answer.name = Some(ANSWER.to_owned());
            grammars.push(answer);
        }
        Ok(TopLevelGrammar {
            grammars,
            max_tokens: None,
        })
    }

    fn body(&self) -> Result<GrammarWithLexer> {
        Ok(match self {
            Self::JsonSchema(text) => GrammarWithLexer::from_json_schema(self.schema(text)?),
            Self::JsonObject => GrammarWithLexer::from_json_schema(with_style(json!({"type": "object"}))),
            Self::Regex(regex) => GrammarWithLexer::from_regex(self.unanchored(regex)?),
            Self::Choice(values) => GrammarWithLexer::from_lark(self.choices(values)?),
            Self::Grammar(text) => GrammarWithLexer::from_lark(self.lark(text)?),
            Self::Tools(tools) | Self::ToolsOr(tools, _) => GrammarWithLexer::from_lark(tools.lark.clone()),
        })
    }

    fn lark(&self, text: &str) -> Result<String> {
        let lark = if ebnf::looks_like(text) {
            ebnf::to_lark(text).map_err(|reason| self.wrong(reason))?
        } else {
            text.to_owned()
        };
        bounds::check_lark(&lark).map_err(|reason| self.wrong(reason))?;
        Ok(lark)
    }

    fn schema(&self, text: &str) -> Result<Value> {
        // Our reader bounds the nesting; the grammar library wants the other's type.
        json::parse(text).map_err(|error| self.wrong(format!("is not valid JSON: {error}")))?;
        let schema: Value = serde_json::from_str(text).map_err(|error| self.wrong(error.to_string()))?;
        schema_bounds::check_schema(&schema).map_err(|reason| self.wrong(reason))?;
        match schema {
            Value::Object(_) => Ok(with_style(schema)),
            Value::Bool(_) => Ok(schema),
            _ => Err(self.wrong("must be an object or a boolean")),
        }
    }

    /// A regex always matches the whole output: anchors at its ends say nothing.
    fn unanchored<'a>(&self, regex: &'a str) -> Result<&'a str> {
        if regex.is_empty() {
            return Err(self.wrong("must not be empty"));
        }
        bounds::check_regex(regex).map_err(|reason| self.wrong(reason))?;
        let regex = regex.strip_prefix('^').unwrap_or(regex);
        Ok(match regex.strip_suffix('$') {
            Some(rest) if rest.chars().rev().take_while(|&c| c == '\\').count() % 2 == 0 => rest,
            _ => regex,
        })
    }

    fn choices(&self, values: &[String]) -> Result<String> {
        if values.is_empty() || values.len() > MAX_CHOICES {
            return Err(self.wrong(format!(
                "has {} values; 1 to {MAX_CHOICES} are allowed",
                values.len()
            )));
        }
        values
            .iter()
            .try_for_each(|value| bounds::check_literal(value))
            .map_err(|reason| self.wrong(reason))?;
        if values.iter().any(String::is_empty) {
            return Err(self.wrong("a choice must not be empty"));
        }
        let quoted: Vec<String> = values
            .iter()
            .map(|value| Value::from(value.as_str()).to_string())
            .collect();
        Ok(format!("start: {}", quoted.join(" | ")))
    }
}

/// Sets how JSON is written. Between a document's parts there is at most one line break with its
/// indentation: a model left to itself may write nothing else for ever. `oneOf` is taken as `anyOf`, since no grammar can say "only one". A request cannot set these.
pub(super) fn with_style(mut schema: Value) -> Value {
    if let Value::Object(map) = &mut schema {
        let style = json!({"whitespace_pattern": r"(\x0D?\x0A[\x20\x09]{0,64})|[\x20\x09]{1,64}", "coerce_one_of": true});
        map.insert("x-guidance".to_owned(), style);
    }
    schema
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_at_the_ends_go() {
        let unanchored = |regex: &str| Constraint::JsonObject.unanchored(regex).map(str::to_owned);
        assert_eq!(unanchored("^a$").unwrap(), "a");
        assert_eq!(unanchored(r"a\$").unwrap(), r"a\$");
        assert_eq!(unanchored(r"a\\$").unwrap(), r"a\\");
    }
}
