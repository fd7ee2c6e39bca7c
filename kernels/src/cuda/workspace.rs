//! Device memory that ops share between them: grown when a weight or a batch first needs it, then fixed.

use super::{Gpu, Memory};
use crate::backend::Result;

/// What a piece of the workspace holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Normalised rows of few tokens.
    Normed,
    /// Rows between the two expert products.
    Acted,
    /// q, k and v before norm and rope.
    Projection,
    /// Sums of squares of the projection's units.
    Squares,
    /// The gate's logits, in parts.
    GateLogits,
    /// Attention splits: values, (maximum, sum), arrivals.
    Partial,
    PartialSums,
    Arrived,
    /// The groups of expert rows: count, groups, row_token, row_slot, input rows.
    Groups,
    RouteArrived,
    /// Sampling: rows' maxima, arrivals, specs, what rows list, tokens that are kept, tokens, log-probabilities.
    SampleTops,
    SampleArrived,
    Specs,
    SampleLists,
    SampleHistories,
    Tokens,
    SampleLogprobs,
    /// The forward pass's residual stream and its parts.
    Hidden,
    Halves,
    Attended,
    Queries,
    ExpertOut,
    ChosenIds,
    ChosenWeights,
    /// Many tokens: attention's runs and blocks, planes of tokens, of attention's result, of sorted rows and of
    /// activations, and the sort's lists.
    PrefillBlocks,
    Plane,
    AttendedPlane,
    SortedPlane,
    ActedPlane,
    /// The same quantised, if activations are.
    QuantisedPlane,
    QuantisedSorted,
    /// One token through all layers: table of layers, what blocks leave for each other, cycles of each op.
    OneLayers,
    OneValues,
    OneTrace,
    Sort,
}

const SLOTS: usize = Slot::Sort as usize + 1;

/// The turns per position of a rotation's pairs.
pub(crate) struct Turns {
    pub(crate) rotary: usize,
    pub(crate) theta: f64,
    pub(crate) memory: Memory,
}

pub(crate) struct Workspace {
    slots: [Option<Memory>; SLOTS],
    /// One for each rotation that some attention has; they never move.
    pub(crate) turns: Vec<Turns>,
    /// Changes whenever a piece moves: recorded graphs hold addresses.
    pub(crate) generation: u64,
}

impl Workspace {
    pub(crate) fn new(_: &Gpu) -> Result<Workspace> {
        Ok(Workspace {
            slots: [const { None }; SLOTS],
            turns: Vec::new(),
            generation: 0,
        })
    }

    /// The piece's address; it holds at least `bytes`, zeros when new.
    pub(crate) fn get(&mut self, gpu: &Gpu, slot: Slot, bytes: usize) -> Result<u64> {
        let place = &mut self.slots[slot as usize];
        if let Some(memory) = place
            && memory.bytes >= bytes
        {
            return Ok(memory.address);
        }
        gpu.stream.wait(&gpu.device)?;
        *place = None;
        let memory = gpu.alloc(bytes, "workspace")?;
        let address = memory.address;
        *place = Some(memory);
        self.generation += 1;
        Ok(address)
    }

    pub(crate) fn memory(&self, slot: Slot) -> Option<&Memory> {
        self.slots[slot as usize].as_ref()
    }
}
