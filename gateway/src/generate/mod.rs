//! What every API does between its request and its answer: make the calls, read their events, count tokens.

mod blocks;
mod budget;
mod calls;
mod collect;
mod single;
mod stream;
mod tokens;

pub(crate) use self::blocks::{Block, Blocks, Change, Kind};
pub(crate) use self::calls::{CallEvents, events, opened};
pub(crate) use self::collect::{Answers, Choice, PromptAnswer, collect, stray, unfinished};
pub(crate) use self::single::{Single, single};
pub(crate) use self::stream::{Writer, respond};
pub(crate) use self::tokens::{Tokens, finish_error};
