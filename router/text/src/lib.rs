//! Text to tokens and back: tokenizer, chat template, output parsers, stop strings, grammars.
//!
//! A pure library: synchronous, no I/O but reading the checkpoint's small files at start, no clock but the one that
//! bounds templates and grammars. `Text` is the face that the router uses, one per model, from its pool of text
//! threads; the modules below it can be used alone.
//!
//! What must stay true: nothing a client sends makes anything but a `TextError::Request`; every amount of work that
//! a client can cause has a bound; the result of parsing output never depends on how it was cut.

pub mod chat;
mod clock;
pub mod detokenize;
mod error;
#[cfg(test)]
mod fuzz;
pub mod generation_config;
pub mod grammar;
pub mod json;
pub mod output;
pub mod parse;
pub mod prompt;
pub mod stop;
pub mod template;
#[cfg(test)]
mod testing;
mod text;
pub mod tokenizer;

pub use error::{Result, TextError};
pub use text::{ChatOutput, RenderedChat, Text};
