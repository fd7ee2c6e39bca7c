//! `prompt` of a completion: text, token ids, or a list of either. And `stop`: one string or several.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

#[derive(Clone, Debug, PartialEq)]
pub(super) enum OnePrompt {
    Text(String),
    Ids(Vec<u32>),
}

/// At least one prompt.
#[derive(Debug, PartialEq)]
pub(super) struct Prompt(pub(super) Vec<OnePrompt>);

const EXPECTED: &str = "a string, a list of strings, a list of token ids or a list of lists of token ids";

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Whole;

        impl<'de> Visitor<'de> for Whole {
            type Value = Prompt;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(EXPECTED)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Prompt, E> {
                Ok(Prompt(vec![OnePrompt::Text(text.to_owned())]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompt, A::Error> {
                let mixed = || A::Error::custom(format_args!("the list mixes kinds: expected {EXPECTED}"));
                let mut ids = Vec::new();
                let mut prompts = Vec::new();
                while let Some(element) = seq.next_element::<Element>()? {
                    match element {
                        Element::Id(id) if prompts.is_empty() => ids.push(id),
                        Element::Prompt(prompt) if ids.is_empty() => {
                            let same = |first: &OnePrompt| {
                                std::mem::discriminant(first) == std::mem::discriminant(&prompt)
                            };
                            if !prompts.first().is_none_or(same) {
                                return Err(mixed());
                            }
                            prompts.push(prompt);
                        }
                        _ => return Err(mixed()),
                    }
                }
                match (ids.is_empty(), prompts.is_empty()) {
                    (true, true) => Err(A::Error::custom(
                        "the list is empty: at least one prompt is needed",
                    )),
                    (false, _) => Ok(Prompt(vec![OnePrompt::Ids(ids)])),
                    (true, false) => Ok(Prompt(prompts)),
                }
            }
        }

        deserializer.deserialize_any(Whole)
    }
}

enum Element {
    Id(u32),
    Prompt(OnePrompt),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct One;

        impl<'de> Visitor<'de> for One {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }

            fn visit_u64<E: Error>(self, id: u64) -> Result<Element, E> {
                let id = u32::try_from(id)
                    .map_err(|_| E::custom(format_args!("token id {id} does not fit 32 bits")))?;
                Ok(Element::Id(id))
            }

            fn visit_i64<E: Error>(self, id: i64) -> Result<Element, E> {
                Err(E::custom(format_args!("token id {id} is negative")))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Prompt(OnePrompt::Text(text.to_owned())))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Element, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = seq.next_element::<u32>()? {
                    ids.push(id);
                }
                Ok(Element::Prompt(OnePrompt::Ids(ids)))
            }
        }

        deserializer.deserialize_any(One)
    }
}

/// One string or a list of them.
#[derive(Debug, Default)]
pub(super) struct Strings(pub(super) Vec<String>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Strings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Strings, E> {
                Ok(Strings(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Strings, A::Error> {
                let mut strings = Vec::new();
                while let Some(text) = seq.next_element()? {
                    strings.push(text);
                }
                Ok(Strings(strings))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_four_forms_and_nothing_between() {
        let parse = |json: &str| serde_json::from_str::<Prompt>(json).map(|prompt| prompt.0);
        let text = |text: &str| OnePrompt::Text(text.to_owned());
        assert_eq!(parse(r#""a""#).unwrap(), [text("a")]);
        assert_eq!(parse(r#"["a","b"]"#).unwrap(), [text("a"), text("b")]);
        assert_eq!(parse("[1,2]").unwrap(), [OnePrompt::Ids(vec![1, 2])]);
        assert_eq!(
            parse("[[1],[2,3]]").unwrap(),
            [OnePrompt::Ids(vec![1]), OnePrompt::Ids(vec![2, 3])]
        );
        for bad in [
            "[]",
            "5",
            "{}",
            "true",
            r#"["a",1]"#,
            r#"[1,"a"]"#,
            r#"["a",[1]]"#,
            "[[1],2]",
            "[-1]",
            "[1.5]",
            "[4294967296]",
            "[[[1]]]",
            r#"[["a"]]"#,
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
