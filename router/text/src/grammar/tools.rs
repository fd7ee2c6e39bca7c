//! Tool calls as a grammar, in the model's own format: forced by `tool_choice`, typed by strict tools.
//!
//! Strict tools' arguments follow their schema: all of its parameters in its order, those that are not required
//! optional. So do those of the one tool that must be called, as far as its schema can be followed. Other tools are only
//! held to their parameters' names. Where a format writes arguments as bare text, a
//! string cannot contain the closing tag, so what a model means as text is never cut silently.

mod arguments;
mod form;
mod schema;

use serde_json::Value;

use super::constraint::{Constraint, ToolRules};
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
    let rules = ToolRules {
        lark: lark.rules,
        names: tools.iter().map(|tool| tool.name.clone()).collect(),
    };
    Ok(Some(match answer {
        None => Constraint::Tools(rules),
        Some(answer) => Constraint::ToolsOr(rules, Box::new(answer)),
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
}
