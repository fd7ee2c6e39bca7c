//! Tools offered and chosen, and what calls of them look like to the client.
//!
//! A namespace's tools become tools whose names begin with the namespace's and a dot, which OpenAI allows in no name; in
//! the calls that come back the two are apart again. A custom tool becomes a function of one string, `input`, whose
//! calls are again plain text for the client. Its grammar is told to the model, whose calls are held to it as they are to
//! a function's schema: where it is the one tool that must be called, or strict.

use std::borrow::Cow;

use conclave_proto::v1;
use conclave_proto::v1::tool_choice::Mode;

use serde_json::{Value, json};

use super::conversation::wrong;
use super::request::{Named, ToolChoiceIn, ToolFormatIn, ToolIn};
use crate::http::error::{ApiError, ApiResult};
use crate::http::json;

/// A custom tool's one parameter.
pub(super) const INPUT: &str = "input";

/// Agents offer what OpenAI's servers run, unasked, beside their own tools. No answer depends on these: with other tools
/// they are left out, also of the response's `tools`; alone they are refused.
pub(super) fn leave_out_hosted(tools: &mut Vec<ToolIn>) {
    if !tools.iter().all(is_hosted) {
        tools.retain(|tool| !is_hosted(tool));
    }
}

fn is_hosted(tool: &ToolIn) -> bool {
    tool.kind.starts_with("web_search") || matches!(tool.kind.as_str(), "image_generation" | "tool_search")
}

/// The name of a namespace's tool as the model knows it.
pub(super) fn qualified(namespace: &str, name: &str) -> String {
    format!("{namespace}.{name}")
}

/// By which a call's name is read.
#[derive(Debug, Default)]
pub(super) struct Offered {
    namespaces: Vec<String>,
    /// Custom tools: the names that the model knows, and where they are in the request.
    custom: Vec<(String, String)>,
}

impl Offered {
    pub(super) fn of(tools: &[ToolIn]) -> Self {
        let mut offered = Self::default();
        for (at, tool) in tools.iter().enumerate() {
            let Some(name) = &tool.name else { continue };
            let path = format!("tools[{at}]");
            match tool.kind.as_str() {
                "custom" => offered.custom.push((name.clone(), path)),
                "namespace" => {
                    let inner = tool.tools.iter().flatten().enumerate();
                    let inner = inner.filter(|(_, tool)| tool.kind == "custom");
                    let named = inner.filter_map(|(at, tool)| Some((at, tool.name.as_deref()?)));
                    let own = named.map(|(at, own)| (qualified(name, own), format!("{path}.tools[{at}]")));
                    offered.custom.extend(own);
                    offered.namespaces.push(name.clone());
                }
                _ => {}
            }
        }
        offered
    }

    /// What [`qualified`] put together, if it is one of these namespaces.
    pub(super) fn apart<'a>(&self, name: &'a str) -> (Option<&'a str>, &'a str) {
        match name.split_once('.') {
            Some((namespace, own)) if self.namespaces.iter().any(|known| known == namespace) => {
                (Some(namespace), own)
            }
            _ => (None, name),
        }
    }

    /// Whether the tool that the model knows by this name is a custom one.
    pub(super) fn is_custom(&self, name: &str) -> bool {
        self.custom.iter().any(|(known, _)| known == name)
    }

    /// The request's field that the router knows as a tool's grammar.
    pub(super) fn grammar_field(&self, proto: &str) -> Option<String> {
        let named = |(name, _): &&(String, String)| proto.ends_with(&format!("{name:?}.grammar"));
        let (_, path) = self.custom.iter().find(named)?;
        Some(format!("{path}.format.definition"))
    }
}

/// Those that are not left out; an error names its place among all that were sent.
pub(super) fn tools(tools: &[ToolIn]) -> ApiResult<Vec<v1::Tool>> {
    let mut all = Vec::new();
    let refuses_hosted = tools.iter().all(is_hosted);
    let taken = |(_, tool): &(usize, &ToolIn)| refuses_hosted || !is_hosted(tool);
    for (at, tool) in tools.iter().enumerate().filter(taken) {
        let path = format!("tools[{at}]");
        if tool.kind != "namespace" {
            all.push(one(tool, &path, None)?);
            continue;
        }
        let namespace = name(tool, &path)?;
        for (at, inner) in tool.tools.iter().flatten().enumerate() {
            // What is said of all of them is said once, with the first.
            let common = tool.description.as_deref().filter(|_| at == 0);
            all.push(one(
                inner,
                &format!("{path}.tools[{at}]"),
                Some((namespace, common)),
            )?);
        }
    }
    Ok(all)
}

fn name<'a>(tool: &'a ToolIn, path: &str) -> ApiResult<&'a str> {
    let name = tool.name.as_deref().filter(|name| !name.is_empty());
    name.ok_or_else(|| wrong(format!("{path}.name"), "missing"))
}

/// A function or a custom tool, alone or within a namespace with a description.
fn one(tool: &ToolIn, path: &str, within: Option<(&str, Option<&str>)>) -> ApiResult<v1::Tool> {
    if !matches!(tool.kind.as_str(), "function" | "custom") {
        let message = format!(
            "{path}.type: {:?} is not served, only \"function\" and \"custom\"",
            tool.kind
        );
        return Err(ApiError::unsupported(format!("{path}.type"), message));
    }
    let own = name(tool, path)?;
    let (name, common) = match within {
        Some((namespace, common)) => (qualified(namespace, own), common),
        None => (own.to_owned(), None),
    };
    let described = common.into_iter().chain(tool.description.as_deref());
    if tool.kind == "custom" {
        let form = match &tool.format {
            None => None,
            Some(format) => form(format, &format!("{path}.format"))?,
        };
        let (told, grammar) = form.unzip();
        let described: Vec<&str> = described.chain(told.as_deref()).collect();
        return Ok(v1::Tool {
            function_json: custom(&name, &described.join("\n\n")),
            strict: tool.strict.unwrap_or(false),
            grammar: grammar.unwrap_or_default(),
        });
    }
    let quote = |text: &str| serde_json::to_string(text).unwrap_or_default();
    let mut function_json = format!("{{\"name\":{}", quote(&name));
    let described: Vec<&str> = described.collect();
    if !described.is_empty() {
        function_json.push_str(&format!(",\"description\":{}", quote(&described.join("\n\n"))));
    }
    if let Some(parameters) = &tool.parameters {
        json::check_object(parameters, &format!("{path}.parameters"))?;
        function_json.push_str(&format!(",\"parameters\":{}", parameters.get()));
    }
    function_json.push('}');
    // In this API functions are strict unless they say otherwise; models of ours are not bound by default, as
    // most schemas that clients send are not written for it.
    Ok(v1::Tool {
        function_json,
        strict: tool.strict.unwrap_or(false),
        ..Default::default()
    })
}

fn custom(name: &str, description: &str) -> String {
    let function = json!({
        "name": name,
        "description": description,
        "parameters": {
            "type": "object",
            "properties": {INPUT: {"type": "string", "description": "The whole input, as plain text."}},
            "required": [INPUT],
        },
    });
    function.to_string()
}

/// What the model is told of the form of a custom tool's input, and its Lark grammar.
fn form(format: &ToolFormatIn, path: &str) -> ApiResult<Option<(String, String)>> {
    let what = match (format.kind.as_str(), format.syntax.as_deref()) {
        ("text", _) => return Ok(None),
        ("grammar", Some("lark")) => "Lark grammar",
        ("grammar", Some("regex")) => "regular expression",
        ("grammar", other) => {
            let problem = format!("{:?} is not lark or regex", other.unwrap_or_default());
            return Err(wrong(format!("{path}.syntax"), &problem));
        }
        (other, _) => {
            let problem = format!("{other:?} is not text or grammar");
            return Err(wrong(format!("{path}.type"), &problem));
        }
    };
    let definition = format.definition.as_deref();
    let definition = definition.ok_or_else(|| wrong(format!("{path}.definition"), "missing"))?;
    let told = format!("Its input matches this {what}:\n{definition}");
    let grammar = match format.syntax.as_deref() {
        Some("regex") => as_lark(definition),
        _ => definition.to_owned(),
    };
    Ok(Some((told, grammar)))
}

/// A regular expression that the whole text matches, with anchors or without, as a Lark grammar.
fn as_lark(regex: &str) -> String {
    let mut lark = String::from("start: /");
    let inner = regex
        .strip_prefix('^')
        .and_then(|rest| rest.strip_suffix('$'))
        .filter(|inner| !inner.contains('|') && !inner.ends_with('\\'))
        .unwrap_or(regex);
    let mut escaped = false;
    for c in inner.chars() {
        match c {
            '/' if !escaped => lark.push_str("\\/"),
            '\n' => lark.push_str(if escaped { "n" } else { "\\n" }),
            c => lark.push(c),
        }
        escaped = c == '\\' && !escaped;
    }
    lark + "/"
}

/// A custom tool's input as the arguments of the function that the model calls.
pub(super) fn as_arguments(input: &str) -> String {
    json!({ INPUT: input }).to_string()
}

/// And back. What the model wrote otherwise is given as it is, so that the tool can say what is wrong with it.
pub(super) fn as_input(arguments: &str) -> Cow<'_, str> {
    let parse = |text: &str| match serde_json::from_str(text) {
        Ok(Value::Object(mut object)) => match object.remove(INPUT) {
            Some(Value::String(input)) => Some(input),
            _ => None,
        },
        _ => None,
    };
    // The second: the answer ended within the string.
    let input = parse(arguments).or_else(|| parse(&format!("{arguments}\"}}")));
    input.map_or(Cow::Borrowed(arguments), Cow::Owned)
}

pub(super) fn choice(given: &ToolChoiceIn, no_tools: bool) -> ApiResult<v1::ToolChoice> {
    let (mode, name) = match given {
        ToolChoiceIn::Word(word) => match word.as_str() {
            "required" => (Mode::Required, String::new()),
            "none" => (Mode::None, String::new()),
            _ => (Mode::Auto, String::new()),
        },
        ToolChoiceIn::Named(Named { name, namespace, .. }) => {
            let name = match namespace {
                Some(namespace) => qualified(namespace, name),
                None => name.clone(),
            };
            (Mode::Named, name)
        }
    };
    if no_tools && matches!(mode, Mode::Required | Mode::Named) {
        return Err(wrong(
            "tool_choice",
            "asks for a call, but tools is missing or empty",
        ));
    }
    Ok(v1::ToolChoice {
        mode: mode.into(),
        name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_regex_is_a_grammar_of_one_rule() {
        for (regex, lark) in [
            ("[0-9]+", "start: /[0-9]+/"),
            ("^a/b$", r"start: /a\/b/"),
            (r"a\/b\\/", r"start: /a\/b\\\//"),
            ("^a|b$", "start: /^a|b$/"),
            (r"^a\$", r"start: /^a\$/"),
            ("a\nb\\\n", r"start: /a\nb\n/"),
        ] {
            assert_eq!(as_lark(regex), lark, "{regex}");
        }
    }

    #[test]
    fn inputs_go_through_arguments_and_back_and_odd_ones_stay_readable() {
        for input in ["", "*** Begin Patch\n\"x\"\\n", "é😀"] {
            assert_eq!(as_input(&as_arguments(input)), input);
        }
        for (arguments, input) in [
            (r#"{"input":"half a lin"#, "half a lin"),
            (r#"{"patch":"x"}"#, r#"{"patch":"x"}"#),
            (r#"{"input":5}"#, r#"{"input":5}"#),
            ("", ""),
        ] {
            assert_eq!(as_input(arguments), input);
        }
    }
}
