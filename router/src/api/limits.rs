//! The bounds of a request, each with its reason.
//!
//! Keeps invariant B1 of ARCHITECTURE.md.

/// Longer ids would fill logs and headers.
pub const MAX_REQUEST_ID_BYTES: usize = 128;
/// vLLM's and OpenAI's largest `n`.
pub const MAX_N: u32 = 128;
/// Everything above is noise; a larger value is nearly always a mistake in units.
pub const MAX_TEMPERATURE: f32 = 100.0;
/// OpenAI's range is -2 to 2.
pub const MAX_PENALTY: f32 = 2.0;
/// Above, the first repeated token would already be impossible; below, certain, and soon its logit infinite.
pub const MAX_REPETITION_PENALTY: f32 = 100.0;
pub const MIN_REPETITION_PENALTY: f32 = 0.01;
/// OpenAI's range is -100 to 100.
pub const MAX_BIAS: f32 = 100.0;
/// Each entry travels to a worker with the sequence.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Each new token is compared with all of them.
pub const MAX_STOP_TOKENS: usize = 128;
/// Each is compared with the last tokens at every step.
pub const MAX_BAD_WORDS: usize = 128;
pub const MAX_BAD_WORD_BYTES: usize = 256;
/// OpenAI's largest `top_logprobs`.
pub const MAX_LOGPROBS: u32 = crate::cluster::translate::MAX_LOGPROBS as u32;
pub const MAX_SALT_BYTES: usize = 256;
