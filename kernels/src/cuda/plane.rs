//! Sizes of planes (`plane.cuh`) and of the kernels that multiply them (`gemm.cuh`, `wide.cuh`, `quantised_wide.cuh`; those of few: `ops/linear/few.rs`), and the
//! launch of dense products.

use super::format::TILE_ROWS;
use super::weights::{Linear, WeightParam};
use super::wide_cut::WideCut;
use super::{Format, Gpu, Launch, shape};
use crate::backend::{KernelError, Result};
use crate::ops::linear::few;

/// Rows of one block of a plane.
pub(crate) const PLANE_ROWS: usize = 8;
/// Bytes of such a block.
pub(crate) const PLANE_BLOCK: usize = 1024;
/// Weight rows and activation rows of one tile of work.
const GEMM_ROWS: usize = 256;
pub(crate) const GEMM_COLUMNS: usize = 128;
/// Activations of more tokens than these can be quantised.
pub(crate) const WHOLE_TOKENS: usize = 16;
/// Results of more tokens than these can leave as BF16: writing them is a good part of the product's time.
const F32_TOKENS: usize = 64;
/// Activation rows of a pair of blocks of `wide.cuh`, and tiles of 16 weight rows of each block.
pub(crate) const WIDE_COLUMNS: usize = 256;
pub(crate) const WIDE_TILES: usize = 8;
/// Chunks of the ring of `linear/wide_rows.cu`.
const ROWS_DEPTH: usize = 3;
const THREADS: u32 = 384;
/// Shared memory through which eight warps' results of `gemm.cu` and `wide.cu` go out.
const OUT_BYTES: u32 = 8 * 32 * 20 * 4;

/// Blocks of a plane of `rows` rows; a tile may read, not use, rows past them.
pub(crate) fn plane_blocks(rows: usize) -> usize {
    rows.next_multiple_of(GEMM_COLUMNS) / PLANE_ROWS
}

/// Bytes of a plane of `blocks` blocks of `padded` values.
pub(crate) fn plane_bytes(blocks: usize, padded: usize) -> usize {
    padded / 64 * blocks * 1024
}

/// Bytes of a quantised plane of `blocks` blocks of `padded` values, scales included.
pub(crate) fn quantised_bytes(blocks: usize, padded: usize) -> usize {
    padded / 128 * blocks * (1024 + PLANE_ROWS * 4)
}

/// Weights of a step of `wide.cuh`, and of experts in FP8 scale blocks in a line of their own.
fn wide_step(format: Format) -> usize {
    WIDE_TILES * (128 / format.stage_inputs()) * format.stage_bytes() + format.line_bytes()
}

/// Shared memory of a block of `gemm.cuh`: the ring, its alignment and its barriers.
fn shared_bytes(format: Format) -> usize {
    let stages = 128 / format.stage_inputs();
    let step = (16 * stages * format.stage_bytes()).next_multiple_of(1024) + 2 * GEMM_COLUMNS * 128;
    let depth = (225 * 1024 / step).min(4);
    1024 + depth * step + 2 * depth * 8
}

/// Shared memory of a block of `wide.cuh`: alignment, both rings and their barriers.
fn wide_shared_bytes(format: Format) -> usize {
    let step = wide_step(format);
    let (weights, planes) = match format {
        Format::Int4G128 => (4, 5),
        Format::Int4G32 => (3, 5),
        Format::Fp8 | Format::Fp8Experts => (3, 4),
        _ => (2, 4),
    };
    1024 + planes * WIDE_COLUMNS * 128 + weights * step + 2 * (planes + weights) * 8
}

/// Rooms of `linear/wide_leaving.cuh` with their barriers: 256 tokens' 128 results as BF16, or twice 64 tokens' as F32.
const ROOMS_BYTES: usize = 64 + WIDE_COLUMNS * 256;

/// Barriers of `linear/leaving.cuh` and 256 tokens' 128 results as BF16, or half of them as F32, and 16 bytes each.
pub(crate) const LEAVING_BYTES: usize = 32 + WIDE_COLUMNS * 272;

/// Formats whose results leave as BF16: `linear/wide_staged.cu` and `linear/wide_rows.cu`.
fn leaves_staged(format: Format) -> bool {
    matches!(
        format,
        Format::Int4G128 | Format::Int4G32 | Format::Fp8 | Format::Bf16
    )
}

/// Shared memory of the blocks of `linear/wide_staged.cu`: shorter rings, and rooms for results with their barriers.
fn staged_shared_bytes(format: Format) -> usize {
    let step = WIDE_TILES * (128 / format.stage_inputs()) * format.stage_bytes();
    let (weights, planes) = match format {
        Format::Int4G128 | Format::Int4G32 => (3, 4),
        _ => (3, 3),
    };
    1024 + planes * WIDE_COLUMNS * 128 + weights * step + 2 * (planes + weights) * 8 + ROOMS_BYTES
}

/// The same of `linear/wide_rows.cu`: a ring of chunks of 64 inputs.
fn rows_shared_bytes() -> usize {
    let chunk = (WIDE_COLUMNS + WIDE_TILES * 16) * 128;
    1024 + ROWS_DEPTH * (chunk + 2 * 8) + ROOMS_BYTES
}

/// A persistent grid of pairs of blocks for `work` pairs' shares; `rest`: shared memory behind the rings.
pub(crate) fn wide_launch(gpu: &Gpu, format: Format, work: usize, rest: usize) -> Launch {
    pairs_launch(gpu, work, wide_shared_bytes(format) + rest)
}

/// The same of `quantised_wide.cuh`: a ring of `depth` steps of 256 quantised rows and 128 of weights with their scales.
pub(crate) fn quantised_launch(gpu: &Gpu, work: usize, depth: usize, rest: usize) -> Launch {
    let step = WIDE_COLUMNS * (128 + 4) + WIDE_TILES * 16 * 128 + 32;
    pairs_launch(gpu, work, 1024 + depth * (step + 2 * 8) + rest)
}

fn pairs_launch(gpu: &Gpu, work: usize, shared: usize) -> Launch {
    let pairs = (gpu.blocks() as usize / 2).min(work) as u32;
    Launch {
        grid: (pairs * 2, 1),
        threads: THREADS,
        shared: shared as u32,
        overlap: true,
    }
}

/// A persistent grid of `linear/gemm.cu` for `work` tiles: beside the ring the warps' results.
fn gemm_launch(gpu: &Gpu, format: Format, work: usize) -> Launch {
    Launch {
        grid: (gpu.blocks().min(work as u32), 1),
        threads: THREADS,
        shared: shared_bytes(format) as u32 + OUT_BYTES,
        overlap: true,
    }
}

/// Mirrors `GemmParams` of `linear/linear_params.cuh`.
#[repr(C)]
struct GemmParams {
    segments: [WeightParam; 3],
    plane: u64,
    y: u64,
    residual: u64,
    tokens: i32,
    blocks: i32,
    width: i32,
    tiles: i32,
    steps: i32,
    parts: i32,
    cut: WideCut,
}

/// `y[part] = plane * weights`, plus `residual` (if not 0) in part 0.
pub(crate) struct GemmCall<'a> {
    pub(crate) weights: &'a [&'a Linear],
    pub(crate) plane: u64,
    /// The plane is a quantised one; the weights are FP8.
    pub(crate) quantised: bool,
    /// Blocks of the plane.
    pub(crate) blocks: usize,
    pub(crate) tokens: usize,
    /// Into how many cuts of the inputs: `y` holds so many results, to be added.
    pub(crate) parts: usize,
    pub(crate) y: u64,
    pub(crate) residual: u64,
}

/// Tiles and outputs of weights side by side.
fn segments_of(weights: &[&Linear]) -> (usize, usize, [WeightParam; 3]) {
    let mut segments = [WeightParam::default(); 3];
    for (segment, weight) in segments.iter_mut().zip(weights) {
        *segment = weight.param();
    }
    let tiles = weights.iter().map(|weight| weight.tiles()).sum();
    (tiles, weights.iter().map(|weight| weight.rows).sum(), segments)
}

/// Of how many pairs of 128 rows all tokens are multiplied before the next ones: so many weights stay in the second-level cache.
fn band_of(format: Format, pairs: usize) -> usize {
    match format {
        Format::Bf16 | Format::F16 => 8,
        _ => pairs,
    }
}

/// Most parts: their sum is the reader's work.
pub(crate) const MAX_PARTS: usize = 12;

/// How many parts occupy the device when one column of tiles does not.
pub(crate) fn parts_for(gpu: &Gpu, weights: &[&Linear], tokens: usize, quantised: bool) -> usize {
    let rows: usize = weights.iter().map(|weight| weight.rows).sum();
    let (format, padded) = (weights[0].format, weights[0].padded());
    let tile_rows = match few::columns(tokens) {
        Some(_) if quantised => few::QUANTISED_TILES * TILE_ROWS,
        Some(columns) if few::has(format) => few::tiles(format, columns) * TILE_ROWS,
        _ => GEMM_ROWS,
    };
    let wanted = gpu.blocks() as usize / rows.div_ceil(tile_rows);
    let each = (padded / 128).div_ceil(wanted.clamp(1, MAX_PARTS));
    (padded / 128).div_ceil(each)
}

/// Whether [`linear_gemm_bf16`] takes these weights and so many tokens.
pub(crate) fn gives_bf16(weights: &[&Linear], tokens: usize) -> bool {
    let width: usize = weights.iter().map(|weight| weight.rows).sum();
    let whole = weights
        .iter()
        .all(|weight| leaves_staged(weight.format) && weight.rows % 16 == 0);
    tokens > F32_TOKENS && whole && width.is_multiple_of(8)
}

/// The same as `linear_gemm` without residual, with results as BF16. Of many tokens they are one part and leave beside the next products.
pub(crate) fn linear_gemm_bf16(gpu: &Gpu, call: &GemmCall<'_>) -> Result<()> {
    let parts = call.parts != 1 && call.tokens > GEMM_COLUMNS;
    if !gives_bf16(call.weights, call.tokens) || parts || call.residual != 0 {
        return Err(KernelError::Unsupported(
            "these products do not leave as BF16".into(),
        ));
    }
    launch(gpu, call, true)
}

pub(crate) fn linear_gemm(gpu: &Gpu, call: &GemmCall<'_>) -> Result<()> {
    launch(gpu, call, false)
}

fn launch(gpu: &Gpu, call: &GemmCall<'_>, bf16: bool) -> Result<()> {
    let &GemmCall {
        weights,
        plane,
        quantised,
        blocks,
        tokens,
        parts,
        y,
        residual,
    } = call;
    const OP: &str = "linear";
    let first = weights
        .first()
        .filter(|_| weights.len() <= 3)
        .ok_or_else(|| shape(OP, "weights", weights.len(), "1 to 3"))?;
    for (i, weight) in weights.iter().enumerate() {
        if weight.format != first.format || weight.inputs != first.inputs {
            return Err(KernelError::Unsupported(
                "weights of one projection differ in format or inputs".into(),
            ));
        }
        if weight.bf16_scales != first.bf16_scales {
            let problem = "scales of one projection's weights are F16 in one and BF16 in another: convert them to one type";
            return Err(KernelError::Unsupported(problem.into()));
        }
        if i + 1 < weights.len() && weight.rows % 64 != 0 {
            return Err(shape(OP, "rows of a part", weight.rows, "a multiple of 64"));
        }
    }
    if quantised && first.format != Format::Fp8 {
        return Err(KernelError::Unsupported(format!(
            "activations are FP8, the weights {}",
            first.format.name()
        )));
    }
    let steps = first.padded() / 128;
    if call.parts == 0 || call.parts > steps {
        return Err(shape(
            OP,
            "parts of the inputs",
            call.parts,
            format!("1 to {steps}"),
        ));
    }
    let (tiles, width, segments) = segments_of(weights);
    let pairs = tiles.div_ceil(2 * WIDE_TILES);
    let cut = WideCut::new(
        pairs,
        tokens,
        gpu.blocks() as usize / 2,
        band_of(first.format, pairs),
    );
    let params = GemmParams {
        segments,
        plane,
        y,
        residual,
        tokens: tokens as i32,
        blocks: blocks as i32,
        width: width as i32,
        tiles: tiles as i32,
        steps: steps as i32,
        parts: parts as i32,
        cut,
    };
    let few = few::columns(tokens);
    if let Some(columns) = few.filter(|_| quantised) {
        let name = if bf16 {
            "linear_few_quantised16"
        } else {
            "linear_few_quantised"
        };
        let launch = few::quantised_launch(columns, (tiles, parts));
        return gpu.launch(&format!("{name}_{columns}"), launch, &params);
    }
    if quantised {
        if parts != 1 || (residual != 0 && residual != y) {
            return Err(KernelError::Unsupported(
                "products of quantised activations are one part, added to what lies in its place".into(),
            ));
        }
        let name = if bf16 {
            "linear_quantised_bf16"
        } else {
            "linear_quantised_f32"
        };
        let work = pairs * tokens.div_ceil(WIDE_COLUMNS);
        return gpu.launch(name, quantised_launch(gpu, work, 3, LEAVING_BYTES), &params);
    }
    let whole_tiles = weights.iter().all(|weight| weight.rows % 16 == 0);
    if tokens > GEMM_COLUMNS && parts == 1 && first.format != Format::F32 && whole_tiles {
        let (format, shares) = (first.format, cut.shares(pairs, tokens));
        // Results leave beside the next products as BF16, or are added where they lie.
        let staged = bf16 || (format != Format::F16 && residual != 0 && residual == y);
        let (name, shared) = match (staged, format) {
            (true, Format::Bf16) => (if bf16 { "rows" } else { "rows_add" }, rows_shared_bytes()),
            (true, _) => (
                if bf16 { "wide16" } else { "wide_add" },
                staged_shared_bytes(format),
            ),
            (false, _) => ("wide", wide_shared_bytes(format) + OUT_BYTES as usize),
        };
        let launch = pairs_launch(gpu, shares, shared);
        return gpu.launch(&format!("linear_{name}_{}", format.name()), launch, &params);
    }
    if let Some(columns) = few.filter(|_| few::has(first.format)) {
        let name = if bf16 { "linear_few16" } else { "linear_few" };
        let launch = few::launch(gpu, first.format, columns, (tiles, parts));
        return gpu.launch(
            &format!("{name}_{}_{columns}", first.format.name()),
            launch,
            &params,
        );
    }
    let work = (tiles * 16).div_ceil(GEMM_ROWS) * tokens.div_ceil(GEMM_COLUMNS) * parts;
    let launch = gemm_launch(gpu, first.format, work);
    gpu.launch(&format!("linear_gemm_{}", first.format.name()), launch, &params)
}
