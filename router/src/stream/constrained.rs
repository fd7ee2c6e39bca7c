//! Keeps one choice to its grammar: each token it brings moves the grammar on, and the mask of the token after it goes
//! to the sequencer, while the device works on other steps. Runs on the text pool's threads.
//!
//! Must stay true: the sequencer waits for exactly one mask for each token that is to come, and gets it, or the end of
//! the sequence. The state is a function of the tokens, so that preemption and lost workers change nothing.

use std::sync::Arc;
use std::time::Instant;

use conclave_router_core::api::{Delivered, SequenceId};
use conclave_text::TextError;
use conclave_text::grammar::{Grammar, GrammarMatcher};
use tokio::sync::mpsc;

use crate::metrics::Metrics;
use crate::sequencer::NextMask;

/// When a sequence ends by itself: no mask is wanted then.
pub struct Ends {
    pub stop_tokens: Arc<[u32]>,
    /// The first position at which a stop token may stand, if the grammar leaves others.
    pub earliest: u32,
    /// Prompt and new tokens.
    pub length: u32,
}

impl Ends {
    /// The mask of the token at `position`: without stop tokens if it comes too early for them. What the grammar
    /// demands is more than a wish for length: where it leaves nothing else, they stay.
    pub fn put_off(&self, mask: Arc<[u8]>, position: u32) -> Arc<[u8]> {
        if position >= self.earliest {
            return mask;
        }
        let mut without: Vec<u8> = mask.to_vec();
        for &token in self.stop_tokens.iter() {
            if let Some(byte) = without.get_mut(token as usize / 8) {
                *byte &= !(1 << (token % 8));
            }
        }
        match without.iter().all(|&byte| byte == 0) {
            true => mask,
            false => without.into(),
        }
    }
}

/// A choice and its grammar.
pub struct Constrained {
    matcher: GrammarMatcher,
    id: SequenceId,
    /// Where the next token will stand in the sequence.
    position: u32,
    ends: Ends,
    masks: mpsc::Sender<NextMask>,
}

impl Constrained {
    /// `position`: tokens of the prompt.
    pub fn new(
        grammar: &Grammar,
        id: SequenceId,
        position: u32,
        ends: Ends,
        masks: mpsc::Sender<NextMask>,
    ) -> Constrained {
        Constrained {
            matcher: grammar.matcher(),
            id,
            position,
            ends,
            masks,
        }
    }

    /// Takes new tokens and sends the mask of the next one. An error ends the choice: its grammar needed more work for
    /// one token than is allowed.
    pub fn follow(&mut self, tokens: &[Delivered], metrics: &Metrics) -> Result<(), TextError> {
        let began = Instant::now();
        for Delivered { token, .. } in tokens {
            self.position = self.position.saturating_add(1);
            if self.position >= self.ends.length || self.ends.stop_tokens.contains(token) {
                return Ok(());
            }
            self.matcher.consume(*token)?;
        }
        let mask = self.ends.put_off(self.matcher.mask()?, self.position);
        metrics.grammar_mask_time.observe(began.elapsed().as_secs_f64());
        let next = NextMask {
            id: self.id,
            position: self.position,
            mask,
        };
        // The sequencer takes at most one of each live sequence and never waits for this thread. If it is gone, so is
        // everything else.
        let _ = self.masks.blocking_send(next);
        Ok(())
    }
}
