//! `content` of a message: a string, or a list of parts of which only text is served.

use std::fmt;

use conclave_proto::v1;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

#[derive(Debug)]
pub(super) enum Content {
    Text(String),
    Parts(Vec<v1::ContentPart>),
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Whole;

        impl<'de> Visitor<'de> for Whole {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of content parts")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
                let mut parts = Vec::new();
                while let Some(Part(part)) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }

        deserializer.deserialize_any(Whole)
    }
}

struct Part(v1::ContentPart);

impl Part {
    fn text(text: String) -> Self {
        Self(v1::ContentPart {
            r#type: String::from("text"),
            text,
        })
    }
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct One;

        impl<'de> Visitor<'de> for One {
            type Value = Part;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a content part like {\"type\":\"text\",\"text\":\"…\"}")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Part, E> {
                Ok(Part::text(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Part, A::Error> {
                let mut kind = None::<String>;
                let mut text = None::<String>;
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "type" => kind = Some(map.next_value()?),
                        // A refusal that the model gave is text to the template.
                        "text" | "refusal" => text = Some(map.next_value()?),
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                let kind = kind.ok_or_else(|| A::Error::missing_field("type"))?;
                if !matches!(kind.as_str(), "text" | "input_text" | "output_text" | "refusal") {
                    let message =
                        format_args!("content part type {kind:?} is not served: this model reads text only");
                    return Err(A::Error::custom(message));
                }
                Ok(Part::text(text.ok_or_else(|| A::Error::missing_field("text"))?))
            }
        }

        deserializer.deserialize_any(One)
    }
}
