//! Launches of the sampling kernels and what they say; `lists` packs what a row asks for beyond its numbers.

pub(crate) mod histories;
pub(crate) mod lists;

use crate::backend::{Result, SampleError, SampleRow, Sampled};
use crate::cuda::workspace::{Slot, Workspace};
use crate::cuda::{Gpu, Launch};

/// Mirror `GREEDY_THREADS` and `GREEDY_BLOCKS` of `greedy.cu`: blocks that a multiprocessor holds at a time.
const GREEDY_THREADS: u32 = 256;
const GREEDY_BLOCKS: u32 = 8;
/// Most blocks of a row: more are no faster.
const GREEDY_MOST: u32 = 66;
/// Mirror `ROW_BLOCKS` and `ROW_THREADS` of `row.cuh`.
const ROW_BLOCKS: usize = 8;
const ROW_THREADS: u32 = 512;
/// Best log-probabilities that a row may ask for: the API's limit.
pub(crate) const MAX_TOP: usize = 20;
/// A cluster holds a row of so many logits, and a block the candidates for its best ones.
pub(crate) const MAX_VOCAB: usize = 1 << 18;

/// Mirrors `SampleSpec`.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq)]
pub(crate) struct SampleSpec {
    temperature: f32,
    top_p: f32,
    min_p: f32,
    top_k: u32,
    seed: u64,
    position: u32,
    token: u32,
    extra: u32,
    /// 0: none; n + 1: the sampled token's and the n best.
    logprobs: u32,
}

impl SampleSpec {
    const NO_EXTRA: u32 = u32::MAX;

    /// `token`: where the result goes.
    fn new(row: &SampleRow<'_>, position: u32, token: usize, extra: Option<u32>) -> SampleSpec {
        SampleSpec {
            temperature: row.params.temperature,
            top_p: row.params.top_p,
            min_p: row.params.min_p,
            top_k: row.params.top_k,
            seed: row.params.seed,
            position,
            token: token as u32,
            extra: extra.unwrap_or(SampleSpec::NO_EXTRA),
            logprobs: row.params.logprobs.map_or(0, |best| best + 1),
        }
    }

    /// The largest logit as it is: `sample_greedy`'s.
    fn is_plain(&self) -> bool {
        self.temperature == 0.0 && self.extra == SampleSpec::NO_EXTRA && self.logprobs == 0
    }

    pub(crate) fn wants_logprobs(&self) -> bool {
        self.logprobs > 0
    }
}

/// Mirrors `SampleLogprobs`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SampleLogprobs {
    logprob: f32,
    rank: u32,
    count: u32,
    unused: u32,
    tokens: [u32; MAX_TOP],
    logprobs: [f32; MAX_TOP],
}

impl SampleLogprobs {
    pub(crate) const BYTES: usize = size_of::<SampleLogprobs>();

    /// As the device wrote it.
    pub(crate) fn read(bytes: &[u8; SampleLogprobs::BYTES]) -> SampleLogprobs {
        let word = |at: usize| {
            let word = bytes.get(4 * at..).and_then(|rest| rest.first_chunk());
            u32::from_le_bytes(word.copied().unwrap_or_default())
        };
        SampleLogprobs {
            logprob: f32::from_bits(word(0)),
            rank: word(1),
            count: word(2),
            unused: 0,
            tokens: std::array::from_fn(|i| word(4 + i)),
            logprobs: std::array::from_fn(|i| f32::from_bits(word(4 + MAX_TOP + i))),
        }
    }
}

/// Mirrors `SampleTokens`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct SampleTokens {
    pub(crate) logits: u64,
    pub(crate) specs: u64,
    pub(crate) positions: u64,
    pub(crate) token_of: u64,
    pub(crate) extras: u64,
    histories: u64,
    tops: u64,
    arrived: u64,
    pub(crate) tokens: u64,
    pub(crate) logprobs: u64,
    pub(crate) rows: i32,
    vocab: i32,
    each: i32,
    mixed: i32,
}

/// The parameters for up to `capacity` rows and `list_bytes` of lists, all in pieces of the workspace.
pub(crate) fn params(
    gpu: &Gpu,
    workspace: &mut Workspace,
    capacity: usize,
    vocab: usize,
) -> Result<SampleTokens> {
    Ok(SampleTokens {
        tops: workspace.get(gpu, Slot::SampleTops, capacity * 8)?,
        arrived: workspace.get(gpu, Slot::SampleArrived, capacity * 4)?,
        specs: workspace.get(gpu, Slot::Specs, capacity * size_of::<SampleSpec>())?,
        extras: workspace.get(gpu, Slot::SampleLists, lists::bytes(capacity, vocab))?,
        histories: workspace.get(gpu, Slot::SampleHistories, histories::HISTORY_WORDS * 4)?,
        tokens: workspace.get(gpu, Slot::Tokens, capacity * 4)?,
        logprobs: workspace.get(gpu, Slot::SampleLogprobs, capacity * SampleLogprobs::BYTES)?,
        vocab: vocab as i32,
        each: (vocab.div_ceil(4).div_ceil(ROW_BLOCKS) * 4) as i32,
        ..SampleTokens::default()
    })
}

/// Queues the sampling of `specs`' rows: each kernel if some row is its.
pub(crate) fn sample(gpu: &Gpu, params: &SampleTokens, specs: &[SampleSpec]) -> Result<()> {
    let rows = specs.len() as u32;
    let plain = specs.iter().filter(|spec| spec.is_plain()).count();
    if plain > 0 {
        let blocks = gpu.blocks() * GREEDY_BLOCKS / plain as u32;
        let greedy = Launch {
            grid: (blocks.clamp(1, GREEDY_MOST), rows),
            threads: GREEDY_THREADS,
            shared: 0,
            overlap: true,
        };
        let params = SampleTokens {
            mixed: i32::from(plain < specs.len()),
            ..*params
        };
        gpu.launch("sample_greedy", greedy, &params)?;
    }
    if plain < specs.len() {
        let row = Launch {
            grid: (ROW_BLOCKS as u32, rows),
            threads: ROW_THREADS,
            shared: params.each as u32 * 4,
            overlap: true,
        };
        gpu.launch("sample_row", row, params)?;
    }
    Ok(())
}

/// The CPU's sampler, for rows that the device's does not take.
pub(crate) fn on_host(logits: &[f32], row: &SampleRow<'_>) -> Sampled {
    super::sample(
        crate::simd::Isa::detect(),
        logits,
        row,
        &mut super::Scratch::new(logits.len()),
    )
}

/// What the device says of a row: its token, or why there is none, in the CPU's words.
pub(crate) fn result(token: u32, logprobs: Option<SampleLogprobs>) -> Sampled {
    let index = token & 0x0fff_ffff;
    let error = match token >> 28 {
        0 => None,
        1 => Some(format!("the logit of token {index} is NaN").into()),
        2 => Some(format!("the logit of token {index} is inf").into()),
        3 => Some(super::choose::SPOILT.into()),
        4 => Some(SampleError::Unsatisfiable),
        5 => Some(super::choose::NONE_LIKELY.into()),
        _ => Some(format!("the device gave {token:#x} for a token").into()),
    };
    if error.is_some() {
        return Sampled {
            error,
            ..Sampled::default()
        };
    }
    let Some(found) = logprobs else {
        return Sampled {
            token,
            ..Sampled::default()
        };
    };
    let top = found.tokens.into_iter().zip(found.logprobs);
    Sampled {
        token,
        logprob: found.logprob,
        rank: found.rank,
        top: top.take(found.count as usize).collect(),
        error: None,
    }
}
