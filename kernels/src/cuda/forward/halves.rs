//! A long step of which two pieces are under way at once: while one is exchanged, the device computes the other.

use super::many::{choose, plane, ranges, work};
use super::{Forward, Layer};
use crate::backend::Result;
use crate::cuda::CudaBackend;
use crate::cuda::exchange::{Halves, ManyResults, Tokens};

/// The way to have two pieces of a step under way at once, if there is one and the step has several.
pub(super) fn halves(backend: &CudaBackend, (_, pieces): (usize, usize)) -> Option<&dyn Halves> {
    backend.exchange()?.halves().filter(|_| pieces > 1)
}

/// All layers, piece by piece: while one piece is exchanged, the device attends to the other or works for it. A piece's results
/// are added when the next piece needs its channel: by then they have come.
pub(super) fn in_halves(
    backend: &CudaBackend,
    forward: &Forward,
    halves: &dyn Halves,
    chunk: (usize, usize),
    attend: impl Fn(&Layer, usize, (usize, usize)) -> Result<()>,
) -> Result<()> {
    let (gpu, sizes, places) = (&backend.gpu, &forward.sizes, &forward.places);
    let Some(exchange) = backend.exchange() else {
        return Ok(());
    };
    let mut returning: [Option<(Tokens, ManyResults)>; 2] = [None, None];
    let all: Vec<_> = ranges(backend.step.tokens, chunk).collect();
    for (index, layer) in forward.layers.iter().enumerate() {
        for pair in all.chunks(2) {
            let mut sent = Vec::with_capacity(2);
            for &(piece, (first, end)) in pair {
                let hidden = places.hidden + (first * sizes.hidden * 4) as u64;
                if let Some((tokens, results)) = returning[piece % 2].take() {
                    halves.finish_combine(gpu, &tokens, &results)?;
                }
                let count = end - first;
                let plane = plane(backend, forward, piece, count);
                if count > 0 {
                    attend(layer, piece, (first, end))?;
                    choose(backend, forward, (index, layer), (count, plane), hidden)?;
                }
                let tokens = Tokens {
                    layer: index,
                    piece,
                    count,
                    ids: places.ids,
                    weights: places.weights,
                };
                halves.start_dispatch(gpu, &tokens, plane)?;
                sent.push((tokens, hidden));
            }
            for (tokens, hidden) in sent {
                let rows = halves.finish_dispatch(gpu, &tokens)?;
                let results = work(gpu, forward, layer, exchange, &rows, hidden)?;
                halves.start_combine(gpu, &tokens, &results)?;
                returning[tokens.piece % 2] = Some((tokens, results));
            }
        }
    }
    for (tokens, results) in returning.iter().flatten() {
        halves.finish_combine(gpu, tokens, results)?;
    }
    Ok(())
}
