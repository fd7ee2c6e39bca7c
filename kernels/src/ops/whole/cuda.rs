//! Launch of `one.cu`: which models it serves, its table of layers and its parameters.

use crate::backend::{KvDtype, Result};
use crate::cuda::workspace::{Slot, Workspace};
use crate::cuda::{Format, Gpu, Launch, Memory, as_bytes};
use crate::ops::attention::cuda::kv_name;
use crate::ops::route::cuda::{GATE_PARTS, MAX_EXPERTS};

/// 16 warps that compute, one that feeds them, and three that only complete its group.
const THREADS: u32 = 640;
const WARPS: usize = 16;
/// Bytes of `OneShared` at most, behind the rings.
const SHARED: usize = 57_344;
/// Bytes of an op's whole input in shared memory, and of the gate's part.
const IMAGE: usize = 24_576;
const GATE_IMAGE: usize = 2048;
const HEAD_DIM: usize = 128;
/// Bytes of a warp's ring.
const RING: usize = 10_752;
const HEADS_HELD: usize = 8;
/// The lower warps have two blocks of 128 values of the residual stream, the upper ones one and an expert a thread.
const MAX_WIDTH: usize = 3072;
const MAX_SPLITS: usize = 32;
const MAX_OUTPUT_PARTS: usize = 3;
/// Cuts of a part's inputs in the gate's units of the output projection.
const FOLD_CUTS: usize = 2;
const HALF_SLOTS: usize = 4;
/// Tiles of 16 tokens of one block's share of a context, and runs of a warp in one layer.
const MAX_TILES: usize = 1024;
const MAX_ENTRIES: usize = 32;
/// 4-byte words of a line of the cache: each op's counter has one of its own.
const LINE_WORDS: usize = 32;
/// Ops of a layer and the step, and what is measured of each: waiting, input, product, finish.
pub(crate) const TRACE: (usize, usize) = (7, 4);

/// Mirrors `OneLayer`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct OneLayer {
    /// q, k, v, o, gate, experts, the pages of keys and values, and the gate's weights times the output projection's.
    pub(crate) streams: [u64; 9],
    /// norm, q_norm, k_norm, moe_norm, bias.
    pub(crate) vectors: [u64; 5],
    /// A bit each: of q, k, v, o, and of the experts.
    pub(crate) bf16_scales: u32,
    pub(crate) unused: u32,
}

/// Mirrors `OneParams`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct OneParams {
    pub(crate) layer: u64,
    pub(crate) hidden: u64,
    pub(crate) position: u64,
    pub(crate) token_run: u64,
    pub(crate) tables: u64,
    pub(crate) turns: u64,
    pub(crate) projection: u64,
    pub(crate) squares: u64,
    pub(crate) partial: u64,
    pub(crate) partial_sums: u64,
    pub(crate) attended: u64,
    pub(crate) logits: u64,
    pub(crate) acted: u64,
    pub(crate) after: u64,
    /// Two arrays: the residual stream behind the last layer is their sum.
    pub(crate) result: u64,
    pub(crate) announced: u64,
    pub(crate) state: u64,
    pub(crate) trace: u64,
    pub(crate) expert_bytes: u64,
    pub(crate) up_offset: u64,
    pub(crate) down_offset: u64,
    pub(crate) layers: i32,
    pub(crate) width: i32,
    pub(crate) q_width: i32,
    pub(crate) kv_width: i32,
    pub(crate) inter: i32,
    pub(crate) experts: i32,
    pub(crate) k: i32,
    pub(crate) rotary: i32,
    pub(crate) table_stride: i32,
    pub(crate) page_tokens: i32,
    pub(crate) parts: i32,
    pub(crate) renormalize: i32,
    pub(crate) eps: f32,
    pub(crate) scale: f32,
    pub(crate) split_stride: i32,
    pub(crate) unused: i32,
}

/// What decides whether the kernel serves a model.
pub(crate) struct OneShape {
    pub(crate) dense: Format,
    pub(crate) gate: Format,
    pub(crate) experts: Format,
    pub(crate) kv: KvDtype,
    pub(crate) head_dim: usize,
    pub(crate) width: usize,
    pub(crate) q_width: usize,
    pub(crate) kv_width: usize,
    pub(crate) inter: usize,
    pub(crate) expert_count: usize,
    pub(crate) top_k: usize,
    pub(crate) rotary: usize,
}

/// A step of one token, ready to be queued.
pub(crate) struct One {
    pub(crate) params: OneParams,
    /// Contexts that the kernel serves are shorter.
    pub(crate) longest: usize,
    /// Of all layers, the gate's weights times the output projection's (`fold.cu`).
    _folded: Memory,
    kernel: String,
    shared: u32,
}

impl OneShape {
    /// Runs of weights that the busiest warp reads in one layer (`write_program`).
    fn entries(&self, blocks: usize) -> usize {
        let units = (self.q_width + 2 * self.kv_width) / 32;
        let output = (self.width / 32 + self.expert_count / 16 * FOLD_CUTS) * self.parts();
        let gate_up = self.top_k * self.inter / 32;
        units.div_ceil(blocks)
            + 1
            + output.div_ceil(blocks / self.parts() * self.parts())
            + 2
            + gate_up.div_ceil(blocks)
            + (self.width / 16).div_ceil(blocks / 2)
    }

    /// Cuts of the output projection's inputs: each is at most one head a warp.
    fn parts(&self) -> usize {
        (self.q_width / HEAD_DIM).div_ceil(WARPS)
    }

    /// Whether the kernel serves this model on a device of so many multiprocessors.
    pub(crate) fn fits(&self, blocks: usize) -> bool {
        let whole = [self.width, self.q_width, self.kv_width, self.inter];
        let slice = (self.width / 128).div_ceil(GATE_PARTS) * 128;
        self.head_dim == HEAD_DIM
            && whole.iter().all(|n| *n > 0 && n.is_multiple_of(128))
            && self.width <= MAX_WIDTH
            && self.q_width.is_multiple_of(self.kv_width)
            && self.q_width / self.kv_width <= HEADS_HELD
            && self.kv_width / HEAD_DIM <= blocks
            && blocks >= 2 * MAX_OUTPUT_PARTS
            && self.parts() <= MAX_OUTPUT_PARTS
            && self.entries(blocks) <= MAX_ENTRIES
            && self.gate == Format::F32
            && Format::Bf16.image_bytes(slice) <= GATE_IMAGE
            && self.dense.image_bytes(self.width) <= IMAGE
            && self.experts.image_bytes(self.width) <= IMAGE
            && HALF_SLOTS * self.experts.image_bytes(self.inter) <= IMAGE
            && self.expert_count.is_multiple_of(16)
            && self.expert_count <= MAX_EXPERTS
            && self.expert_count / 16 * GATE_PARTS <= blocks
            && self.top_k <= 2 * HALF_SLOTS
            && self.rotary <= HEAD_DIM
            // Pairs of neighbours lie in one half of a rotation.
            && self.rotary.is_multiple_of(4)
            && self.compiled()
    }

    /// The pairs of formats of `one.cu`.
    fn compiled(&self) -> bool {
        let pair = (self.dense, self.experts);
        let pairs = [
            (Format::Int4G128, Format::Int4G128),
            (Format::Fp8, Format::Fp8Experts),
            (Format::Bf16, Format::Int4G32),
            (Format::Bf16, Format::Bf16),
        ];
        pairs.contains(&pair) && matches!(self.kv, KvDtype::Bf16 | KvDtype::Fp8E4m3)
    }

    fn splits(&self, blocks: usize) -> usize {
        (blocks / (self.kv_width / HEAD_DIM)).min(MAX_SPLITS)
    }

    /// Values that blocks leave for each other: where each array of `OneParams` begins, and the bytes of all.
    fn values(&self, blocks: usize) -> ([u64; 10], usize) {
        let rows = self.kv_width / HEAD_DIM * self.splits(blocks);
        let projection = self.q_width + 2 * self.kv_width;
        let words = [
            projection,
            projection / 32,
            rows * HEADS_HELD * HEAD_DIM,
            rows * HEADS_HELD * 2,
            self.parts() * self.width,
            (GATE_PARTS + self.parts() * FOLD_CUTS) * MAX_EXPERTS,
            self.top_k * self.inter,
            2 * self.width,
            TRACE.0 * LINE_WORDS,
            1,
        ];
        let mut places = [0; 10];
        let mut end = 0;
        for (place, count) in places.iter_mut().zip(words) {
            *place = end as u64;
            end += (count * 4).next_multiple_of(128);
        }
        (places, end)
    }
}

impl One {
    /// `params` holds addresses and sizes of the step; the rest is filled in here. `folded`: what the layers' last streams
    /// lie in.
    pub(crate) fn new(
        gpu: &Gpu,
        workspace: &mut Workspace,
        shape: &OneShape,
        layers: &[OneLayer],
        folded: Memory,
        params: OneParams,
    ) -> Result<One> {
        let bytes = std::mem::size_of_val(layers);
        let table = workspace.get(gpu, Slot::OneLayers, bytes)?;
        if let Some(memory) = workspace.memory(Slot::OneLayers) {
            gpu.write(memory, 0, as_bytes(layers))?;
        }
        let blocks = gpu.blocks() as usize;
        let (places, bytes) = shape.values(blocks);
        let base = workspace.get(gpu, Slot::OneValues, bytes)?;
        // No layer has been computed: the last bit of every value is 0.
        if let Some(memory) = workspace.memory(Slot::OneValues) {
            memory.clear(&gpu.device, &gpu.stream, bytes)?;
        }
        let [
            projection,
            squares,
            partial,
            partial_sums,
            attended,
            logits,
            acted,
            after,
            announced,
            state,
        ] = places.map(|place| base + place);
        let params = OneParams {
            layer: table,
            layers: layers.len() as i32,
            projection,
            squares,
            partial,
            partial_sums,
            attended,
            logits,
            acted,
            after,
            announced,
            state,
            split_stride: shape.splits(blocks) as i32,
            width: shape.width as i32,
            q_width: shape.q_width as i32,
            kv_width: shape.kv_width as i32,
            inter: shape.inter as i32,
            experts: shape.expert_count as i32,
            k: shape.top_k as i32,
            rotary: shape.rotary as i32,
            parts: shape.parts() as i32,
            ..params
        };
        let name = |format: Format| format.name();
        Ok(One {
            params,
            _folded: folded,
            longest: (MAX_TILES - 1) * 16 * shape.splits(blocks),
            kernel: format!(
                "decode_one_{}_{}_{}",
                name(shape.dense),
                name(shape.experts),
                kv_name(shape.kv)?
            ),
            shared: (WARPS * RING + SHARED) as u32,
        })
    }

    pub(crate) fn queue(&self, gpu: &Gpu) -> Result<()> {
        // One block a multiprocessor: all of them are on the device together, as the barrier needs.
        let launch = Launch {
            grid: (gpu.blocks(), 1),
            threads: THREADS,
            shared: self.shared,
            overlap: true,
        };
        gpu.launch(&self.kernel, launch, &self.params)
    }
}
