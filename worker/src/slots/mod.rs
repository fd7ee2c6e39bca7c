//! Slots: what this rank knows of each sequence that runs on it, and how a step message changes it.
//!
//! A slot holds its page table, sampling parameters, the tokens (if sampling looks at them) and the position.
//! Pure bookkeeping: no device, no clock. Must stay true: a step is checked against all limits before the device
//! sees it; a bad one is an error with the field and the reason, never a panic and never an allocation beyond the
//! limits.

mod apply;
mod prepared;
mod run;
mod sampling;
mod slot;

pub use apply::Slots;
pub use prepared::Prepared;
pub use slot::Slot;

/// Bounds of this rank; what a step may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotLimits {
    pub max_slots: usize,
    /// Tokens of one step.
    pub max_tokens: usize,
    pub kv_pages: usize,
    pub page_tokens: usize,
    pub vocab: usize,
    /// Longest sequence.
    pub max_position: usize,
    pub layers: usize,
}

impl SlotLimits {
    /// Pages of the longest sequence.
    pub fn max_pages_per_slot(&self) -> usize {
        self.max_position.div_ceil(self.page_tokens).min(self.kv_pages)
    }
}

/// Why a step was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct StepError {
    /// As in the message: `runs[3].tokens`.
    pub field: String,
    pub problem: String,
    /// Whose part of the step it is about; `None`: nobody's.
    pub slot: Option<u32>,
}

impl StepError {
    pub(crate) fn new(field: impl Into<String>, problem: impl Into<String>) -> StepError {
        StepError {
            field: field.into(),
            problem: problem.into(),
            slot: None,
        }
    }

    /// The same, about a slot's part of the step.
    pub(super) fn of(self, slot: u32) -> StepError {
        StepError {
            slot: Some(slot),
            ..self
        }
    }
}

pub type Result<T> = std::result::Result<T, StepError>;
