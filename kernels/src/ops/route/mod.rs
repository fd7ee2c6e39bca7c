//! Router: `x = rmsnorm(hidden)`, `z = x G`, the `k` experts of each token and their weights.
//!
//! `score = sigmoid(z)` or `softmax(z)`; the experts are chosen by `score + bias`, best first, the lower index
//! first among equals; their weights are the scores without the bias, divided by their sum (added in slot order)
//! if the model renormalises. The softmax's sum has 16 lanes, expert mod 16, added by the fixed tree.

mod choose;
mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

/// Most experts of a layer; the largest published model has 512.
pub(crate) const MAX_EXPERTS: usize = 4096;
/// Most experts of a token.
pub(crate) const MAX_TOP_K: usize = 64;
/// Tokens whose scores are in the workspace at a time.
pub(crate) const ROUTE_TOKENS: usize = 64;
