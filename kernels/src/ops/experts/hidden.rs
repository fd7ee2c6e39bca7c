//! `silu(gate) * up` of some rows and some intermediate values, packed for the down projection.

use crate::backend::Result;
use crate::cpu::engine::round;
use crate::cpu::memory::Memory;
use crate::ops::linear::TokensMut;
use crate::simd::{Kernel, LANES, Simd, math};

/// Intermediate values of a task, at most: a chunk of every format.
pub(crate) const HIDDEN_BLOCK: usize = 128;
/// Rows of a task that are in its scratch at a time.
pub(crate) const HIDDEN_ROWS: usize = 96;

/// Scratch of one thread: `[HIDDEN_ROWS, HIDDEN_BLOCK]` of gate and of up.
pub(crate) struct Hidden {
    pub(crate) gate: Memory,
    pub(crate) up: Memory,
}

impl Hidden {
    pub(crate) fn new() -> Result<Hidden> {
        let words = HIDDEN_ROWS * HIDDEN_BLOCK;
        Ok(Hidden {
            gate: Memory::words(words, "expert scratch")?,
            up: Memory::words(words, "expert scratch")?,
        })
    }
}

/// Packs `silu(gate) * up` of one row, intermediate values `first..first + gate.len()`.
pub(crate) struct Activate<'a, 'b> {
    pub(crate) gate: &'a mut [f32],
    pub(crate) up: &'a [f32],
    pub(crate) first: usize,
    /// To BF16 before.
    pub(crate) rounds: bool,
    pub(crate) to: &'a mut TokensMut<'b>,
}

impl Kernel for Activate<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (gates, gate_rest) = self.gate.as_chunks_mut::<LANES>();
        let (ups, up_rest) = self.up.as_chunks::<LANES>();
        for (gate, up) in gates.iter_mut().zip(ups) {
            s.store(s.mul(math::silu(s, s.load(gate)), s.load(up)), gate);
        }
        if !gate_rest.is_empty() {
            let (mut gate, mut up) = ([0.0; LANES], [0.0; LANES]);
            gate[..gate_rest.len()].copy_from_slice(gate_rest);
            up[..up_rest.len()].copy_from_slice(up_rest);
            s.store(s.mul(math::silu(s, s.load(&gate)), s.load(&up)), &mut gate);
            gate_rest.copy_from_slice(&gate[..gate_rest.len()]);
        }
        if self.rounds {
            round(self.gate);
        }
        self.to.put(s, self.first, self.gate);
    }
}
