//! The body of `POST /v1/responses`. Unknown fields are ignored; what would change the answer and is not served
//! is named here, to be refused.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::input::Input;

#[derive(Debug, Deserialize)]
pub(super) struct Request {
    pub(super) model: Option<String>,
    pub(super) input: Option<Input>,
    pub(super) instructions: Option<String>,
    pub(super) stream: Option<bool>,
    pub(super) previous_response_id: Option<String>,
    pub(super) store: Option<bool>,
    pub(super) max_output_tokens: Option<i64>,
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) tools: Option<Vec<ToolIn>>,
    pub(super) tool_choice: Option<ToolChoiceIn>,
    pub(super) parallel_tool_calls: Option<bool>,
    pub(super) text: Option<TextIn>,
    pub(super) reasoning: Option<ReasoningIn>,
    pub(super) include: Option<Vec<String>>,
    pub(super) metadata: Option<Box<RawValue>>,
    pub(super) user: Option<String>,
    // vLLM's.
    pub(super) priority: Option<i64>,
    pub(super) cache_salt: Option<String>,
    // Refused when they ask for something.
    pub(super) background: Option<bool>,
    pub(super) conversation: Option<Box<RawValue>>,
    pub(super) prompt: Option<Box<RawValue>>,
    pub(super) top_logprobs: Option<i64>,
    pub(super) truncation: Option<String>,
    pub(super) max_tool_calls: Option<Box<RawValue>>,
}

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct ToolIn {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) name: Option<String>,
    pub(super) description: Option<String>,
    pub(super) parameters: Option<Box<RawValue>>,
    pub(super) strict: Option<bool>,
    /// A custom tool's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) format: Option<ToolFormatIn>,
    /// A namespace's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tools: Option<Vec<ToolIn>>,
}

/// What a custom tool's input looks like.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct ToolFormatIn {
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) syntax: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) definition: Option<String>,
}

/// A word, or a tool by name.
#[derive(Debug)]
pub(super) enum ToolChoiceIn {
    Word(String),
    Named(Named),
}

/// A function or a custom tool.
#[derive(Debug, Serialize)]
pub(super) struct Named {
    #[serde(rename = "type")]
    kind: String,
    pub(super) name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) namespace: Option<String>,
}

impl<'de> Deserialize<'de> for ToolChoiceIn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::{Error, MapAccess, Visitor};

        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = ToolChoiceIn;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("\"auto\", \"none\", \"required\" or {\"type\":\"function\",\"name\":\"…\"}")
            }

            fn visit_str<E: Error>(self, word: &str) -> Result<ToolChoiceIn, E> {
                match word {
                    "auto" | "none" | "required" => Ok(ToolChoiceIn::Word(word.to_owned())),
                    other => Err(E::unknown_variant(other, &["auto", "none", "required"])),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ToolChoiceIn, A::Error> {
                #[derive(Deserialize)]
                struct Any {
                    #[serde(rename = "type")]
                    kind: String,
                    name: Option<String>,
                    namespace: Option<String>,
                }

                let any = Any::deserialize(serde::de::value::MapAccessDeserializer::new(map))?;
                if !matches!(any.kind.as_str(), "function" | "custom") {
                    let message = format_args!(
                        "type {:?} is not served, only \"function\" and \"custom\"",
                        any.kind
                    );
                    return Err(A::Error::custom(message));
                }
                Ok(ToolChoiceIn::Named(Named {
                    kind: any.kind,
                    name: any.name.ok_or_else(|| A::Error::missing_field("name"))?,
                    namespace: any.namespace,
                }))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct TextIn {
    pub(super) format: Option<FormatIn>,
}

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct FormatIn {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) name: Option<String>,
    pub(super) schema: Option<Box<RawValue>>,
    pub(super) strict: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct ReasoningIn {
    pub(super) effort: Option<String>,
    pub(super) summary: Option<String>,
}
