//! A call's arguments: as one JSON object, or as tags with bare values.

use serde_json::{Map, Value, json};

use super::schema::{self, held_to, may_be_string, styled};
use super::{Lark, Wrapping, form, quote};
use crate::{chat::ToolSpec, error::Result};

impl Lark<'_> {
    /// The arguments as JSON.
    pub(super) fn schema(&self, tool: &ToolSpec) -> Result<String> {
        if tool.strict && tool.grammar.is_some() {
            let reason =
                "this model writes arguments as JSON, where no text is held to a grammar: leave out strict";
            return Err(schema::wrong_grammar(tool, reason));
        }
        let schema = held_to(tool, self.only)?;
        let schema = schema.unwrap_or_else(|| json!({"type": "object"}));
        Ok(format!("%json {}", styled(schema, tool)))
    }

    /// The arguments as tags with bare values.
    pub(super) fn parameters(&mut self, wrapping: &Wrapping, rule: &str, tool: &ToolSpec) -> Result<String> {
        let Wrapping::Tags {
            parameter,
            parameter_end,
            quoted,
            line_breaks,
            ..
        } = wrapping
        else {
            return Ok(String::new());
        };
        let (mark, line) = (
            if *quoted { "\"" } else { "" },
            if *line_breaks { "\n" } else { "" },
        );
        let (begin, middle) = (
            quote(&format!("{parameter}{mark}")),
            quote(&format!("{mark}>{line}")),
        );
        let suffix = format!("{line}{parameter_end}");
        let text = format!("{rule}_text");
        self.rule(&format!("{text}[suffix={}]", quote(&suffix)), "/(.|\\n)*/");
        let Some(schema) = held_to(tool, self.only)? else {
            let names = tool.parameters().and_then(|p| p.get("properties")?.as_object());
            let names: Vec<String> = names.into_iter().flatten().map(|(name, _)| quote(name)).collect();
            let names = if names.is_empty() {
                "/[^\"<>\\n]+/".to_owned()
            } else {
                names.join(" | ")
            };
            return Ok(format!("({begin} ({names}) {middle} {text} \"\\n\")*"));
        };
        let empty = Map::new();
        let properties = schema["properties"].as_object().unwrap_or(&empty);
        let required: Vec<&str> = schema["required"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let mut body = String::new();
        for (index, (name, property)) in properties.iter().enumerate() {
            let value = match tool.grammar.as_deref().filter(|_| property["type"] == "string") {
                Some(grammar) => self.form((tool, grammar), rule, &text, &suffix)?,
                None => self.value((tool, &schema), property, &text, &quote(&suffix)),
            };
            let begin = quote(&format!("{parameter}{mark}{name}{mark}>{line}"));
            let own = format!("{rule}_p{index}");
            self.rule(&own, &format!("{begin} {value} \"\\n\""));
            body.push_str(&own);
            body.push_str(if required.contains(&name.as_str()) {
                " "
            } else {
                "? "
            });
        }
        Ok(body)
    }

    /// A text of the tool's own grammar, up to and with its closing tag.
    fn form(
        &mut self,
        (tool, grammar): (&ToolSpec, &str),
        rule: &str,
        text: &str,
        suffix: &str,
    ) -> Result<String> {
        match form::terminals(grammar, &format!("{}_", rule.to_uppercase())) {
            Ok((terminals, start)) => {
                self.rules.push_str(&terminals);
                self.rules.push('\n');
                let form = format!("{rule}_form");
                let tag = suffix.replace('/', "\\/").replace('\n', "\\n");
                self.rule(
                    &format!("{form}[suffix={}]", quote(suffix)),
                    &format!("{start} & ~/(.|\\n)*{tag}(.|\\n)*/"),
                );
                Ok(form)
            }
            Err(reason) if tool.strict => Err(schema::wrong_grammar(tool, reason)),
            // It was not promised that this is followed.
            Err(_) => Ok(text.to_owned()),
        }
    }

    /// One value up to and with its closing tag.
    fn value(&self, (tool, root): (&ToolSpec, &Value), property: &Value, text: &str, suffix: &str) -> String {
        let constant = property.get("const").map(std::slice::from_ref);
        let values = property["enum"].as_array().map(Vec::as_slice).or(constant);
        if let Some(values) = values {
            let bare = |value: &Value| match value {
                Value::String(text) => quote(text),
                other => quote(&other.to_string()),
            };
            let values: Vec<String> = values.iter().map(bare).collect();
            return format!("({}) {suffix}", values.join(" | "));
        }
        if may_be_string(root, property, 0) {
            return text.to_owned();
        }
        let mut schema = property.clone();
        if let Value::Object(map) = &mut schema {
            for key in ["$defs", "definitions"] {
                if let Some(definitions) = root.get(key) {
                    map.insert(key.to_owned(), definitions.clone());
                }
            }
        }
        format!("%json {} {suffix}", styled(schema, tool))
    }
}
