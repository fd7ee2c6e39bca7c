//! A request's tools: checked, and as templates read them.

use super::{MAX_TOOLS, Tool, ToolChoice, ToolSpec, read_object};
use crate::{
    error::{Result, TextError},
    json::{Json, object},
};

/// Reads and checks the tools of a request.
pub fn read_tools(tools: &[Tool]) -> Result<Vec<ToolSpec>> {
    if tools.len() > MAX_TOOLS {
        return Err(TextError::request(
            "tools",
            format!("{} tools; at most {MAX_TOOLS} are allowed", tools.len()),
        ));
    }
    let mut specs: Vec<ToolSpec> = Vec::with_capacity(tools.len());
    let mut names = std::collections::HashSet::new();
    for (index, tool) in tools.iter().enumerate() {
        let field = || format!("tools[{index}].function");
        let function = read_object(&field(), &tool.function_json)?;
        let name = function.get("name").and_then(Json::as_str).unwrap_or_default();
        if name.is_empty() {
            return Err(TextError::request(
                field() + ".name",
                "must be a non-empty string",
            ));
        }
        if !names.insert(name.to_owned()) {
            return Err(TextError::request(
                field() + ".name",
                format!("{name:?} is the name of another tool too"),
            ));
        }
        if let Some(parameters) = function.get("parameters")
            && !matches!(parameters, Json::Object(_) | Json::Null)
        {
            return Err(TextError::request(
                field() + ".parameters",
                "must be a JSON schema (an object)",
            ));
        }
        specs.push(ToolSpec {
            name: name.to_owned(),
            strict: tool.strict,
            grammar: Some(tool.grammar.clone()).filter(|grammar| !grammar.is_empty()),
            function: Json::Object(function),
        });
    }
    Ok(specs)
}

/// A choice of tool must be possible.
pub(crate) fn check_tool_choice(choice: &ToolChoice, tools: &[ToolSpec]) -> Result<()> {
    let wrong = |reason: String| Err(TextError::request("tool_choice", reason));
    match choice {
        ToolChoice::Auto | ToolChoice::None => Ok(()),
        ToolChoice::Required if tools.is_empty() => {
            wrong("\"required\" needs tools, and the request has none".to_owned())
        }
        ToolChoice::Named(name) if !tools.iter().any(|tool| tool.name == *name) => {
            wrong(format!("names {name:?}, which is not among the request's tools"))
        }
        ToolChoice::Required | ToolChoice::Named(_) => Ok(()),
    }
}

/// The tools as templates read them.
pub(crate) fn template_tools(tools: &[ToolSpec]) -> Json {
    let wrap = |tool: &ToolSpec| {
        object([
            ("type", Json::from("function")),
            ("function", tool.function.clone()),
        ])
    };
    Json::Array(tools.iter().map(wrap).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_are_checked() {
        let tool = |json: &str| Tool {
            function_json: json.to_owned(),
            ..Tool::default()
        };
        let bad = |tools: &[Tool]| read_tools(tools).unwrap_err().to_string();
        assert!(bad(&[tool("{}")]).starts_with("tools[0].function.name"));
        assert!(bad(&[tool("[1]")]).starts_with("tools[0].function: must be a JSON object"));
        assert!(bad(&[tool(r#"{"name":"a"}"#), tool(r#"{"name":"a"}"#)]).starts_with("tools[1]"));
        assert!(bad(&[tool(r#"{"name":"a","parameters":3}"#)]).contains("parameters"));
        assert!(bad(&vec![tool("{}"); MAX_TOOLS + 1]).contains("at most"));
        let tools = read_tools(&[tool(r#"{"name":"a"}"#)]).unwrap();
        assert_eq!(tools[0].name, "a");
        assert!(check_tool_choice(&ToolChoice::Required, &tools).is_ok());
        assert!(check_tool_choice(&ToolChoice::Required, &[]).is_err());
        assert!(check_tool_choice(&ToolChoice::Named("a".to_owned()), &tools).is_ok());
        assert!(check_tool_choice(&ToolChoice::Named("b".to_owned()), &tools).is_err());
    }
}
