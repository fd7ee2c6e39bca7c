//! Structured output: grammars compiled once per request, and masks over the vocabulary for each token.
//!
//! Built on llguidance, which bounds its own work by fuel; the bounds are set here, each with a test that reaches
//! it. A compiled grammar is immutable; a matcher follows one choice, and is rebuilt exactly by feeding it the
//! tokens generated so far, so it survives preemption and the loss of a router.

mod bounds;
mod constraint;
mod ebnf;
mod matcher;
mod refusal;
mod schema_bounds;
mod tools;
mod vocabulary;

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    panic_utils::catch_unwind,
};

use crate::{
    clock::processor_time,
    error::{Result, TextError},
    tokenizer::Tokenizer,
};

pub use constraint::{Constraint, MAX_CHOICES, MAX_CONSTRAINT_BYTES};
pub use matcher::GrammarMatcher;
pub(crate) use tools::Wrapping;
pub use tools::tool_constraint;

/// Bounds of a grammar's lexer and parser. Together they keep compilation under a second and some ten MB.
fn limits() -> ParserLimits {
    ParserLimits {
        // Building the lexer: about 20 ms of work.
        initial_lexer_fuel: 1_000_000,
        // One mask: about 14 ms of lexing and 2.5 ms of parsing at the very most.
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_items_in_row: 2_000,
        // 1 to 2 kB each.
        max_lexer_states: 30_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: true,
        // Errors go to clients: without the parser's whole state.
        verbose_errors: false,
    }
}

/// Compiles grammars for one vocabulary. Shared by all requests.
pub struct GrammarCompiler {
    factory: ParserFactory,
    eos: Arc<[u32]>,
    /// Every token with a text, eos apart: what may come while the output is still reasoning.
    free_mask: Arc<[u8]>,
}

/// A compiled constraint.
#[derive(Clone)]
pub struct Grammar {
    matcher: Matcher,
    eos: Arc<[u32]>,
    free_mask: Arc<[u8]>,
    reasoning_end: Option<u32>,
}

impl GrammarCompiler {
    /// `vocab_size`: how many logits the model has, which may be more than the tokenizer has tokens. `eos`: the
    /// tokens that may end an output.
    pub fn new(tokenizer: Arc<Tokenizer>, vocab_size: u32, eos: &[u32]) -> Result<Self> {
        let environment = vocabulary::environment(tokenizer, vocab_size, eos)?;
        let free_mask = vocabulary::free_mask(environment.tok_trie(), eos);
        let mut factory = ParserFactory::new_simple(&environment)
            .map_err(|error| TextError::request("structured_outputs", error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self {
            factory,
            eos: eos.into(),
            free_mask,
        })
    }

    /// Compiles a constraint. With `reasoning_end` the output begins with free reasoning that this token ends.
    /// An error names the request's field and says what is wrong with it.
    pub fn compile(&self, constraint: &Constraint, reasoning_end: Option<u32>) -> Result<Grammar> {
        let mut compiling = Duration::ZERO;
        self.compile_timed(constraint, reasoning_end, &mut compiling)
    }

    /// Adds the processor time of the compiling thread to `time`.
    fn compile_timed(
        &self,
        constraint: &Constraint,
        reasoning_end: Option<u32>,
        time: &mut Duration,
    ) -> Result<Grammar> {
        let grammar = constraint.to_grammar(reasoning_end.is_some())?;
        let mut matcher = self.build(grammar, time);
        let wrong = |error: &str| refusal::of(constraint, error);
        if let Some(error) = matcher.get_error() {
            return Err(wrong(&error));
        }
        let mask = matcher
            .compute_mask_or_eos()
            .map_err(|error| wrong(&error.to_string()))?;
        if mask.is_zero() {
            return Err(refusal::empty(constraint));
        }
        Ok(Grammar {
            matcher,
            eos: self.eos.clone(),
            free_mask: self.free_mask.clone(),
            reasoning_end,
        })
    }
}

impl GrammarCompiler {
    /// Runs the library on a thread with a stack as deep as `bounds` allows it to recurse. The library has been
    /// seen to panic on odd input; a client's grammar must not end the process.
    fn build(&self, grammar: TopLevelGrammar, time: &mut Duration) -> Matcher {
        let compile = || {
            let parser = AssertUnwindSafe(|| self.factory.create_parser(grammar));
            let matcher = Matcher::new(catch_unwind(parser));
            (matcher, processor_time())
        };
        let lost = |what: &str| Matcher::new(Err(anyhow::anyhow!("compiling failed: {what}")));
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("grammar".to_owned())
                .stack_size(bounds::STACK_BYTES)
                .spawn_scoped(scope, compile);
            match thread.map(std::thread::ScopedJoinHandle::join) {
                Ok(Ok((matcher, used))) => {
                    *time += used;
                    matcher
                }
                Ok(Err(_)) => lost("the compiler panicked"),
                Err(error) => lost(&error.to_string()),
            }
        })
    }
}

impl Grammar {
    /// A matcher for one choice, at its beginning.
    pub fn matcher(&self) -> GrammarMatcher {
        GrammarMatcher::new(self)
    }
}

#[cfg(test)]
mod tests;
