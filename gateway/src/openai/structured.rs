//! Constraints on the output, in the spellings of OpenAI (`response_format`), vLLM (`structured_outputs`, `guided_*`) and
//! SGLang (`json_schema`, `regex`, `ebnf`). At most one may be given.

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

/// A constraint and the field that asked for it.
type Asked = (&'static str, Kind);

/// The request's constraint and the field that asked for it.
pub(super) type Constraint = (&'static str, v1::StructuredOutput);

pub(super) fn structured(request: &mut Request) -> ApiResult<Option<Constraint>> {
    let mut found = Vec::new();
    if let Some(format) = request.response_format.take() {
        found.extend(of_format(format)?);
    }
    if let Some(outputs) = request.structured_outputs.take() {
        found.extend(of_outputs(outputs)?);
    }
    found.extend(of_guided(request)?);
    found.extend(of_sglang(request)?);
    if let [(first, _), (second, _), ..] = found[..] {
        let message = format!("{first} and {second}: only one constraint may be given");
        return Err(ApiError::field(second, message).code("invalid_value"));
    }
    Ok(found
        .pop()
        .map(|(param, kind)| (param, v1::StructuredOutput { kind: Some(kind) })))
}

/// OpenAI's field.
fn of_format(format: ResponseFormat) -> ApiResult<Option<Asked>> {
    let kind = match format.kind.as_str() {
        "text" => return Ok(None),
        "json_object" => Kind::JsonObject(true),
        "json_schema" => {
            let param = "response_format.json_schema.schema";
            let schema = format.json_schema.and_then(|holder| holder.schema);
            let missing = || ApiError::field(param, format!("{param}: missing")).code("invalid_value");
            schema_kind(param, schema.ok_or_else(missing)?)?
        }
        other => {
            let message =
                format!("response_format.type: {other:?} is not one of text, json_object, json_schema");
            return Err(ApiError::field("response_format.type", message).code("invalid_value"));
        }
    };
    Ok(Some(("response_format", kind)))
}

/// vLLM's field.
fn of_outputs(outputs: StructuredOutputs) -> ApiResult<impl Iterator<Item = Asked>> {
    if outputs.structural_tag.is_some() {
        let param = "structured_outputs.structural_tag";
        return Err(ApiError::unsupported(param, format!("{param} is not served")));
    }
    let json = "structured_outputs.json";
    let schema = outputs.json.map(|schema| schema_kind(json, schema));
    let is_object = outputs.json_object == Some(true);
    Ok(given([
        (json, schema.transpose()?),
        (
            "structured_outputs.json_object",
            is_object.then_some(Kind::JsonObject(true)),
        ),
        ("structured_outputs.regex", outputs.regex.map(Kind::Regex)),
        ("structured_outputs.choice", outputs.choice.map(choice)),
        ("structured_outputs.grammar", outputs.grammar.map(Kind::Grammar)),
    ]))
}

/// vLLM's fields of before.
fn of_guided(request: &mut Request) -> ApiResult<impl Iterator<Item = Asked> + use<>> {
    let json = "guided_json";
    let schema = request.guided_json.take().map(|schema| schema_kind(json, schema));
    Ok(given([
        (json, schema.transpose()?),
        ("guided_regex", request.guided_regex.take().map(Kind::Regex)),
        ("guided_choice", request.guided_choice.take().map(choice)),
        ("guided_grammar", request.guided_grammar.take().map(Kind::Grammar)),
    ]))
}

fn of_sglang(request: &mut Request) -> ApiResult<impl Iterator<Item = Asked> + use<>> {
    let json = "json_schema";
    let schema = request.json_schema.take().map(|schema| schema_kind(json, schema));
    Ok(given([
        (json, schema.transpose()?),
        ("regex", request.regex.take().map(Kind::Regex)),
        ("ebnf", request.ebnf.take().map(Kind::Grammar)),
    ]))
}

fn given<const N: usize>(fields: [(&'static str, Option<Kind>); N]) -> impl Iterator<Item = Asked> {
    fields
        .into_iter()
        .filter_map(|(param, kind)| Some((param, kind?)))
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
