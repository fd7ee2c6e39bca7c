//! The body of `/v1/chat/completions` and `/v1/completions`: one type, since all but a few fields are common.
//!
//! Every field may be null, which means absent. Unknown fields are ignored, as OpenAI and vLLM do; fields that
//! would change the answer and are not served are named here, to be refused.

use std::fmt;

use serde::de::{Deserialize as _, Deserializer, Error, Visitor};
use serde_json::value::RawValue;

use super::message::Message;
use super::prompt::{Prompt, Strings};
use super::structured::{ResponseFormat, StructuredOutputs};
use super::tools::{ChoiceIn, ToolIn};

#[derive(Debug, serde::Deserialize)]
pub(super) struct Request {
    pub(super) model: Option<String>,
    // What to continue: one of the two, by endpoint.
    pub(super) prompt: Option<Prompt>,
    pub(super) messages: Option<Vec<Message>>,
    // How to answer.
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    pub(super) n: Option<i64>,
    pub(super) best_of: Option<i64>,
    pub(super) echo: Option<bool>,
    pub(super) logprobs: Option<Logprobs>,
    pub(super) top_logprobs: Option<i64>,
    pub(super) prompt_logprobs: Option<i64>,
    pub(super) return_token_ids: Option<bool>,
    pub(super) return_tokens_as_token_ids: Option<bool>,
    pub(super) skip_special_tokens: Option<bool>,
    #[serde(alias = "no_stop_trim")]
    pub(super) include_stop_str_in_output: Option<bool>,
    pub(super) include_reasoning: Option<bool>,
    pub(super) detokenize: Option<bool>,
    // How to sample.
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) top_k: Option<i32>,
    pub(super) min_p: Option<f64>,
    pub(super) repetition_penalty: Option<f64>,
    pub(super) presence_penalty: Option<f64>,
    pub(super) frequency_penalty: Option<f64>,
    pub(super) logit_bias: Option<std::collections::BTreeMap<String, f64>>,
    pub(super) seed: Option<Seed>,
    #[serde(default = "MaxTokens::absent", deserialize_with = "MaxTokens::read")]
    pub(super) max_tokens: MaxTokens,
    pub(super) max_completion_tokens: Option<i64>,
    pub(super) min_tokens: Option<i64>,
    pub(super) stop: Option<Strings>,
    pub(super) stop_token_ids: Option<Vec<u32>>,
    pub(super) ignore_eos: Option<bool>,
    pub(super) bad_words: Option<Vec<String>>,
    // How to serve.
    pub(super) priority: Option<i64>,
    pub(super) cache_salt: Option<String>,
    pub(super) truncate_prompt_tokens: Option<i64>,
    pub(super) add_special_tokens: Option<bool>,
    // Chat.
    pub(super) tools: Option<Vec<ToolIn>>,
    pub(super) tool_choice: Option<ChoiceIn>,
    pub(super) parallel_tool_calls: Option<bool>,
    pub(super) add_generation_prompt: Option<bool>,
    pub(super) continue_final_message: Option<bool>,
    pub(super) chat_template_kwargs: Option<Box<RawValue>>,
    pub(super) reasoning_effort: Option<String>,
    pub(super) documents: Option<Box<RawValue>>,
    // Constraints.
    pub(super) response_format: Option<ResponseFormat>,
    pub(super) structured_outputs: Option<StructuredOutputs>,
    pub(super) guided_json: Option<Box<RawValue>>,
    pub(super) guided_regex: Option<String>,
    pub(super) guided_choice: Option<Vec<String>>,
    pub(super) guided_grammar: Option<String>,
    pub(super) json_schema: Option<Box<RawValue>>,
    pub(super) regex: Option<String>,
    pub(super) ebnf: Option<String>,
    // Refused when they ask for something.
    pub(super) suffix: Option<String>,
    pub(super) use_beam_search: Option<bool>,
    pub(super) chat_template: Option<String>,
    pub(super) functions: Option<Box<RawValue>>,
    pub(super) function_call: Option<Box<RawValue>>,
    pub(super) allowed_token_ids: Option<Box<RawValue>>,
    pub(super) logits_processors: Option<Box<RawValue>>,
    pub(super) modalities: Option<Vec<String>>,
    pub(super) separate_reasoning: Option<bool>,
    pub(super) stop_regex: Option<Box<RawValue>>,
    pub(super) lora_path: Option<Box<RawValue>>,
    pub(super) custom_logit_processor: Option<Box<RawValue>>,
    pub(super) return_hidden_states: Option<bool>,
}

#[derive(Clone, Copy, Debug, Default, serde::Deserialize)]
pub(super) struct StreamOptions {
    pub(super) include_usage: Option<bool>,
    pub(super) continuous_usage_stats: Option<bool>,
}

/// A boolean for chats, a number of alternatives for completions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Logprobs {
    Flag(bool),
    Count(i64),
}

impl<'de> serde::Deserialize<'de> for Logprobs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl Visitor<'_> for Any {
            type Value = Logprobs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a boolean (chat) or a number from 0 to 20 (completions)")
            }

            fn visit_bool<E: Error>(self, flag: bool) -> Result<Logprobs, E> {
                Ok(Logprobs::Flag(flag))
            }

            fn visit_i64<E: Error>(self, count: i64) -> Result<Logprobs, E> {
                Ok(Logprobs::Count(count))
            }

            fn visit_u64<E: Error>(self, count: u64) -> Result<Logprobs, E> {
                Ok(Logprobs::Count(i64::try_from(count).unwrap_or(i64::MAX)))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

/// Any 64-bit number; a negative one is taken by its bits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seed(pub(super) u64);

impl<'de> serde::Deserialize<'de> for Seed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl Visitor<'_> for Any {
            type Value = Seed;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a 64-bit integer")
            }

            fn visit_u64<E: Error>(self, seed: u64) -> Result<Seed, E> {
                Ok(Seed(seed))
            }

            fn visit_i64<E: Error>(self, seed: i64) -> Result<Seed, E> {
                Ok(Seed(seed.cast_unsigned()))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

/// `max_tokens` tells absent (the endpoint's default) from null (no limit but the model's), as vLLM does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum MaxTokens {
    Absent,
    Null,
    Given(i64),
}

impl MaxTokens {
    fn absent() -> Self {
        Self::Absent
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Option::<i64>::deserialize(deserializer)?.map_or(Self::Null, Self::Given))
    }
}
