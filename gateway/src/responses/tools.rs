//! Tools offered and chosen.
//!
//! A namespace's functions become functions whose names begin with the namespace's and a dot, which OpenAI allows in no
//! name; in the calls that come back the two are apart again.

use conclave_proto::v1;
use conclave_proto::v1::tool_choice::Mode;

use super::conversation::wrong;
use super::request::{ToolChoiceIn, ToolIn};
use crate::http::error::{ApiError, ApiResult};
use crate::http::json;

/// Agents offer the server's own search beside their tools. No answer depends on it: with other tools it is left out,
/// also of the response's `tools`; alone it is refused.
pub(super) fn leave_out_searches(tools: &mut Vec<ToolIn>) {
    let is_search = |tool: &ToolIn| tool.kind.starts_with("web_search");
    if !tools.iter().all(is_search) {
        tools.retain(|tool| !is_search(tool));
    }
}

/// A function's name as the model knows it.
pub(super) fn qualified(namespace: &str, name: &str) -> String {
    format!("{namespace}.{name}")
}

/// What [`qualified`] put together, if it is one of these namespaces.
pub(super) fn apart<'a>(namespaces: &[String], name: &'a str) -> (Option<&'a str>, &'a str) {
    match name.split_once('.') {
        Some((namespace, own)) if namespaces.iter().any(|known| known == namespace) => (Some(namespace), own),
        _ => (None, name),
    }
}

pub(super) fn namespaces(tools: &[ToolIn]) -> Vec<String> {
    let named = tools.iter().filter(|tool| tool.kind == "namespace");
    named.filter_map(|tool| tool.name.clone()).collect()
}

pub(super) fn tools(tools: &[ToolIn]) -> ApiResult<Vec<v1::Tool>> {
    let mut all = Vec::new();
    for (at, tool) in tools.iter().enumerate() {
        let path = format!("tools[{at}]");
        if tool.kind != "namespace" {
            all.push(function(tool, &path, None)?);
            continue;
        }
        let namespace = name(tool, &path)?;
        for (at, inner) in tool.tools.iter().flatten().enumerate() {
            // What is said of all of them is said once, with the first.
            let common = tool.description.as_deref().filter(|_| at == 0);
            all.push(function(
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

/// A function, alone or within a namespace with a description.
fn function(tool: &ToolIn, path: &str, within: Option<(&str, Option<&str>)>) -> ApiResult<v1::Tool> {
    if tool.kind != "function" {
        let message = format!("{path}.type: {:?} is not served, only \"function\"", tool.kind);
        return Err(ApiError::unsupported(format!("{path}.type"), message));
    }
    let own = name(tool, path)?;
    let (name, common) = match within {
        Some((namespace, common)) => (qualified(namespace, own), common),
        None => (own.to_owned(), None),
    };
    let quote = |text: &str| serde_json::to_string(text).unwrap_or_default();
    let mut function_json = format!("{{\"name\":{}", quote(&name));
    let described: Vec<&str> = common.into_iter().chain(tool.description.as_deref()).collect();
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
    })
}

pub(super) fn choice(given: &ToolChoiceIn, no_tools: bool) -> ApiResult<v1::ToolChoice> {
    let (mode, name) = match given {
        ToolChoiceIn::Word(word) => match word.as_str() {
            "required" => (Mode::Required, ""),
            "none" => (Mode::None, ""),
            _ => (Mode::Auto, ""),
        },
        ToolChoiceIn::Function(name) => (Mode::Named, name.as_str()),
    };
    if no_tools && matches!(mode, Mode::Required | Mode::Named) {
        return Err(wrong(
            "tool_choice",
            "asks for a call, but tools is missing or empty",
        ));
    }
    Ok(v1::ToolChoice {
        mode: mode.into(),
        name: name.into(),
    })
}
