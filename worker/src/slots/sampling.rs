//! Sampling parameters of a message, checked.

use conclave_kernels::backend::SampleParams;
use conclave_proto::cluster::v1 as wire;

use super::{Result, StepError};

/// Forbidden sequences of one slot, and tokens of one of them.
pub const MAX_BAD_WORDS: usize = 4096;
pub const MAX_BAD_WORD_TOKENS: usize = 1024;

/// How a slot samples.
#[derive(Clone, Debug)]
pub(super) struct SlotSampling {
    pub(super) params: SampleParams,
    pub(super) suppress: Vec<u32>,
    pub(super) suppress_until: u32,
    pub(super) bad_words: Vec<Vec<u32>>,
    /// Penalties or bad words look at the tokens so far.
    pub(super) needs_tokens: bool,
    /// Bad words of several tokens do, here on the host: it must know the last one.
    pub(super) reads_tokens: bool,
}

/// `field` is the place of `message` for errors.
pub(super) fn check(field: &str, message: wire::Sampling, vocab: usize) -> Result<SlotSampling> {
    let wrong = |name: &str, problem: String| Err(StepError::new(format!("{field}.{name}"), problem));
    let ranges = [
        ("temperature", message.temperature, 0.0, f32::MAX),
        ("top_p", message.top_p, f32::MIN_POSITIVE, 1.0),
        ("min_p", message.min_p, 0.0, 1.0),
        (
            "repetition_penalty",
            message.repetition_penalty,
            f32::MIN_POSITIVE,
            f32::MAX,
        ),
        ("presence_penalty", message.presence_penalty, f32::MIN, f32::MAX),
        ("frequency_penalty", message.frequency_penalty, f32::MIN, f32::MAX),
    ];
    for (name, value, low, high) in ranges {
        if !(low..=high).contains(&value) {
            return wrong(name, format!("{value} is not within {low:e} to {high:e}"));
        }
    }
    if message.logit_bias.len() > vocab {
        let count = message.logit_bias.len();
        return wrong(
            "logit_bias",
            format!("{count} entries for a vocabulary of {vocab}"),
        );
    }
    for bias in &message.logit_bias {
        if bias.token as usize >= vocab || !bias.bias.is_finite() {
            let problem = format!(
                "token {} with {}: a token below {vocab} and a finite bias are needed",
                bias.token, bias.bias
            );
            return wrong("logit_bias", problem);
        }
    }
    if message.suppress.len() > vocab {
        return wrong(
            "suppress",
            format!("{} entries for a vocabulary of {vocab}", message.suppress.len()),
        );
    }
    if let Some(token) = message.suppress.iter().find(|&&token| token as usize >= vocab) {
        return wrong("suppress", format!("token {token} is not below {vocab}"));
    }
    if message.bad_words.len() > MAX_BAD_WORDS {
        return wrong(
            "bad_words",
            format!(
                "{} entries, at most {MAX_BAD_WORDS} are allowed",
                message.bad_words.len()
            ),
        );
    }
    for word in &message.bad_words {
        let length = word.tokens.len();
        if !(1..=MAX_BAD_WORD_TOKENS).contains(&length) {
            return wrong(
                "bad_words",
                format!("an entry has {length} tokens, 1 to {MAX_BAD_WORD_TOKENS} are allowed"),
            );
        }
        if let Some(token) = word.tokens.iter().find(|&&token| token as usize >= vocab) {
            return wrong("bad_words", format!("token {token} is not below {vocab}"));
        }
    }
    let penalties = message.repetition_penalty != 1.0
        || message.presence_penalty != 0.0
        || message.frequency_penalty != 0.0;
    let reads_tokens = message.bad_words.iter().any(|word| word.tokens.len() > 1);
    Ok(SlotSampling {
        needs_tokens: penalties || reads_tokens,
        reads_tokens,
        params: SampleParams {
            temperature: message.temperature,
            top_k: message.top_k,
            top_p: message.top_p,
            min_p: message.min_p,
            repetition_penalty: message.repetition_penalty,
            presence_penalty: message.presence_penalty,
            frequency_penalty: message.frequency_penalty,
            logit_bias: message
                .logit_bias
                .iter()
                .map(|bias| (bias.token, bias.bias))
                .collect(),
            seed: message.seed,
            logprobs: message.logprobs.map(|best| best.min(vocab as u32)),
        },
        suppress: message.suppress,
        suppress_until: message.suppress_until,
        bad_words: message.bad_words.into_iter().map(|word| word.tokens).collect(),
    })
}

/// Takes `token` whatever the logits are, so that its log-probability is told. `best`: so many best ones beside.
pub(super) fn forced(token: u32, best: u32) -> SampleParams {
    /// Above every logit a model gives, with room to spare in F32.
    const ABOVE_ALL: f32 = 1e30;
    SampleParams {
        logit_bias: vec![(token, ABOVE_ALL)],
        logprobs: Some(best),
        ..SampleParams::default()
    }
}
