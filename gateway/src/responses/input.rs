//! `input`: a string, or a list of items.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};

#[derive(Debug)]
pub(super) enum Input {
    Text(String),
    Items(Vec<ItemIn>),
}

/// Any item: the fields of all types that are served.
#[derive(Debug, Deserialize)]
pub(super) struct ItemIn {
    /// Absent for a plain message.
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    /// Of an earlier answer's item.
    pub(super) id: Option<String>,
    // message; reasoning has content too
    pub(super) role: Option<String>,
    pub(super) content: Option<Text>,
    // function_call, custom_tool_call, and their outputs
    pub(super) call_id: Option<String>,
    pub(super) name: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) arguments: Option<String>,
    pub(super) input: Option<String>,
    pub(super) output: Option<Text>,
    // reasoning
    pub(super) summary: Option<Vec<PartIn>>,
    pub(super) encrypted_content: Option<String>,
}

/// A string or a list of parts.
#[derive(Debug)]
pub(super) enum Text {
    Whole(String),
    Parts(Vec<PartIn>),
}

#[derive(Debug, Deserialize)]
pub(super) struct PartIn {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) text: Option<String>,
    pub(super) refusal: Option<String>,
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match string_or_list(deserializer, "a string or a list of items")? {
            Either::Text(text) => Ok(Self::Text(text)),
            Either::List(items) => Ok(Self::Items(items)),
        }
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match string_or_list(deserializer, "a string or a list of content parts")? {
            Either::Text(text) => Ok(Self::Whole(text)),
            Either::List(parts) => Ok(Self::Parts(parts)),
        }
    }
}

enum Either<T> {
    Text(String),
    List(Vec<T>),
}

fn string_or_list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
    expected: &'static str,
) -> Result<Either<T>, D::Error> {
    struct Any<T>(&'static str, std::marker::PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Any<T> {
        type Value = Either<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Either<T>, E> {
            Ok(Either::Text(text.to_owned()))
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Either<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(element) = seq.next_element()? {
                list.push(element);
            }
            Ok(Either::List(list))
        }
    }

    deserializer.deserialize_any(Any(expected, std::marker::PhantomData))
}
