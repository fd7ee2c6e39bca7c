//! Whole steps without the host: embedding, layers and head queued at once, and for few tokens recorded as a graph.
//!
//! `few` serves decode (up to 128 tokens, or short prompts), `many` prefill. Must stay true: nothing here waits for the
//! device; everything that a recorded graph reads lies at addresses that never move (a move empties the graphs).

mod few;
mod halves;
mod many;
mod one;
mod places;
mod recorded;
mod watch;

use conclave_plan::model::{LayerSpec, ModelSpec};

use super::exchange::Exchange;
use super::exchange::group::Cut;
use super::step::{FEW_TOKENS, Step};
use super::{CudaBackend, KvCache, shape};
use crate::backend::{Buffer, ForwardLayer, ForwardModel, KernelError, Result};
use crate::ops::attention::cuda::{self as attention, AttentionParams, Pages};
use crate::ops::experts::cuda::ExpertsParam;
use crate::ops::linear::cuda::INLINE_TOKENS;
use crate::ops::linear::tall::{self, TALL_TOKENS};
use crate::ops::qkv::cuda::{RopeParams, norm_kind};
use crate::ops::route::cuda::RouteParams;
use crate::ops::whole::cuda::One;
use places::{Places, Sizes};
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

/// How a step of at most 128 tokens is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Way {
    /// One token: one kernel.
    One,
    /// Up to four tokens: six kernels a layer that do norm, choice and sum themselves.
    Inline,
    /// 9 to 16 tokens of different sequences: eight kernels, attention makes its queries and the gate its norm.
    Short,
    Grouped,
}

pub(super) struct Forward {
    model: ForwardModel,
    /// Some experts are on other ranks: nothing runs without an exchange.
    partial: bool,
    layers: Vec<Layer>,
    sizes: Sizes,
    places: Places,
    /// The weights are such that `Way::Short` serves them.
    short: bool,
    /// One token as one kernel, where that serves the model, and whether it is wanted (`set_one`).
    one: Option<One>,
    use_one: bool,
    graphs: Graphs,
    /// The last step's hidden states are all in `places.hidden`.
    left_states: bool,
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
        let short =
            sizes.makes_queries(first) && sizes.hidden.is_multiple_of(32) && self.tall_layers(&model)?;
        let one = self.prepare_one(&model, &layers, &sizes, &places, partial)?;
        self.forward = Some(Forward {
            model,
            partial,
            short,
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

    /// Whether `linear_tall` takes the dense weights of all layers.
    fn tall_layers(&self, model: &ForwardModel) -> Result<bool> {
        for layer in &model.layers {
            let weights = &layer.attention;
            let [q, k, v, o] =
                [weights.q, weights.k, weights.v, weights.o].map(|id| self.linear("forward", id));
            if !tall::serves(&[q?, k?, v?]) || !tall::serves(&[o?]) {
                return Ok(false);
            }
        }
        Ok(true)
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

    pub(super) fn run_forward(&mut self, logits: &Buffer) -> Result<bool> {
        let way = self.queue_forward(logits)?;
        if let Some(forward) = &mut self.forward {
            forward.left_states = matches!(way, Some(Way::Grouped | Way::Short));
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
            false => self.way_of_several(tokens),
        }
    }

    /// The same of a rank of several.
    fn exchanged_way(&self, tokens: usize, exchange: &dyn Exchange) -> Way {
        match tokens > 0 && exchange.chooses() && self.inline(tokens) {
            true => Way::Inline,
            false => self.way_of_several(tokens),
        }
    }

    /// The way of decode tokens that are too many for `Way::Inline`.
    fn way_of_several(&self, tokens: usize) -> Way {
        match self.short && (few::PRODUCT_TOKENS..=TALL_TOKENS).contains(&tokens) {
            true => Way::Short,
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

/// The rotation of `count` tokens from `first` on, whose projections lie in `parts`: all queries F32.
fn rotation(
    backend: &CudaBackend,
    forward: &Forward,
    layer: &Layer,
    (first, count): (usize, usize),
    parts: usize,
) -> RopeParams {
    let (sizes, places, step) = (&forward.sizes, &forward.places, &backend.step);
    RopeParams {
        qkv: places.projection,
        parts: parts as i32,
        tokens: count as i32,
        heads: sizes.heads as i32,
        rotary: sizes.rotary as i32,
        norm: norm_kind(forward.model.spec.layers[0].attention.qk_norm),
        eps: sizes.eps,
        q_norm: layer.q_norm,
        k_norm: layer.k_norm,
        turns: places.turns,
        positions: step.positions() + first as u64 * 4,
        token_run: step.token_run() + first as u64 * 4,
        pages: Pages::new(cache(backend, layer), step),
        q: places.queries,
        first16: i32::MAX,
        ..RopeParams::default()
    }
}
