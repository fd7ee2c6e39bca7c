//! Whole steps without the host: embedding, layers and head queued at once, and for few tokens recorded as a graph.
//!
//! `few` serves decode (up to 128 tokens, or short prompts), `many` prefill. Must stay true: nothing here waits for the
//! device; everything that a recorded graph reads lies at addresses that never move (a move empties the graphs).

mod few;
mod halves;
mod many;
mod one;
mod recorded;
mod watch;

use conclave_plan::model::{LayerSpec, ModelSpec, QkNorm, Scoring};

use super::exchange::Exchange;
use super::exchange::group::{Cut, HALF_TOKENS};
use super::format::padded;
use super::plane::{plane_blocks, plane_bytes, quantised_bytes};
use super::step::{FEW_TOKENS, Step};
use super::workspace::Slot;
use super::{CudaBackend, KvCache, shape};
use crate::backend::{Buffer, ForwardLayer, ForwardModel, KernelError, Result};
use crate::ops::attention::cuda::{self as attention, AttentionParams, PrefillPlans};
use crate::ops::experts::cuda::{ExpertsParam, HALF_SLOTS};
use crate::ops::experts::many::{SortArea, sorted_rows};
use crate::ops::linear::cuda::{INLINE_TOKENS, INLINE_WIDTH};
use crate::ops::route::cuda::{Groups, RouteParams};
use crate::ops::whole::cuda::One;
use recorded::Graphs;

/// Tokens that `many` takes through attention at a time, and through the experts.
const ATTENTION_CHUNK: usize = 4096;
const EXPERTS_CHUNK: usize = 8192;

/// A layer with every handle resolved.
struct Layer {
    handles: ForwardLayer,
    norm: u64,
    q_norm: u64,
    k_norm: u64,
    moe_norm: u64,
    route: RouteParams,
    experts: ExpertsParam,
    format: super::Format,
    attention: AttentionParams,
}

/// Sizes that all layers share.
#[derive(Clone, Copy)]
struct Sizes {
    hidden: usize,
    heads: usize,
    q_width: usize,
    kv_width: usize,
    inter: usize,
    experts: usize,
    top_k: usize,
    vocab: usize,
    eps: f32,
    rotary: usize,
}

/// Where things lie.
#[derive(Clone, Copy)]
struct Places {
    normed: u64,
    acted: u64,
    projection: u64,
    squares: u64,
    gate_logits: u64,
    groups: Groups,
    route_arrived: u64,
    hidden: u64,
    halves: u64,
    attended: u64,
    queries: u64,
    expert_out: u64,
    ids: u64,
    weights: u64,
    turns: u64,
    plane: u64,
    attended_plane: u64,
    sorted_plane: u64,
    acted_plane: u64,
    /// 0 unless activations are quantised: of tokens (norm's or attention's result) and of sorted rows.
    quantised_plane: u64,
    quantised_sorted: u64,
    sort: SortArea,
    /// Blocks of the planes of tokens and of sorted rows.
    blocks: usize,
    sorted_blocks: usize,
}

/// How a step of at most 128 tokens is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Way {
    /// One token: one kernel.
    One,
    /// Up to four tokens: six kernels a layer that do norm, choice and sum themselves.
    Inline,
    Grouped,
}

pub(super) struct Forward {
    model: ForwardModel,
    /// Some experts are on other ranks: nothing runs without an exchange.
    partial: bool,
    layers: Vec<Layer>,
    sizes: Sizes,
    places: Places,
    /// One token as one kernel, where that serves the model, and whether it is wanted (`set_one`).
    one: Option<One>,
    use_one: bool,
    graphs: Graphs,
    /// The last step's hidden states are all in `places.hidden`.
    left_states: bool,
}

impl Sizes {
    fn of(spec: &ModelSpec, layer: &LayerSpec) -> Sizes {
        Sizes {
            hidden: spec.hidden,
            heads: layer.attention.heads,
            q_width: layer.attention.q_width(),
            kv_width: layer.attention.kv_width(),
            inter: layer.moe.intermediate,
            experts: layer.moe.experts,
            top_k: layer.moe.top_k,
            vocab: spec.vocab,
            eps: spec.rms_eps,
            rotary: layer.attention.rotary_dim,
        }
    }

    /// Whether the kernels that do norm, choice and sum themselves serve such a layer.
    fn inline(&self, layer: &LayerSpec) -> bool {
        let whole = layer.attention.qk_norm != QkNorm::PerHead
            && self.q_width.is_multiple_of(32)
            && self.kv_width.is_multiple_of(32);
        let narrow = self.hidden <= INLINE_WIDTH && self.hidden.is_multiple_of(2);
        let sigmoid = layer.moe.scoring == Scoring::Sigmoid;
        sigmoid && whole && narrow && self.top_k <= 2 * HALF_SLOTS
    }
}

impl CudaBackend {
    pub(super) fn prepare_forward(&mut self, model: ForwardModel) -> Result<bool> {
        const OP: &str = "forward";
        let spec = &model.spec;
        let Some(first) = spec.layers.first() else {
            return Ok(false);
        };
        let same = |layer: &LayerSpec| *layer == *first;
        if model.layers.len() != spec.layers.len() || !spec.layers.iter().all(same) {
            return Err(KernelError::Unsupported("the layers differ in shape".into()));
        }
        let sizes = Sizes::of(spec, first);
        let turns = Step::turns(
            &self.gpu,
            &mut self.workspace,
            sizes.rotary,
            first.attention.rope_theta,
        )?;
        let places = self.places(&sizes, turns)?;
        self.reserve_sampling(sizes.vocab)?;
        let mut layers = Vec::with_capacity(model.layers.len());
        let mut partial = false;
        for handles in &model.layers {
            self.cache(OP, handles.kv, &first.attention)?;
            let (q_norm, k_norm) = self.qk_norms(OP, &first.attention, &handles.attention)?;
            let block = self.expert_block(OP, handles.experts)?;
            if (block.hidden, block.inter) != (sizes.hidden, sizes.inter) || block.count > sizes.experts {
                return Err(shape(
                    OP,
                    "experts",
                    format!("{} [{}, {}]", block.count, block.inter, block.hidden),
                    "those of the layer",
                ));
            }
            partial |= block.count < sizes.experts;
            let (experts, format) = (block.param(), block.format);
            let cache = &self.caches[handles.kv.0 as usize];
            layers.push(Layer {
                handles: *handles,
                norm: self.vector(OP, handles.attention.norm, sizes.hidden)?,
                q_norm,
                k_norm,
                moe_norm: self.vector(OP, handles.moe_norm, sizes.hidden)?,
                route: self.route_params(OP, &first.moe, handles.selection_bias, places.gate_logits, 0)?,
                experts,
                format,
                attention: AttentionParams {
                    turns,
                    eps: sizes.eps,
                    rotary: sizes.rotary as i32,
                    ..attention::params(&self.gpu, &mut self.workspace, &self.step, cache, sizes.heads)?
                },
            });
        }
        let one = self.prepare_one(&model, &layers, &sizes, &places, partial)?;
        self.forward = Some(Forward {
            model,
            partial,
            layers,
            sizes,
            places,
            one,
            use_one: true,
            graphs: Graphs::default(),
            left_states: false,
        });
        Ok(true)
    }

    /// After the exchange has changed: sizes, addresses and recorded graphs anew.
    pub(super) fn reset_forward(&mut self) -> Result<()> {
        let Some(forward) = self.forward.take() else {
            return Ok(());
        };
        // With another placement the experts are others, and so is the model that will be set.
        let layers = &forward.model.layers;
        if layers
            .iter()
            .all(|layer| self.expert_block("forward", layer.experts).is_ok())
        {
            self.prepare_forward(forward.model)?;
        }
        Ok(())
    }

    /// Allocates the workspace of whole steps before the weights are there.
    pub(super) fn reserve_forward(&mut self, spec: &ModelSpec) -> Result<()> {
        let Some(first) = spec.layers.first() else {
            return Ok(());
        };
        let sizes = Sizes::of(spec, first);
        let turns = Step::turns(
            &self.gpu,
            &mut self.workspace,
            sizes.rotary,
            first.attention.rope_theta,
        )?;
        self.places(&sizes, turns)?;
        self.reserve_sampling(sizes.vocab)?;
        Ok(())
    }

    /// Sizes the whole workspace, so that no step allocates.
    fn places(&mut self, sizes: &Sizes, turns: u64) -> Result<Places> {
        let limit = self.limits.max_tokens;
        let few = FEW_TOKENS.min(limit.max(INLINE_TOKENS));
        let mut pairs = few * sizes.top_k;
        let width = sizes.q_width + 2 * sizes.kv_width;
        let many = if limit > FEW_TOKENS { limit } else { 0 };
        let (chunk, experts_chunk) = (many.min(ATTENTION_CHUNK), many.min(EXPERTS_CHUNK));
        let blocks = plane_blocks(chunk.max(experts_chunk).max(few));
        let mut sorted_tokens = experts_chunk;
        if let Some(exchange) = self.exchange() {
            let shape = exchange.shape()?;
            pairs = pairs.max(shape.few_rows() * sizes.top_k);
            sorted_tokens = sorted_tokens.max(shape.many_rows());
        }
        let sorted = match sorted_tokens {
            0 => 0,
            tokens => sorted_rows(tokens * sizes.top_k, sizes.experts),
        };
        let (hidden, inter) = (padded(sizes.hidden), padded(sizes.inter));
        let fp8 = self.fp8_activations && many > 0;
        let widest = hidden.max(padded(sizes.q_width));
        let mut get = |slot, bytes: usize| self.workspace.get(&self.gpu, slot, bytes);
        let per_kv = sizes.q_width / sizes.kv_width;
        let pieces = many.div_ceil(ATTENTION_CHUNK.min(HALF_TOKENS));
        get(
            Slot::PrefillBlocks,
            PrefillPlans::bytes(many, self.limits.max_runs, pieces, per_kv),
        )?;
        let groups = get(Slot::Groups, Groups::bytes(pairs, sizes.experts))?;
        let sort = get(Slot::Sort, SortArea::bytes(sorted_tokens, sizes.top_k))?;
        Ok(Places {
            normed: get(Slot::Normed, few * sizes.hidden * 4)?,
            acted: get(Slot::Acted, pairs * inter * 4)?,
            projection: get(
                Slot::Projection,
                few::parts_bytes(few, width).max(chunk * width * 4),
            )?,
            squares: get(Slot::Squares, INLINE_TOKENS * width / 32 * 4)?,
            gate_logits: get(
                Slot::GateLogits,
                few::parts_bytes(few, sizes.experts)
                    .max(many::GATE_PARTS * experts_chunk * sizes.experts * 4),
            )?,
            groups: Groups::at(groups, pairs, sizes.experts),
            route_arrived: get(Slot::RouteArrived, 4)?,
            hidden: get(Slot::Hidden, limit * sizes.hidden * 4)?,
            halves: get(
                Slot::Halves,
                few::parts_bytes(few.max(INLINE_TOKENS), sizes.hidden),
            )?,
            attended: get(Slot::Attended, few * sizes.q_width * 4)?,
            queries: get(
                Slot::Queries,
                (few.max(chunk) * 4).max(few * 4 + chunk * 2) * sizes.q_width,
            )?,
            expert_out: get(Slot::ExpertOut, pairs * sizes.hidden * 4)?,
            ids: get(Slot::ChosenIds, few.max(experts_chunk) * sizes.top_k * 4)?,
            weights: get(Slot::ChosenWeights, few.max(experts_chunk) * sizes.top_k * 4)?,
            turns,
            plane: get(Slot::Plane, plane_bytes(blocks, hidden))?,
            attended_plane: get(Slot::AttendedPlane, plane_bytes(blocks, padded(sizes.q_width)))?,
            sorted_plane: get(Slot::SortedPlane, plane_bytes(sorted / 8, hidden))?,
            acted_plane: get(Slot::ActedPlane, plane_bytes(sorted / 8, inter))?,
            quantised_plane: match fp8 {
                true => get(Slot::QuantisedPlane, quantised_bytes(blocks, widest))?,
                false => 0,
            },
            quantised_sorted: match fp8 {
                true => get(Slot::QuantisedSorted, quantised_bytes(sorted / 8, hidden))?,
                false => 0,
            },
            sort: SortArea::at(sort, sorted_tokens, sizes.top_k),
            blocks,
            sorted_blocks: sorted / 8,
        })
    }

    pub(super) fn run_forward(&mut self, logits: &Buffer) -> Result<bool> {
        let way = self.queue_forward(logits)?;
        if let Some(forward) = &mut self.forward {
            forward.left_states = way == Some(Way::Grouped);
        }
        Ok(way.is_some())
    }

    /// Logits of the rows that the batch names now, of the step that ran last.
    pub(super) fn run_head(&mut self, logits: &Buffer) -> Result<bool> {
        let rows = self.step.logit_count;
        let Some(forward) = self.forward.as_ref().filter(|forward| forward.left_states) else {
            return Ok(false);
        };
        let bytes = rows * forward.sizes.vocab * 4;
        let logits = self.memory_of("forward_rows", "logits", logits, bytes)?;
        few::more_rows(self, forward, rows, logits).map(|()| true)
    }

    /// How the step was queued, many tokens counting as `Grouped`; `None`: there is no model here.
    fn queue_forward(&mut self, logits: &Buffer) -> Result<Option<Way>> {
        const OP: &str = "forward";
        let (tokens, rows) = (self.step.tokens, self.step.logit_count);
        let Some(forward) = &self.forward else {
            return Ok(None);
        };
        let vocab = forward.sizes.vocab;
        let logits = self.memory_of(OP, "logits", logits, rows * vocab * 4)?;
        let cut = self.cut(tokens)?;
        if cut.is_none() && forward.partial {
            let what = "some experts are on other ranks and no exchange is connected";
            return Err(KernelError::Unsupported(what.into()));
        }
        if tokens == 0 && cut.is_none() {
            return Ok(Some(Way::Grouped));
        }
        for layer in &forward.layers {
            self.step
                .check_pages(OP, self.caches[layer.handles.kv.0 as usize].pages)?;
        }
        let (piece, pieces) = match cut {
            Some(Cut::Many { tokens, pieces }) => {
                many::queue(self, forward, (tokens, pieces), logits)?;
                return self.queued(Way::Grouped);
            }
            Some(Cut::Few { tokens, pieces }) => (tokens, pieces),
            None if tokens > FEW_TOKENS && !self.deterministic => {
                many::queue(
                    self,
                    forward,
                    (EXPERTS_CHUNK, tokens.div_ceil(EXPERTS_CHUNK)),
                    logits,
                )?;
                return Ok(Some(Way::Grouped));
            }
            None => (FEW_TOKENS, tokens.div_ceil(FEW_TOKENS)),
        };
        let grouped = self.deterministic || pieces > 1 || self.step.runs.len() != tokens;
        let way = match self.exchange() {
            _ if grouped => Way::Grouped,
            Some(exchange) => forward.exchanged_way(tokens, exchange),
            None => forward.way(tokens, self.step.runs[0].2 as usize, self.watched.is_some()),
        };
        let pieces = few::Pieces {
            tokens,
            each: piece,
            count: pieces,
            rows,
            way,
        };
        let recordable = self.exchange().is_none_or(|exchange| exchange.recordable());
        let observed = self.gpu.times.is_some() || self.watched.is_some();
        // A short prompt's step is one of thousands: it goes kernel by kernel.
        let is_decode = rows == tokens && self.step.runs.len() == tokens;
        if pieces.count > 1 || !recordable || observed || !is_decode {
            few::queue(self, forward, &pieces, logits)?;
            return self.queued(way);
        }
        self.launch_recorded(&pieces, logits)?;
        self.queued(way)
    }

    /// The whole step is on the stream.
    fn queued(&self, way: Way) -> Result<Option<Way>> {
        if let Some(exchange) = self.exchange() {
            exchange.queued(&self.gpu)?;
        }
        Ok(Some(way))
    }
}

impl Forward {
    /// The way of `tokens` decode tokens of different sequences; the first one at `position`. The one kernel does not tell
    /// what its gates said.
    fn way(&self, tokens: usize, position: usize, watched: bool) -> Way {
        let short = |one: &One| self.use_one && !watched && tokens == 1 && position < one.longest;
        match self.inline(tokens) {
            true if self.one.as_ref().is_some_and(short) => Way::One,
            true => Way::Inline,
            false => Way::Grouped,
        }
    }

    /// The same of a rank of several.
    fn exchanged_way(&self, tokens: usize, exchange: &dyn Exchange) -> Way {
        match tokens > 0 && exchange.chooses() && self.inline(tokens) {
            true => Way::Inline,
            false => Way::Grouped,
        }
    }

    /// Experts of a layer, on all ranks.
    pub(super) fn experts(&self) -> usize {
        self.sizes.experts
    }

    fn one_of(&self, way: Way) -> Option<&One> {
        self.one.as_ref().filter(|_| way == Way::One)
    }

    /// Whether the kernels that do norm, choice and sum themselves serve so many tokens.
    fn inline(&self, tokens: usize) -> bool {
        tokens <= INLINE_TOKENS && self.sizes.inline(&self.model.spec.layers[0])
    }
}

/// The caches' lookup that both walks need.
fn cache<'a>(backend: &'a CudaBackend, layer: &Layer) -> &'a KvCache {
    &backend.caches[layer.handles.kv.0 as usize]
}
