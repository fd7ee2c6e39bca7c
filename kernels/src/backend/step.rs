//! What changes from step to step: tokens, their sequences, and how rows are sampled; and the limits of all of it.

/// In `Batch::ids`: the token that the last `queue_sample` drew for the row in the lower bits.
pub const SAMPLED: u32 = 1 << 31;

/// The tokens of one step on this worker: runs of consecutive positions of one sequence each, laid end to end.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// One id per token; for a decode run resolved by the executor or, on a device, from the last sample.
    pub ids: Vec<u32>,
    /// Position of each token in its sequence.
    pub positions: Vec<u32>,
    pub runs: Vec<BatchRun>,
    /// Token indices whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
}

#[derive(Clone, Debug)]
pub struct BatchRun {
    /// First token of the run within the batch.
    pub first: u32,
    pub len: u32,
    /// The sequence's page table: covers position + len tokens.
    pub pages: Vec<u32>,
    /// Position of the first token.
    pub position: u32,
}

/// Sampling of one row of logits; see `ops/sample`.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleParams {
    pub temperature: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: u64,
    /// So many best log-probabilities besides the sampled one's.
    pub logprobs: Option<u32>,
}

/// The largest logit: temperature 0, nothing adjusted, nothing told.
impl Default for SampleParams {
    fn default() -> SampleParams {
        SampleParams {
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
        }
    }
}

/// One row to sample.
#[derive(Clone)]
pub struct SampleRow<'a> {
    pub params: &'a SampleParams,
    /// Position that the sampled token will have: the counter of the generator, with the seed as key.
    pub position: u32,
    /// All tokens so far and where the output begins, if penalties need them (else empty). In `queue_sample` the last one may
    /// be `SAMPLED | row`, as in a batch.
    pub tokens: &'a [u32],
    pub output_start: usize,
    /// Of all queued rows that say the same, those that come later have the earlier ones' tokens and parameters, with more tokens behind:
    /// a device may keep them. Once each step.
    pub history: Option<u64>,
    /// Allowed tokens, one bit each; `None`: all.
    pub mask: Option<&'a [u8]>,
    /// Tokens that may not be chosen now.
    pub forbidden: &'a [u32],
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampled {
    pub token: u32,
    /// With `SampleParams::logprobs`: of the sampled token, its rank (1 = best) and the best ones.
    pub logprob: f32,
    pub rank: u32,
    pub top: Vec<(u32, f32)>,
    /// Why the row has no token.
    pub error: Option<SampleError>,
}

/// Why a row has no token. It says so in the same words on every backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SampleError {
    /// Its logits or parameters are no numbers to sample from, or name no token: which.
    Failed(String),
    /// The row's own mask, forbidden tokens and biases forbid every token.
    Unsatisfiable,
}

impl std::fmt::Display for SampleError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SampleError::Failed(reason) => f.write_str(reason),
            SampleError::Unsatisfiable => f.write_str("no token is allowed"),
        }
    }
}

impl<S: Into<String>> From<S> for SampleError {
    fn from(reason: S) -> SampleError {
        SampleError::Failed(reason.into())
    }
}

/// Which of a row's top-k slots this rank computes: `expert` is local.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertRow {
    /// Row of the input.
    pub row: u32,
    pub expert: u32,
}

/// Shapes that stay the same while the backend lives; buffers are sized from them.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Tokens in one step on this rank.
    pub max_tokens: usize,
    /// Rows of logits in one step.
    pub max_logit_rows: usize,
    /// Runs in one step.
    pub max_runs: usize,
    /// Longest page table.
    pub max_pages_per_run: usize,
    /// Rows that the experts of this rank may receive in one layer from all ranks.
    pub max_expert_rows: usize,
    pub page_tokens: usize,
}
