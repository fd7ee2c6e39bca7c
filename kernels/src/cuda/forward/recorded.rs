//! Decode steps of up to 128 tokens as graphs: one for each number of tokens, recorded when the model is there, so that no
//! step of serving records or allocates. Steps with an exchange are recorded one by one while nothing is to be done, or when
//! they come: an epoch must not wait for all of them.

use std::collections::HashMap;

use super::few::{self, Pieces};
use super::{Forward, Way};
use crate::backend::{Batch, BatchRun, Buffer, KernelError, Result};
use crate::cuda::step::FEW_TOKENS;
use crate::cuda::{CudaBackend, Graph, shape};

/// Most graphs: every number of tokens, the lone one's two ways, and all of that again for another result buffer or
/// another state of the exchange.
const MOST: usize = 2 * FEW_TOKENS + 2;

/// What a graph depends on: number of tokens, their way, the result buffer, the exchange's state.
type Key = (usize, Way, u64, usize);

#[derive(Default)]
pub(super) struct Graphs {
    graphs: HashMap<Key, Graph>,
    /// Of the workspace: graphs hold its addresses.
    generation: u64,
    /// `record_one` has recorded all.
    complete: bool,
}

impl Graphs {
    pub(super) fn clear(&mut self) {
        self.graphs.clear();
        self.complete = false;
    }

    fn holds(&self, key: &Key, generation: u64) -> bool {
        self.generation == generation && self.graphs.contains_key(key)
    }
}

impl CudaBackend {
    /// Launches the step that has begun, whose tokens are one a sequence.
    pub(super) fn launch_recorded(&mut self, pieces: &Pieces, logits: u64) -> Result<()> {
        let recorded = self.exchange().map_or(0, |exchange| exchange.recorded());
        let key = (pieces.tokens, pieces.way, logits, recorded);
        self.record(key, pieces)?;
        match self
            .forward
            .as_ref()
            .and_then(|forward| forward.graphs.graphs.get(&key))
        {
            Some(graph) => graph.launch(&self.gpu.device, &self.gpu.stream),
            None => Err(shape("forward", "recorded step", "absent", "present")),
        }
    }

    /// Whether it was not there.
    fn record(&mut self, key: Key, pieces: &Pieces) -> Result<bool> {
        let Some(forward) = &self.forward else {
            return Ok(false);
        };
        let generation = self.workspace.generation;
        if forward.graphs.holds(&key, generation) {
            return Ok(false);
        }
        let queue = || few::queue(self, forward, pieces, key.2);
        let graph = self.gpu.stream.capture(&self.gpu.device, queue)?;
        if let Some(Forward { graphs, .. }) = &mut self.forward {
            if graphs.generation != generation || graphs.graphs.len() >= MOST {
                self.gpu.stream.wait(&self.gpu.device)?;
                graphs.clear();
                graphs.generation = generation;
            }
            graph.upload(&self.gpu.device, &self.gpu.stream)?;
            graphs.graphs.insert(key, graph);
        }
        Ok(true)
    }

    /// Records the decode steps of 1 to `most` sequences; returns how many were new.
    pub(in crate::cuda) fn record_decode(&mut self, logits: &Buffer, most: usize) -> Result<usize> {
        if self.exchange().is_some() {
            return Ok(0);
        }
        let most = most
            .min(FEW_TOKENS)
            .min(self.limits.max_runs)
            .min(self.limits.max_logit_rows)
            .min(self.limits.max_tokens);
        let mut new = 0;
        for tokens in 1..=most {
            let Some(vocab) = self.forward.as_ref().map(|forward| forward.sizes.vocab) else {
                return Ok(0);
            };
            let address = self.memory_of("record", "logits", logits, tokens * vocab * 4)?;
            // The lists on the device are those of no step; only their addresses are recorded.
            self.step.begin(&self.gpu, &first_positions(tokens))?;
            for way in self.decode_ways(tokens) {
                let pieces = Pieces {
                    tokens,
                    each: FEW_TOKENS,
                    count: 1,
                    rows: tokens,
                    way,
                };
                new += usize::from(self.record((tokens, way, address, 0), &pieces)?);
            }
        }
        self.gpu.stream.wait(&self.gpu.device)?;
        Ok(new)
    }

    /// Records one decode step of a rank of several that is not there yet, of at most `most` sequences, while no step is on its
    /// way; whether there was one. Recording asks nothing of the other ranks.
    pub(in crate::cuda) fn record_one(&mut self, logits: &Buffer, most: usize) -> Result<bool> {
        let Some((few, ranks)) = self.exchange().and_then(|exchange| {
            let shape = exchange.shape().ok()?;
            Some((shape.few_tokens, shape.ranks))
        }) else {
            return Ok(false);
        };
        let generation = self.workspace.generation;
        let open = self.forward.as_ref().filter(|forward| {
            let graphs = &forward.graphs;
            !graphs.complete || graphs.generation != generation
        });
        let Some(vocab) = open.map(|forward| forward.sizes.vocab) else {
            return Ok(false);
        };
        let most = most
            .min(few)
            .min(self.limits.max_runs)
            .min(self.limits.max_logit_rows)
            .min(self.limits.max_tokens);
        for tokens in 0..=most {
            // A rank's share of a step without any tokens never comes alone.
            if tokens == 0 && ranks == 1 {
                continue;
            }
            let address = self.memory_of("record", "logits", logits, tokens * vocab * 4)?;
            let sizes = self
                .exchange()
                .map_or(Vec::new(), |exchange| exchange.recordings(tokens));
            for sizes in sizes {
                let (Some(exchange), Some(forward)) = (self.exchange(), &self.forward) else {
                    return Ok(false);
                };
                exchange.begin(&self.gpu, &sizes)?;
                let way = match self.deterministic {
                    true => Way::Grouped,
                    false => forward.exchanged_way(tokens, exchange),
                };
                let key = (tokens, way, address, exchange.recorded());
                if forward.graphs.holds(&key, self.workspace.generation) {
                    continue;
                }
                // The lists on the device are those of no step; only their addresses are recorded.
                self.step.begin(&self.gpu, &first_positions(tokens))?;
                let pieces = Pieces {
                    tokens,
                    each: few,
                    count: 1,
                    rows: tokens,
                    way,
                };
                let recorded = self.record(key, &pieces);
                // Of an epoch that ends meanwhile no more steps come.
                if matches!(recorded, Err(KernelError::Exchange { .. })) {
                    self.all_recorded();
                    return Ok(false);
                }
                recorded?;
                self.gpu.stream.wait(&self.gpu.device)?;
                return Ok(true);
            }
        }
        self.all_recorded();
        Ok(false)
    }

    fn all_recorded(&mut self) {
        if let Some(forward) = &mut self.forward {
            forward.graphs.complete = true;
        }
    }

    /// What `run_forward` may choose for so many.
    fn decode_ways(&self, tokens: usize) -> Vec<Way> {
        let Some(forward) = self.forward.as_ref().filter(|_| !self.deterministic) else {
            return vec![Way::Grouped];
        };
        let mut ways = vec![
            forward.way(tokens, 0, false),
            forward.way(tokens, usize::MAX, false),
        ];
        ways.dedup();
        ways
    }
}

/// A batch of so many sequences at their first position.
fn first_positions(tokens: usize) -> Batch {
    let run = |first| BatchRun {
        first,
        len: 1,
        pages: vec![0],
        position: 0,
    };
    Batch {
        ids: vec![0; tokens],
        positions: vec![0; tokens],
        runs: (0..tokens as u32).map(run).collect(),
        logit_rows: (0..tokens as u32).collect(),
    }
}
