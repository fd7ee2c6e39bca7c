//! One sequence on this rank.

use conclave_kernels::backend::SAMPLED;

use super::sampling::SlotSampling;

/// State of a running sequence.
#[derive(Clone, Debug)]
pub struct Slot {
    /// No other sequence of this worker has it, ever.
    pub(super) number: u64,
    pub(super) sampling: SlotSampling,
    pub(super) pages: Vec<u32>,
    /// All tokens up to `position`; empty unless sampling looks at them. The last may be `SAMPLED | row`, until its step is
    /// fetched.
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_tokens: u32,
    /// Position of the next token to run.
    pub(super) position: u32,
    /// Sampled, and not run yet.
    pub(super) last_sampled: Option<LastSampled>,
}

/// What a slot runs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LastSampled {
    Token(u32),
    /// Drawn on the device for this row of that step, which has not been fetched.
    Row {
        step: u64,
        row: u32,
    },
}

impl Slot {
    pub fn position(&self) -> u32 {
        self.position
    }

    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Whether what it runs next is known on the device only.
    pub(super) fn is_on_device(&self) -> bool {
        matches!(self.last_sampled, Some(LastSampled::Row { .. }))
    }

    /// `token` was drawn for `row`, and ran at `position` before it was known.
    pub(super) fn learn(&mut self, position: u32, row: u32, token: u32) {
        if let Some(place) = self.tokens.get_mut(position as usize)
            && *place == SAMPLED | row
        {
            *place = token;
        }
    }

    /// Takes in the tokens of a run.
    pub(super) fn advance(&mut self, tokens: &[u32]) {
        if self.sampling.needs_tokens {
            self.tokens.extend_from_slice(tokens);
        }
        self.position += tokens.len() as u32;
        self.last_sampled = None;
    }

    /// Tokens that may not be sampled at `position`, the next one.
    pub(super) fn forbidden(&self) -> Vec<u32> {
        let mut forbidden = Vec::new();
        if self.position < self.sampling.suppress_until {
            forbidden.extend_from_slice(&self.sampling.suppress);
        }
        for word in &self.sampling.bad_words {
            if let Some((last, before)) = word.split_last()
                && self.tokens.ends_with(before)
            {
                forbidden.push(*last);
            }
        }
        forbidden
    }
}
