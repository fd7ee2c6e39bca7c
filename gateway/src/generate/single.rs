//! One choice, collected whole, as blocks.

use conclave_proto::v1;
use futures::StreamExt;

use super::blocks::{Block, Blocks};
use super::budget::Budget;
use super::calls::CallEvents;
use super::collect::unfinished;
use super::tokens::{Tokens, finish_error};
use crate::http::error::ApiResult;
use crate::upstream::Event;

/// A whole answer of one choice.
pub(crate) struct Single {
    pub(crate) model: String,
    pub(crate) blocks: Vec<Block>,
    pub(crate) finished: v1::Finished,
    pub(crate) tokens: Tokens,
}

/// Reads `events` to their end.
///
/// # Errors
/// Those of the call; a choice that failed or never finished; an answer of more than `bytes_max`.
pub(crate) async fn single(mut events: CallEvents, bytes_max: usize) -> ApiResult<Single> {
    let mut blocks = Blocks::default();
    let mut model = String::new();
    let mut tokens = Tokens::default();
    let mut finished = None;
    let mut budget = Budget::new(bytes_max);
    while let Some(event) = events.next().await {
        let (_, event) = event?;
        budget.take(&event)?;
        match event {
            Event::Started(started) => model = started.model,
            Event::Delta(delta) => drop(blocks.push(delta)?),
            Event::Finished(end) => finished = Some(end),
            Event::Usage(usage) => tokens.add(&usage),
            Event::KeepAlive(_) => {}
        }
    }
    let finished = finished.ok_or_else(|| unfinished(0))?;
    match finish_error(&finished) {
        Some(error) => Err(error),
        None => Ok(Single {
            model,
            blocks: blocks.list,
            finished,
            tokens,
        }),
    }
}
