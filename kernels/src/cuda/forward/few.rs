//! A step of at most 128 tokens: six launches a layer for up to four decode tokens (`inline`), eight for 9 to 16 (`short`), ten for
//! other steps (`grouped`); with experts on other ranks (over `ipc`) eight, eight and ten.
//!
//! Dense weights go through passes of eight tokens with activations of 16 bits of mantissa, or, for more tokens, through
//! matrix products of BF16. Deterministic steps use the passes only: the order of every sum is then the same whatever
//! the batch, and longer steps are cut into pieces of 128 tokens.

mod grouped;
mod inline;
mod short;

use super::many::quantises;
use super::{Forward, Layer, Way, cache};
use crate::backend::Result;
use crate::cuda::format::padded;
use crate::cuda::plane::{
    GemmCall, MAX_PARTS, WHOLE_TOKENS, gives_bf16, linear_gemm, linear_gemm_bf16, parts_for, plane_blocks,
};
use crate::cuda::step::FEW_TOKENS;
use crate::cuda::weights::Linear;
use crate::cuda::{CudaBackend, Gpu};
use crate::ops::attention::cuda::{head_blocks, small_blocks};
use crate::ops::embed::cuda::embed;
use crate::ops::linear::cuda::{Input, LinearCall, linear};
use crate::ops::linear::tall::TALL_BLOCKS;
use crate::ops::rmsnorm::cuda::{NormInput, NormRows, norm_few};
use crate::ops::route::cuda::GATE_PARTS;

/// From so many tokens on dense weights are worth a matrix product instead of passes of eight.
pub(super) const PRODUCT_TOKENS: usize = 9;
/// Tokens of one pass, and so many tokens whose gate takes passes all the same.
const PASS_TOKENS: usize = 8;
const GATE_PASS_TOKENS: usize = 64;
/// Into how many parts the passes cut the output projection, whose rows alone do not occupy the device.
const OUTPUT_PARTS: usize = 2;

/// The residual stream between kernels: `x0`, and `more` arrays of one step's tokens from `x1` on, to be added.
#[derive(Clone, Copy)]
struct Stream {
    x0: u64,
    x1: u64,
    more: usize,
}

/// One piece of a step and how it is computed.
struct Piece<'a> {
    backend: &'a CudaBackend,
    forward: &'a Forward,
    gpu: &'a Gpu,
    /// First token, and how many.
    first: usize,
    tokens: usize,
    /// Dense weights through matrix products.
    products: bool,
    /// `Way::Short`.
    short: bool,
}

/// What the next layer wants of its input: the norm's weights, and whether the norm leaves quantised.
#[derive(Clone, Copy)]
struct Wanted {
    norm: u64,
    quantised: bool,
}

/// Bytes of the dense results' parts for `tokens` tokens of `width` values.
pub(super) fn parts_bytes(tokens: usize, width: usize) -> usize {
    MAX_PARTS * tokens * width * 4
}

/// How a step is cut.
pub(super) struct Pieces {
    pub(super) tokens: usize,
    /// Tokens of a piece but the last; in a group some pieces of a rank may be empty.
    pub(super) each: usize,
    pub(super) count: usize,
    pub(super) rows: usize,
    pub(super) way: Way,
}

pub(super) fn queue(backend: &CudaBackend, forward: &Forward, pieces: &Pieces, logits: u64) -> Result<()> {
    let mut stream = Stream {
        x0: forward.places.hidden,
        x1: 0,
        more: 0,
    };
    for index in 0..pieces.count {
        let first = (index * pieces.each).min(pieces.tokens);
        let count = pieces.each.min(pieces.tokens - first);
        // What attention leaves is only written up to its width: products read whole blocks of 128.
        let whole = forward.sizes.q_width.is_multiple_of(128);
        let products = count >= PRODUCT_TOKENS && !backend.deterministic && whole;
        let piece = Piece {
            backend,
            forward,
            gpu: &backend.gpu,
            first,
            tokens: count,
            products,
            short: pieces.way == Way::Short,
        };
        if count == 0 {
            piece.serve_others()?;
            continue;
        }
        stream = piece.layers(pieces.way)?;
    }
    // After several pieces `stream` is the whole hidden state, which holds all of them.
    head(backend, forward, stream, pieces.rows, logits)
}

/// Logits of the wanted rows of a step whose hidden states lie where both walks leave them.
pub(super) fn more_rows(backend: &CudaBackend, forward: &Forward, rows: usize, logits: u64) -> Result<()> {
    let stream = Stream {
        x0: forward.places.hidden,
        x1: 0,
        more: 0,
    };
    head(backend, forward, stream, rows, logits)
}

/// The final norm of the wanted rows, and their logits.
fn head(backend: &CudaBackend, forward: &Forward, stream: Stream, rows: usize, logits: u64) -> Result<()> {
    const OP: &str = "forward";
    let (gpu, sizes, places) = (&backend.gpu, &forward.sizes, &forward.places);
    let heads = [backend.linear(OP, forward.model.head)?];
    let norm = backend.vector(OP, forward.model.final_norm, sizes.hidden)?;
    for first in (0..rows).step_by(FEW_TOKENS) {
        let count = FEW_TOKENS.min(rows - first);
        let y = logits + (first * sizes.vocab * 4) as u64;
        let normed = NormRows {
            input: forward.norm_input(stream, backend.step.tokens.min(FEW_TOKENS), norm, 0),
            rows: backend.step.logit_rows() + first as u64 * 4,
            padded: padded(sizes.hidden) as i32,
            ..NormRows::default()
        };
        if count >= PRODUCT_TOKENS && !backend.deterministic {
            let (plane, blocks) = (places.plane, plane_blocks(FEW_TOKENS));
            norm_few(
                gpu,
                count,
                &NormRows {
                    plane,
                    plane_blocks: blocks as i32,
                    ..normed
                },
            )?;
            let call = GemmCall {
                quantised: false,
                weights: &heads,
                plane,
                blocks,
                tokens: count,
                parts: 1,
                y,
                residual: 0,
            };
            linear_gemm(gpu, &call)?;
        } else {
            norm_few(
                gpu,
                count,
                &NormRows {
                    normed: places.normed,
                    ..normed
                },
            )?;
            let input = Input::Rows(places.normed);
            let call = LinearCall {
                weights: &heads,
                input,
                tokens: count,
                parts: 1,
                y,
                residual: 0,
                squares: 0,
            };
            linear(gpu, &call)?;
        }
    }
    Ok(())
}

impl Forward {
    /// The norm of a residual stream of `tokens` tokens; `sum_out`: where the stream itself goes, if anywhere.
    fn norm_input(&self, stream: Stream, tokens: usize, weight: u64, sum_out: u64) -> NormInput {
        NormInput {
            x0: stream.x0,
            x1: stream.x1,
            weight,
            sum_out,
            eps: self.sizes.eps,
            k: self.sizes.hidden as i32,
            more: stream.more as i32,
            stride: (tokens * self.sizes.hidden) as i32,
        }
    }
}

impl Piece<'_> {
    /// Embedding and all layers; returns where the residual stream is.
    fn layers(&self, way: Way) -> Result<Stream> {
        const OP: &str = "forward";
        let (backend, forward, gpu) = (self.backend, self.forward, self.gpu);
        let (sizes, places, step) = (&forward.sizes, &forward.places, &backend.step);
        let table = backend.linear(OP, forward.model.embedding)?;
        let ids = step.ids() + self.first as u64 * 4;
        embed(
            gpu,
            table,
            ids,
            backend.sampled_tokens(),
            self.tokens,
            self.hidden(),
        )?;
        if let Some(one) = forward.one_of(way) {
            one.queue(gpu)?;
            return Ok(Stream {
                x0: one.params.result,
                x1: one.params.result + (sizes.hidden * 4) as u64,
                more: 1,
            });
        }
        let kv_heads = sizes.kv_width / (sizes.q_width / sizes.heads);
        let blocks = head_blocks(sizes.heads, kv_heads);
        let small = small_blocks(
            cache(backend, &forward.layers[0]),
            matches!(way, Way::Inline | Way::Short),
        );
        step.queue_plan(gpu, blocks, (self.first, self.tokens), small)?;
        let mut stream = Stream {
            x0: self.hidden(),
            x1: 0,
            more: 0,
        };
        if let (Way::Inline, Some(exchange)) = (way, backend.exchange()) {
            for (index, layer) in forward.layers.iter().enumerate() {
                self.inline_exchanged_layer(index, layer, exchange)?;
            }
            return Ok(stream);
        }
        if way == Way::Inline {
            for (index, layer) in forward.layers.iter().enumerate() {
                stream = self.inline_layer(index, layer, stream)?;
            }
            return Ok(stream);
        }
        for (index, layer) in forward.layers.iter().enumerate() {
            if index == 0 {
                self.norm(stream, self.wanted(layer)?)?;
            }
            let next = forward.layers.get(index + 1);
            let next = next.map(|layer| self.wanted(layer)).transpose()?;
            match way {
                Way::Short => self.short_layer(index, layer, next)?,
                _ => self.grouped_layer(index, layer, next)?,
            }
        }
        Ok(Stream {
            x0: places.hidden,
            x1: 0,
            more: 0,
        })
    }

    fn hidden(&self) -> u64 {
        self.forward.places.hidden + (self.first * self.forward.sizes.hidden * 4) as u64
    }

    /// Blocks of the planes of tokens.
    fn plane_blocks(&self) -> usize {
        match self.short {
            true => TALL_BLOCKS,
            false => plane_blocks(FEW_TOKENS),
        }
    }

    fn wanted(&self, layer: &Layer) -> Result<Wanted> {
        Ok(Wanted {
            norm: layer.norm,
            quantised: self.quantised(self.backend.linear("forward", layer.handles.attention.q)?),
        })
    }

    /// Whether products with this weight see quantised activations.
    fn quantised(&self, weight: &Linear) -> bool {
        self.products && self.tokens > WHOLE_TOKENS && quantises(self.forward, weight.format)
    }

    /// The first layer's norm, as its dense weights want it.
    fn norm(&self, stream: Stream, wanted: Wanted) -> Result<()> {
        let norm = NormRows {
            input: self.forward.norm_input(stream, self.tokens, wanted.norm, 0),
            ..self.norm_places(Some(wanted), false)
        };
        norm_few(self.gpu, self.tokens, &norm)
    }

    /// Where a norm goes: nowhere if it is not `wanted`.
    fn norm_places(&self, wanted: Option<Wanted>, for_experts: bool) -> NormRows {
        let places = &self.forward.places;
        let place = |place: u64, used: bool| if used { place } else { 0 };
        let (there, quantised) = (wanted.is_some(), wanted.is_some_and(|wanted| wanted.quantised));
        NormRows {
            normed: place(places.normed, there && (for_experts || !self.products)),
            plane: place(places.plane, there && self.products && !quantised),
            quantised: place(places.quantised_plane, quantised),
            plane_blocks: self.plane_blocks() as i32,
            padded: padded(self.forward.sizes.hidden) as i32,
            ..NormRows::default()
        }
    }

    /// A dense weight times the plane, or, if it sees quantised activations, the quantised one; returns the number of parts in `y` and whether they are
    /// BF16, which they are only if they may be `rounded`.
    fn product(&self, weights: &[&Linear], plane: u64, y: u64, rounded: bool) -> Result<(usize, bool)> {
        let quantised = self.quantised(weights[0]);
        let call = GemmCall {
            quantised,
            weights,
            plane: match quantised {
                true => self.forward.places.quantised_plane,
                false => plane,
            },
            blocks: plane_blocks(FEW_TOKENS),
            tokens: self.tokens,
            parts: parts_for(self.gpu, weights, self.tokens, quantised),
            y,
            residual: 0,
        };
        let bf16 = rounded && gives_bf16(weights, self.tokens);
        match bf16 {
            true => linear_gemm_bf16(self.gpu, &call)?,
            false => linear_gemm(self.gpu, &call)?,
        }
        Ok((call.parts, bf16))
    }

    /// The gate, whose few rows are too few tiles for a matrix product of few tokens: `normed` holds the tokens as well as `plane`.
    fn gate(&self, weight: &Linear, y: u64) -> Result<usize> {
        let places = &self.forward.places;
        if self.products && self.tokens > GATE_PASS_TOKENS {
            return Ok(self.product(&[weight], places.plane, y, false)?.0);
        }
        self.passes(&[weight], places.normed, self.gate_parts(weight), y, 0)
    }

    /// Into how many parts of its inputs passes cut the gate.
    fn gate_parts(&self, weight: &Linear) -> usize {
        let passes = self.tokens.div_ceil(PASS_TOKENS).next_power_of_two();
        let parts = match self.products {
            true => GATE_PARTS / passes,
            false => GATE_PARTS,
        };
        parts.min(weight.padded() / 128)
    }

    /// A dense weight times the rows, eight tokens at a time.
    fn passes(&self, weights: &[&Linear], rows: u64, parts: usize, y: u64, residual: u64) -> Result<usize> {
        let parts = parts.min(weights[0].padded() / 128);
        let input = Input::Rows(rows);
        linear(
            self.gpu,
            &LinearCall {
                weights,
                input,
                tokens: self.tokens,
                parts,
                y,
                residual,
                squares: 0,
            },
        )?;
        Ok(parts)
    }
}
