//! The JSON schema of a tool's parameters, as far as its calls are held to it.

use serde_json::Value;

use crate::{
    chat::ToolSpec,
    error::{Result, TextError},
    grammar::{constraint::with_style, schema_bounds},
    json::Json,
};

/// The schema that a tool's arguments follow, if any; `only`: this tool must be called and no other.
pub(super) fn held_to(tool: &ToolSpec, only: bool) -> Result<Option<Value>> {
    let Some(parameters) = tool.parameters() else {
        return Ok(None);
    };
    if tool.strict {
        return strict_schema(tool, parameters).map(Some);
    }
    let names = |schema: &Value| {
        schema["properties"]
            .as_object()
            .is_some_and(|names| !names.is_empty())
    };
    // A schema that cannot be followed was not promised to be.
    let schema = strict_schema(tool, parameters).ok();
    Ok(schema.filter(|schema| only && names(schema)))
}

pub(super) fn wrong_grammar(tool: &ToolSpec, reason: impl Into<String>) -> TextError {
    TextError::request(format!("tools: {:?}.grammar", tool.name), reason)
}

/// What the grammar library does not know of a schema is an error with strict tools only.
pub(super) fn styled(schema: Value, tool: &ToolSpec) -> Value {
    let mut schema = with_style(schema);
    if !tool.strict
        && let Some(style) = schema.get_mut("x-guidance")
    {
        style["lenient"] = true.into();
    }
    schema
}

/// A strict tool's schema as the grammar library takes it: an object that allows nothing unnamed.
fn strict_schema(tool: &ToolSpec, parameters: &Json) -> Result<Value> {
    let wrong = |reason: String| {
        Err(TextError::request(
            format!("tools: {:?}.parameters", tool.name),
            reason,
        ))
    };
    let mut schema: Value = match serde_json::from_str(&parameters.to_python()) {
        Ok(schema) => schema,
        Err(error) => return wrong(error.to_string()),
    };
    if let Err(reason) = schema_bounds::check_schema(&schema) {
        return wrong(reason);
    }
    match &mut schema {
        Value::Object(map) => {
            map.entry("type").or_insert("object".into());
            map.entry("additionalProperties").or_insert(false.into());
            Ok(schema)
        }
        _ => wrong("a strict tool needs a schema".to_owned()),
    }
}

/// Whether a bare text can be a value of this schema: then any text is allowed, as the parser will take it.
pub(super) fn may_be_string(root: &Value, schema: &Value, depth: usize) -> bool {
    const MAX_DEPTH: usize = 16;
    if depth > MAX_DEPTH {
        return true;
    }
    if let Some(path) = schema["$ref"].as_str() {
        let target = path.strip_prefix('#').and_then(|pointer| root.pointer(pointer));
        return target.is_none_or(|target| may_be_string(root, target, depth + 1));
    }
    let parts: Vec<&Value> = ["anyOf", "oneOf", "allOf"]
        .iter()
        .filter_map(|key| schema[*key].as_array())
        .flatten()
        .collect();
    match &schema["type"] {
        Value::String(name) => name == "string",
        Value::Array(names) => names.iter().any(|name| name == "string"),
        _ if parts.is_empty() => true,
        _ => parts.iter().any(|part| may_be_string(root, part, depth + 1)),
    }
}
