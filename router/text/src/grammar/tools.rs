//! Tool calls as a grammar, in the model's own format: forced by `tool_choice`, typed by strict tools.
//!
//! Strict tools' arguments follow their schema: all of its parameters in its order, those that are not required
//! optional. So do those of the one tool that must be called, as far as its schema can be followed. Other tools are only
//! held to their parameters' names. Where a format writes arguments as bare text, a
//! string cannot contain the closing tag, so what a model means as text is never cut silently.

mod form;
mod schema;

use serde_json::{Map, Value, json};

use self::schema::{held_to, may_be_string, styled};
use super::constraint::Constraint;
use crate::{
    chat::{ToolChoice, ToolSpec},
    error::{Result, TextError},
    parse::Format,
    text::ChatOutput,
};

/// How a format writes calls, from the outside in. Markers are given by `Format::marker`.
pub(crate) enum Wrapping {
    /// Nested tags with bare values.
    Tags {
        open: &'static str,
        close: &'static str,
        call: &'static str,
        call_end: &'static str,
        parameter: &'static str,
        parameter_end: &'static str,
        /// Names stand in double quotes.
        quoted: bool,
        /// A line break inside each end of a value.
        line_breaks: bool,
    },
    /// One JSON object per block, arguments under this key.
    Object {
        open: &'static str,
        close: &'static str,
        arguments: &'static str,
    },
    /// Bare objects, a list of them if there may be several.
    Bare { arguments: &'static str },
    /// Name and arguments with a separator, each call in tags, all calls in tags.
    Separated {
        open: &'static str,
        close: &'static str,
        call: &'static str,
        separator: &'static str,
        call_end: &'static str,
    },
    /// gpt-oss' messages.
    Harmony,
}

/// The constraint that a request's tools, tool_choice and wish for an answer of some form put on the output, if any.
/// Where calls are allowed and not forced, the output is either calls or such an answer.
pub fn tool_constraint(
    format: &Format,
    output: &ChatOutput,
    answer: Option<Constraint>,
) -> Result<Option<Constraint>> {
    let forced = matches!(output.tool_choice, ToolChoice::Required | ToolChoice::Named(_));
    let strict = output.tools.iter().any(|tool| tool.strict);
    if output.tools.is_empty() || output.tool_choice == ToolChoice::None {
        return Ok(answer);
    }
    if forced && answer.is_some() {
        let reason = "cannot go with a tool_choice that forces a call: leave one of them out";
        return Err(TextError::request("structured", reason));
    }
    if !(forced || strict || answer.is_some()) {
        return Ok(None);
    }
    let Some(wrapping) = format.wrapping() else {
        if !(forced || strict) {
            return Ok(answer);
        }
        let reason = "this model's output format has no tool calls that could be forced";
        return Err(TextError::request("tool_choice", reason));
    };
    if !forced && matches!(wrapping, Wrapping::Bare { .. } | Wrapping::Harmony) {
        // Text and calls cannot be told apart before a call's name is known.
        return Ok(answer);
    }
    let tools: Vec<&ToolSpec> = match &output.tool_choice {
        ToolChoice::Named(name) => output.tools.iter().filter(|tool| tool.name == *name).collect(),
        _ => output.tools.iter().collect(),
    };
    let mut lark = Lark {
        rules: String::new(),
        format,
        several: output.parallel_tool_calls,
        only: forced && tools.len() == 1,
    };
    let beside = match (forced, &answer) {
        (true, _) => Beside::Nothing,
        (false, None) => Beside::Text,
        (false, Some(_)) => Beside::Answer,
    };
    lark.write(&wrapping, &tools, beside)?;
    Ok(Some(match answer {
        None => Constraint::Tools(lark.rules),
        Some(answer) => Constraint::ToolsOr(lark.rules, Box::new(answer)),
    }))
}

/// What an output may be instead of calls.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    Nothing,
    Text,
    Answer,
}

struct Lark<'a> {
    rules: String,
    format: &'a Format,
    several: bool,
    /// One tool must be called and no other.
    only: bool,
}

/// A Lark string literal. Its escapes are JSON's.
fn quote(text: &str) -> String {
    Value::from(text).to_string()
}

impl Lark<'_> {
    /// A marker: its token, or its text if it has none.
    fn mark(&self, text: &str) -> String {
        self.format
            .marker(text)
            .map_or_else(|| quote(text), |id| format!("<[{id}]>"))
    }

    fn rule(&mut self, name: &str, body: &str) {
        self.rules.push_str(&format!("{name}: {body}\n"));
    }

    fn plus(&self) -> &'static str {
        if self.several { "+" } else { "" }
    }

    fn write(&mut self, wrapping: &Wrapping, tools: &[&ToolSpec], beside: Beside) -> Result<()> {
        let start = match (wrapping, beside) {
            (Wrapping::Harmony, _) => "think? call",
            (Wrapping::Bare { .. }, _) => "block",
            (_, Beside::Nothing) => "\"\\n\"? block",
            (_, Beside::Text) => "text? (block text?)*",
            (_, Beside::Answer) => "\"\\n\"? block | @answer",
        };
        self.rule("start", start);
        if beside == Beside::Text {
            self.rule("text", "/(.|\\n)+/");
        }
        let calls: Vec<String> = (0..tools.len()).map(|index| format!("t{index}")).collect();
        self.rule("call", &calls.join(" | "));
        let plus = self.plus();
        match wrapping {
            Wrapping::Tags { open, close, .. } => {
                let body = format!("{} \"\\n\" call{plus} {}", self.mark(open), self.mark(close));
                self.rule("block", &body);
            }
            Wrapping::Object { open, close, .. } => {
                let one = format!("{} \"\\n\" call \"\\n\" {}", self.mark(open), self.mark(close));
                self.rule("one", &one);
                self.rule("block", if self.several { "one (\"\\n\" one)*" } else { "one" });
            }
            Wrapping::Bare { .. } if self.several => {
                self.rule("block", "call | \"[\" call (\", \" call)* \"]\"");
            }
            Wrapping::Bare { .. } => self.rule("block", "call"),
            Wrapping::Separated { open, close, .. } => {
                let body = format!("{} call{plus} {}", self.mark(open), self.mark(close));
                self.rule("block", &body);
            }
            Wrapping::Harmony => {
                let [channel, message, end, start] =
                    ["<|channel|>", "<|message|>", "<|end|>", "<|start|>"].map(|text| self.mark(text));
                self.rule(
                    "think",
                    &format!("{channel} \"analysis\" {message} thought {end} {start} \"assistant\""),
                );
                self.rule("thought", "/(.|\\n)+/");
            }
        }
        for (index, tool) in tools.iter().enumerate() {
            self.tool(wrapping, index, tool)?;
        }
        Ok(())
    }

    fn tool(&mut self, wrapping: &Wrapping, index: usize, tool: &ToolSpec) -> Result<()> {
        let rule = format!("t{index}");
        let name = quote(&tool.name);
        let body = match wrapping {
            Wrapping::Tags {
                call,
                call_end,
                quoted,
                ..
            } => {
                let marks = if *quoted { "\"" } else { "" };
                let begin = quote(&format!("{call}{marks}{}{marks}>\n", tool.name));
                let parameters = self.parameters(wrapping, &rule, tool)?;
                format!("{begin} {parameters} {}", quote(&format!("{call_end}\n")))
            }
            Wrapping::Object { arguments, .. } | Wrapping::Bare { arguments } => {
                let schema = self.schema(tool)?;
                format!(
                    "\"{{\\\"name\\\": \" {} \", \\\"{arguments}\\\": \" {schema} \"}}\"",
                    quote(&name)
                )
            }
            Wrapping::Separated {
                call,
                separator,
                call_end,
                ..
            } => {
                let schema = self.schema(tool)?;
                format!(
                    "{} {name} {} {schema} {}",
                    self.mark(call),
                    self.mark(separator),
                    self.mark(call_end)
                )
            }
            Wrapping::Harmony => {
                let header = quote(&format!("commentary to=functions.{} ", tool.name));
                let [channel, constrain, message] =
                    ["<|channel|>", "<|constrain|>", "<|message|>"].map(|text| self.mark(text));
                let schema = self.schema(tool)?;
                format!("{channel} {header} {constrain} \"json\" {message} {schema}")
            }
        };
        self.rule(&rule, &body);
        Ok(())
    }

    /// The arguments as JSON.
    fn schema(&self, tool: &ToolSpec) -> Result<String> {
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
    fn parameters(&mut self, wrapping: &Wrapping, rule: &str, tool: &ToolSpec) -> Result<String> {
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
