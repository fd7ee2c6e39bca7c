//! One message of a chat, straight into the proto.
//!
//! Keys that neither OpenAI nor this server knows are kept for the checkpoint's template, which may read them.

use std::fmt;

use conclave_proto::v1;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::content::Content;
use super::tools::CallIn;

#[derive(Debug)]
pub(super) struct Message {
    pub(super) proto: v1::ChatMessage,
    /// Further keys, in the client's order.
    pub(super) extra: Vec<(String, Box<RawValue>)>,
}

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MessageVisitor)
    }
}

struct MessageVisitor;

impl<'de> Visitor<'de> for MessageVisitor {
    type Value = Message;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Message, A::Error> {
        let mut role = None::<String>;
        let mut content = None::<Content>;
        let mut reasoning = None::<String>;
        let mut proto = v1::ChatMessage::default();
        let mut extra = Vec::new();
        let mut seen = std::collections::HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if seen.contains(&key) {
                return Err(A::Error::custom(format_args!("duplicate field `{key}`")));
            }
            match key.as_str() {
                "role" => role = Some(map.next_value()?),
                "content" => content = map.next_value()?,
                "reasoning_content" => proto.reasoning_content = map.next_value()?,
                "reasoning" => reasoning = map.next_value()?,
                "name" => proto.name = map.next_value::<Option<String>>()?.unwrap_or_default(),
                "tool_call_id" => {
                    proto.tool_call_id = map.next_value::<Option<String>>()?.unwrap_or_default()
                }
                "tool_calls" => {
                    let calls = map.next_value::<Option<Vec<CallIn>>>()?.unwrap_or_default();
                    proto.tool_calls = calls.into_iter().map(|call| call.0).collect();
                }
                // What OpenAI's own answers hold besides, and no template reads.
                "refusal" | "annotations" | "audio" => drop(map.next_value::<IgnoredAny>()?),
                _ => {
                    let value = map.next_value::<Box<RawValue>>()?;
                    if value.get() != "null" {
                        extra.push((key.clone(), value));
                    }
                }
            }
            seen.insert(key);
        }
        proto.role = role.ok_or_else(|| A::Error::missing_field("role"))?;
        if proto.role.is_empty() {
            return Err(A::Error::custom("role must not be empty"));
        }
        proto.reasoning_content = proto.reasoning_content.or(reasoning);
        // Null and absent content are the empty string to a template, which would print "None".
        proto.content = Some(match content {
            None => v1::chat_message::Content::Text(String::new()),
            Some(Content::Text(text)) => v1::chat_message::Content::Text(text),
            Some(Content::Parts(parts)) => v1::chat_message::Content::Parts(v1::ContentParts { parts }),
        });
        Ok(Message { proto, extra })
    }
}
