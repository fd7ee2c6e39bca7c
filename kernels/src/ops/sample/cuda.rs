//! Launches of `sample.cu`; rows with penalties, biases, masks or log-probabilities come to the host's sampler.

use crate::backend::{Result, SampleParams, SampleRow, Sampled};
use crate::cuda::workspace::{Slot, Workspace};
use crate::cuda::{Gpu, Launch, as_bytes};

const SLICES: usize = 64;
const BAD_LOGIT: u32 = u32::MAX;
const NO_TOKEN: u32 = u32::MAX - 1;

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
}

/// Mirrors `SampleTokens`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct SampleTokens {
    pub(crate) logits: u64,
    pub(crate) specs: u64,
    pub(crate) positions: u64,
    pub(crate) token_of: u64,
    slices: u64,
    arrived: u64,
    best: u64,
    pub(crate) tokens: u64,
    pub(crate) rows: i32,
    vocab: i32,
    slice_count: i32,
}

/// Whether the device's sampler knows all that the row asks for.
pub(crate) fn on_device(row: &SampleRow<'_>) -> bool {
    let SampleParams {
        temperature,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        ..
    } = *row.params;
    let plain = repetition_penalty == 1.0 && presence_penalty == 0.0 && frequency_penalty == 0.0;
    let open = row.params.logit_bias.is_empty() && row.mask.is_none() && row.forbidden.is_empty();
    plain && open && row.params.logprobs.is_none() && temperature >= 0.0 && temperature.is_finite()
}

/// `token`: where the result goes.
pub(crate) fn spec(row: &SampleRow<'_>, position: u32, token: usize) -> SampleSpec {
    SampleSpec {
        temperature: row.params.temperature,
        top_p: row.params.top_p,
        min_p: row.params.min_p,
        top_k: row.params.top_k,
        seed: row.params.seed,
        position,
        token: token as u32,
    }
}

/// The parameters for up to `capacity` rows; specs and tokens are pieces of the workspace.
pub(crate) fn params(
    gpu: &Gpu,
    workspace: &mut Workspace,
    capacity: usize,
    vocab: usize,
) -> Result<SampleTokens> {
    Ok(SampleTokens {
        slices: workspace.get(gpu, Slot::Slices, capacity * SLICES * 16)?,
        arrived: workspace.get(gpu, Slot::SampleArrived, capacity * 4)?,
        best: workspace.get(gpu, Slot::Best, capacity * 16)?,
        specs: workspace.get(gpu, Slot::Specs, capacity * size_of::<SampleSpec>())?,
        tokens: workspace.get(gpu, Slot::Tokens, capacity * 4)?,
        vocab: vocab as i32,
        slice_count: SLICES as i32,
        ..SampleTokens::default()
    })
}

/// Sends the specs of the rows.
pub(crate) fn send_specs(gpu: &Gpu, workspace: &Workspace, specs: &[SampleSpec]) -> Result<()> {
    match workspace.memory(Slot::Specs) {
        Some(memory) => gpu.write(memory, 0, as_bytes(specs)),
        None => Ok(()),
    }
}

/// Queues the sampling of `params.rows` rows. `drawn`: some row has a temperature.
pub(crate) fn sample(gpu: &Gpu, params: &SampleTokens, drawn: bool) -> Result<()> {
    let rows = params.rows as u32;
    let greedy = Launch {
        grid: (SLICES as u32, rows),
        threads: 256,
        shared: 0,
        overlap: true,
    };
    gpu.launch("sample_greedy", greedy, params)?;
    if drawn {
        let rest = Launch {
            grid: (rows, 1),
            threads: 1024,
            shared: 0,
            overlap: true,
        };
        gpu.launch("sample_rest", rest, params)?;
    }
    Ok(())
}

/// The CPU's sampler, for rows that ask for more than the device's knows.
pub(crate) fn on_host(logits: &[f32], row: &SampleRow<'_>) -> Sampled {
    super::sample(
        crate::simd::Isa::detect(),
        logits,
        row,
        &mut super::Scratch::new(logits.len()),
    )
}

/// What a token from the device means.
pub(crate) fn result(token: u32) -> Sampled {
    let error = match token {
        BAD_LOGIT => Some("a logit is NaN or infinite".to_owned()),
        NO_TOKEN => Some("no token is allowed".to_owned()),
        _ => None,
    };
    let token = if error.is_some() { 0 } else { token };
    Sampled {
        token,
        error,
        ..Sampled::default()
    }
}
