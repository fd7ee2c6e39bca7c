//! What a client asks for: one sequence, and how its tokens are sampled.

use std::sync::Arc;

use super::SequenceId;

/// What a client wants sampled. Shared by all runs of the sequence; checked by the shell before it gets here.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    pub temperature: f32,
    /// 0: all.
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: u64,
    /// Sampled and best log-probabilities wanted, with so many best.
    pub logprobs: Option<u32>,
    pub bad_words: Vec<Vec<u32>>,
}

impl Default for Sampling {
    /// The likeliest token, and nothing adjusted.
    fn default() -> Sampling {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            bad_words: Vec::new(),
        }
    }
}

/// One sequence to generate.
#[derive(Clone, Debug)]
pub struct Submit {
    pub id: SequenceId,
    pub prompt: Arc<[u32]>,
    pub sampling: Arc<Sampling>,
    /// At least 1, counted from the prompt's end, `generated` included; prompt + max_new_tokens is at most the
    /// model's length (the shell sees to it).
    pub max_new_tokens: u32,
    /// Tokens that end the sequence (eos unless ignored, stop_token_ids). The token itself is delivered.
    pub stop_tokens: Arc<[u32]>,
    /// Stop tokens are neither sampled nor obeyed before so many new tokens. Masks say it better: 0 beside them.
    pub min_new_tokens: u32,
    /// Higher first.
    pub priority: i32,
    /// Sequences with different salts never share pages.
    pub cache_salt: u64,
    pub prompt_logprobs: Option<u32>,
    /// Every sampling step waits for a mask (structured output): see `Event::Mask`.
    pub masked: bool,
    /// The mask of the first token, where it is known already: no step is spent on waiting for it.
    pub first_mask: Option<Arc<[u8]>>,
    /// Tokens generated before (re-submitted by a gateway that lost its router): continue after them. They are
    /// not delivered again; they count in `Usage::generated_tokens`.
    pub generated: Vec<u32>,
}

impl Submit {
    /// A plain request: no token ends it before its length does, and it shares pages with all others.
    pub fn new(id: SequenceId, prompt: Arc<[u32]>, max_new_tokens: u32) -> Submit {
        Submit {
            id,
            prompt,
            sampling: Arc::new(Sampling::default()),
            max_new_tokens,
            stop_tokens: Arc::new([]),
            min_new_tokens: 0,
            priority: 0,
            cache_salt: 0,
            prompt_logprobs: None,
            masked: false,
            first_mask: None,
            generated: Vec::new(),
        }
    }
}
