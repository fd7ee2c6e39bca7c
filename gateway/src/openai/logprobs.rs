//! Log-probabilities in OpenAI's two shapes, and vLLM's third for prompts.

use std::borrow::Cow;

use conclave_proto::v1;
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

/// JSON has no infinity; vLLM writes this for a token that could not have come.
const LOGPROB_MIN: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LOGPROB_MIN }
}

/// The first token of a prompt has no probability: the router leaves it out or gives it no rank.
fn known(entry: &v1::TokenLogprobs) -> Option<&v1::TokenLogprob> {
    entry
        .sampled
        .as_ref()
        .filter(|sampled| sampled.rank > 0 && !sampled.logprob.is_nan())
}

fn text(token: &v1::TokenLogprob, as_ids: bool) -> Cow<'_, str> {
    if as_ids {
        return Cow::Owned(format!("token_id:{}", token.token_id));
    }
    String::from_utf8_lossy(&token.token)
}

/// `logprobs` of a chat choice.
#[derive(Debug, Serialize)]
pub(super) struct ChatLogprobs<'a> {
    content: Vec<ChatToken<'a>>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct ChatToken<'a> {
    #[serde(flatten)]
    one: ChatOne<'a>,
    top_logprobs: Vec<ChatOne<'a>>,
}

#[derive(Debug, Serialize)]
struct ChatOne<'a> {
    token: Cow<'a, str>,
    logprob: f32,
    bytes: &'a [u8],
}

pub(super) fn chat<'a>(entries: &'a [v1::TokenLogprobs], as_ids: bool) -> ChatLogprobs<'a> {
    let one = |token: &'a v1::TokenLogprob| ChatOne {
        token: text(token, as_ids),
        logprob: finite(token.logprob),
        bytes: &token.token,
    };
    let content = entries
        .iter()
        .filter_map(|entry| {
            let sampled = entry.sampled.as_ref()?;
            Some(ChatToken {
                one: one(sampled),
                top_logprobs: entry.top.iter().map(one).collect(),
            })
        })
        .collect();
    ChatLogprobs {
        content,
        refusal: None,
    }
}

/// `logprobs` of a completion choice: four lists of the same length.
#[derive(Debug, Serialize)]
pub(super) struct CompletionLogprobs<'a> {
    text_offset: Vec<u32>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<Cow<'a, str>>,
    top_logprobs: Vec<Option<TopLogprobs<'a>>>,
}

#[derive(Debug)]
struct TopLogprobs<'a>(Vec<(Cow<'a, str>, f32)>);

impl Serialize for TopLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

pub(super) fn completion<'a>(
    entries: impl Iterator<Item = &'a v1::TokenLogprobs>,
    as_ids: bool,
) -> CompletionLogprobs<'a> {
    let mut out = CompletionLogprobs {
        text_offset: Vec::new(),
        token_logprobs: Vec::new(),
        tokens: Vec::new(),
        top_logprobs: Vec::new(),
    };
    for entry in entries {
        let Some(token) = &entry.sampled else { continue };
        let known = known(entry);
        out.text_offset.push(entry.text_offset);
        out.token_logprobs.push(known.map(|token| finite(token.logprob)));
        out.tokens.push(text(token, as_ids));
        out.top_logprobs.push(known.map(|sampled| {
            // The sampled token is always there, also when it is none of the best. Two tokens may look the
            // same as text: the likelier one stands.
            let mut top: Vec<(Cow<'a, str>, f32)> = Vec::with_capacity(entry.top.len() + 1);
            for token in entry.top.iter().chain(std::iter::once(sampled)) {
                let shown = text(token, as_ids);
                if top.iter().all(|(known, _)| *known != shown) {
                    top.push((shown, finite(token.logprob)));
                }
            }
            TopLogprobs(top)
        }));
    }
    out
}

/// Gives the first token of an echoed prompt its place. The router has no figures for it, because nothing
/// predicts it; its text is what comes before the next token's.
pub(super) fn name_first(
    prompt: &mut Vec<v1::TokenLogprobs>,
    prompt_ids: &[u32],
    generated: &[v1::TokenLogprobs],
    text: &str,
) {
    let Some((&token_id, rest)) = prompt_ids.split_first() else {
        return;
    };
    if prompt.first().is_some_and(|first| first.sampled.is_some()) {
        return;
    }
    let after = if rest.is_empty() {
        generated.first()
    } else {
        prompt.get(1)
    };
    let length = after.map_or(0, |after| after.text_offset as usize);
    let token = text.chars().take(length).collect::<String>().into_bytes().into();
    let sampled = Some(v1::TokenLogprob {
        token_id,
        logprob: 0.0,
        token,
        rank: 0,
    });
    let first = v1::TokenLogprobs {
        sampled,
        ..Default::default()
    };
    match prompt.first_mut() {
        Some(empty) => *empty = first,
        None => prompt.push(first),
    }
}

/// vLLM's `prompt_logprobs`: per position null, or token id to its figures.
#[derive(Debug)]
pub(super) struct PromptLogprobs<'a>(pub(super) &'a [v1::TokenLogprobs]);

#[derive(Serialize)]
struct PromptToken<'a> {
    logprob: f32,
    rank: u32,
    decoded_token: Cow<'a, str>,
}

impl Serialize for PromptLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(
            self.0
                .iter()
                .map(|entry| known(entry).map(|_| PromptPosition(entry))),
        )
    }
}

struct PromptPosition<'a>(&'a v1::TokenLogprobs);

impl Serialize for PromptPosition<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let top = &self.0.top;
        let mut map = serializer.serialize_map(None)?;
        let listed = |id: u32| top.iter().any(|token| token.token_id == id);
        let sampled = self.0.sampled.iter().filter(|token| !listed(token.token_id));
        for token in sampled.chain(top) {
            let shown = PromptToken {
                logprob: finite(token.logprob),
                rank: token.rank,
                decoded_token: String::from_utf8_lossy(&token.token),
            };
            map.serialize_entry(&token.token_id, &shown)?;
        }
        map.end()
    }
}
