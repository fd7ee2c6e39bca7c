//! What the gates of a whole step said, brought to the host layer by layer for whoever compares it with a reference.
//!
//! Waits for the device, so steps that are watched are not recorded.

use crate::backend::Result;
use crate::cuda::CudaBackend;
use crate::cuda::workspace::Slot;

impl CudaBackend {
    /// Adds one layer's logits of the gate, of so many tokens: `parts` arrays that are to be added, as `load_logits` of
    /// `route.cuh` does.
    pub(super) fn watch_gate(
        &self,
        layer: usize,
        (tokens, experts): (usize, usize),
        parts: usize,
    ) -> Result<()> {
        let (Some(watched), Some(memory)) = (&self.watched, self.workspace.memory(Slot::GateLogits)) else {
            return Ok(());
        };
        let mut bytes = vec![0; parts * tokens * experts * 4];
        self.gpu.read(memory, 0, &mut bytes)?;
        let mut sums = vec![0f32; tokens * experts];
        for part in bytes.chunks(tokens * experts * 4) {
            for (sum, value) in sums.iter_mut().zip(part.as_chunks().0) {
                *sum += f32::from_le_bytes(*value);
            }
        }
        let mut layers = watched.borrow_mut();
        let least = layers.len().max(layer + 1);
        layers.resize_with(least, Vec::new);
        layers[layer].extend(sums);
        Ok(())
    }
}
