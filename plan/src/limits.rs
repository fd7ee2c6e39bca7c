//! Bounds on numbers that come from a `config.json`. Each is well above every published model and low enough that
//! the products in this crate fit 64 bits: `MAX_LAYERS * MAX_EXPERTS * MAX_WIDTH^2 * 3 * 4` is below 2^60.
//!
//! Keeps invariant C1 of ARCHITECTURE.md.

/// A `config.json` is a few KB; a larger file is something else.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// The deepest published models have about 130 layers.
pub const MAX_LAYERS: usize = 1 << 10;
/// Hidden size, and the width of any projection.
pub const MAX_WIDTH: usize = 1 << 16;
pub const MAX_HEADS: usize = 1 << 10;
pub const MAX_HEAD_DIM: usize = 1 << 10;
/// Experts of one layer.
pub const MAX_EXPERTS: usize = 1 << 12;
/// Experts a token is sent to; kernels keep a token's choice in registers.
pub const MAX_TOP_K: usize = 64;
pub const MAX_VOCAB: usize = 1 << 22;
/// Longest sequence a model may claim.
pub const MAX_POSITION: usize = 1 << 24;
/// End-of-sequence ids a config may list.
pub const MAX_EOS_IDS: usize = 64;
/// INT4 group and FP8 block sizes.
pub const MAX_QUANT_GROUP: usize = 1 << 12;
/// Module patterns in a quantization config.
pub const MAX_QUANT_PATTERNS: usize = 1 << 17;
/// Ranks of one group.
pub const MAX_RANKS: u32 = 1 << 12;
/// Longest value that an error message repeats.
pub const MAX_SHOWN_VALUE: usize = 80;
