//! Constraints on the output, in the spellings of OpenAI (`response_format`) and vLLM (`structured_outputs`,
//! `guided_*`). At most one may be given.

use conclave_proto::v1;
use conclave_proto::v1::structured_output::Kind;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::request::Request;
use crate::http::error::{ApiError, ApiResult};
use crate::http::json;

#[derive(Debug, Deserialize)]
pub(super) struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
    json_schema: Option<JsonSchema>,
}

#[derive(Debug, Deserialize)]
struct JsonSchema {
    schema: Option<Box<RawValue>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct StructuredOutputs {
    json: Option<Box<RawValue>>,
    json_object: Option<bool>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    structural_tag: Option<Box<RawValue>>,
}

/// The constraint and the field that asked for it.
pub(super) type Constraint = (&'static str, v1::StructuredOutput);

pub(super) fn structured(request: &mut Request) -> ApiResult<Option<Constraint>> {
    let mut found: Vec<(&'static str, Kind)> = Vec::new();
    if let Some(format) = request.response_format.take() {
        match format.kind.as_str() {
            "text" => {}
            "json_object" => found.push(("response_format", Kind::JsonObject(true))),
            "json_schema" => {
                let schema = format
                    .json_schema
                    .and_then(|holder| holder.schema)
                    .ok_or_else(|| {
                        let param = "response_format.json_schema.schema";
                        ApiError::field(param, format!("{param}: missing")).code("invalid_value")
                    })?;
                found.push((
                    "response_format",
                    schema_kind("response_format.json_schema.schema", schema)?,
                ));
            }
            other => {
                let message =
                    format!("response_format.type: {other:?} is not one of text, json_object, json_schema");
                return Err(ApiError::field("response_format.type", message).code("invalid_value"));
            }
        }
    }
    if let Some(outputs) = request.structured_outputs.take() {
        if outputs.structural_tag.is_some() {
            let param = "structured_outputs.structural_tag";
            return Err(ApiError::unsupported(param, format!("{param} is not served")));
        }
        if let Some(schema) = outputs.json {
            found.push((
                "structured_outputs",
                schema_kind("structured_outputs.json", schema)?,
            ));
        }
        if outputs.json_object == Some(true) {
            found.push(("structured_outputs", Kind::JsonObject(true)));
        }
        found.extend(
            outputs
                .regex
                .map(|regex| ("structured_outputs", Kind::Regex(regex))),
        );
        found.extend(
            outputs
                .choice
                .map(|values| ("structured_outputs", choice(values))),
        );
        found.extend(
            outputs
                .grammar
                .map(|grammar| ("structured_outputs", Kind::Grammar(grammar))),
        );
    }
    if let Some(schema) = request.guided_json.take() {
        found.push(("guided_json", schema_kind("guided_json", schema)?));
    }
    found.extend(
        request
            .guided_regex
            .take()
            .map(|regex| ("guided_regex", Kind::Regex(regex))),
    );
    found.extend(
        request
            .guided_choice
            .take()
            .map(|values| ("guided_choice", choice(values))),
    );
    found.extend(
        request
            .guided_grammar
            .take()
            .map(|grammar| ("guided_grammar", Kind::Grammar(grammar))),
    );
    if found.len() > 1 {
        let message = format!(
            "{} and {}: only one constraint may be given",
            found[0].0, found[1].0
        );
        return Err(ApiError::field(found[1].0, message).code("invalid_value"));
    }
    Ok(found
        .pop()
        .map(|(param, kind)| (param, v1::StructuredOutput { kind: Some(kind) })))
}

fn choice(values: Vec<String>) -> Kind {
    Kind::Choice(v1::Choices { values })
}

/// A schema as an object, as `true`/`false`, or (vLLM) as a string that holds its JSON.
fn schema_kind(param: &'static str, schema: Box<RawValue>) -> ApiResult<Kind> {
    let schema = if schema.get().starts_with('"') {
        let bad = |error| ApiError::field(param, format!("{param}: {error}")).code("invalid_value");
        let text: String = serde_json::from_str(schema.get()).map_err(bad)?;
        RawValue::from_string(text).map_err(bad)?
    } else {
        schema
    };
    json::check_raw(&schema, param)?;
    if !matches!(schema.get().as_bytes().first(), Some(b'{' | b't' | b'f')) {
        return Err(ApiError::field(param, format!("{param}: must be a JSON schema")).code("invalid_value"));
    }
    Ok(Kind::JsonSchema(String::from(Box::<str>::from(schema))))
}
