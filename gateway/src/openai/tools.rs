//! Tools offered, tools chosen, and tool calls in a conversation's past.

use std::fmt;

use conclave_proto::v1;
use conclave_proto::v1::tool_choice::Mode;
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::http::error::{ApiError, ApiResult};
use crate::http::json;

/// One element of `tools`.
#[derive(Debug, Deserialize)]
pub(super) struct ToolIn {
    #[serde(rename = "type")]
    kind: Option<String>,
    function: Option<Box<RawValue>>,
}

/// The fields of a function that matter here; the rest is the template's and the grammar's.
#[derive(Deserialize)]
struct FunctionHead {
    name: String,
    strict: Option<bool>,
}

pub(super) fn tools(tools: Vec<ToolIn>) -> ApiResult<Vec<v1::Tool>> {
    tools
        .into_iter()
        .enumerate()
        .map(|(at, tool)| one_tool(at, tool))
        .collect()
}

fn one_tool(at: usize, tool: ToolIn) -> ApiResult<v1::Tool> {
    let kind = tool.kind.as_deref().unwrap_or("function");
    if kind != "function" {
        let param = format!("tools[{at}].type");
        let message = format!("{param}: {kind:?} is not served, only \"function\"");
        return Err(ApiError::unsupported(param, message));
    }
    let param = format!("tools[{at}].function");
    let Some(function) = tool.function else {
        let message = format!("{param}: missing");
        return Err(ApiError::field(param, message).code("invalid_value"));
    };
    json::check_object(&function, &param)?;
    let head: FunctionHead = json::part(&function, &param)?;
    if head.name.is_empty() {
        let param = format!("{param}.name");
        let message = format!("{param}: must not be empty");
        return Err(ApiError::field(param, message).code("invalid_value"));
    }
    Ok(v1::Tool {
        function_json: String::from(Box::<str>::from(function)),
        strict: head.strict.unwrap_or(false),
        ..Default::default()
    })
}

/// A call that an earlier answer made, sent back as part of the conversation.
#[derive(Debug)]
pub(super) struct CallIn(pub(super) v1::ToolCall);

impl<'de> Deserialize<'de> for CallIn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Call {
            id: Option<String>,
            function: Function,
        }

        #[derive(Deserialize)]
        struct Function {
            name: String,
            arguments: Option<Box<RawValue>>,
        }

        let call = Call::deserialize(deserializer)?;
        let arguments_json = match &call.function.arguments {
            None => String::from("{}"),
            // OpenAI's form: a string that holds JSON.
            Some(raw) if raw.get().starts_with('"') => {
                serde_json::from_str(raw.get()).map_err(D::Error::custom)?
            }
            // Some clients send the object itself.
            Some(raw) if raw.get().starts_with('{') => raw.get().to_owned(),
            Some(raw) => {
                let message =
                    format_args!("function.arguments: expected a string of JSON, not {}", raw.get());
                return Err(D::Error::custom(message));
            }
        };
        Ok(Self(v1::ToolCall {
            id: call.id.unwrap_or_default(),
            name: call.function.name,
            arguments_json,
        }))
    }
}

/// `tool_choice`.
#[derive(Debug)]
pub(super) struct ChoiceIn(pub(super) v1::ToolChoice);

impl ChoiceIn {
    fn mode(mode: Mode) -> Self {
        Self(v1::ToolChoice {
            mode: mode.into(),
            name: String::new(),
        })
    }

    pub(super) fn needs_tools(&self) -> bool {
        matches!(self.0.mode(), Mode::Required | Mode::Named)
    }
}

impl<'de> Deserialize<'de> for ChoiceIn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = ChoiceIn;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"auto\", \"none\", \"required\" or {\"type\":\"function\",\"function\":{\"name\":\"…\"}}")
            }

            fn visit_str<E: Error>(self, word: &str) -> Result<ChoiceIn, E> {
                match word {
                    "auto" => Ok(ChoiceIn::mode(Mode::Auto)),
                    "none" => Ok(ChoiceIn::mode(Mode::None)),
                    "required" => Ok(ChoiceIn::mode(Mode::Required)),
                    other => Err(E::unknown_variant(other, &["auto", "none", "required"])),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ChoiceIn, A::Error> {
                #[derive(Deserialize)]
                struct Named {
                    #[serde(rename = "type")]
                    kind: String,
                    function: Option<Name>,
                }

                #[derive(Deserialize)]
                struct Name {
                    name: String,
                }

                let named = Named::deserialize(serde::de::value::MapAccessDeserializer::new(map))?;
                if named.kind != "function" {
                    let message = format_args!(
                        "tool_choice type {:?} is not served, only \"function\"",
                        named.kind
                    );
                    return Err(A::Error::custom(message));
                }
                let name = named
                    .function
                    .ok_or_else(|| A::Error::missing_field("function"))?
                    .name;
                Ok(ChoiceIn(v1::ToolChoice {
                    mode: Mode::Named.into(),
                    name,
                }))
            }
        }

        deserializer.deserialize_any(Any)
    }
}
