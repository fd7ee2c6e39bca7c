//! From a request's input to prompt tokens, and the calls that do only that.

use std::sync::Arc;

use conclave_proto::v1 as pb;
use tonic::Status;

use super::validate::{Checked, Input};
use super::{Context, errors};

/// A prompt, ready to be submitted.
pub struct Prompt {
    pub tokens: Arc<[u32]>,
    /// Token sequences that may not appear.
    pub bad_words: Vec<Vec<u32>>,
}

const NO_TOKENIZER: &str = "this router runs without a tokenizer (--skip-tokenizer-init); give token ids";

/// Does the text work of a request.
pub async fn prepare(_context: &Arc<Context>, checked: &mut Checked) -> Result<Prompt, Status> {
    let Input::Ids(ids) = &mut checked.prompt else {
        return Err(errors::invalid("prompt", "text", NO_TOKENIZER));
    };
    let mut tokens = std::mem::take(ids);
    truncate(&mut tokens, checked.truncate);
    Ok(Prompt {
        tokens: tokens.into(),
        bad_words: Vec::new(),
    })
}

fn truncate(tokens: &mut Vec<u32>, keep: Option<u32>) {
    if let Some(keep) = keep {
        tokens.drain(..tokens.len().saturating_sub(keep as usize));
    }
}

pub async fn tokenize(
    _context: &Arc<Context>,
    _request: pb::TokenizeRequest,
) -> Result<pb::TokenizeResponse, Status> {
    Err(errors::invalid("input", "text", NO_TOKENIZER))
}

pub async fn detokenize(
    _context: &Arc<Context>,
    _request: pb::DetokenizeRequest,
) -> Result<pb::DetokenizeResponse, Status> {
    Err(errors::invalid("token_ids", "set", NO_TOKENIZER))
}
