//! How much of an answer is held in memory when it is collected whole.

use conclave_proto::v1;
use http::StatusCode;

use crate::http::error::{ApiError, ApiResult};
use crate::upstream::Event;

/// Counts bytes against a bound.
pub(crate) struct Budget {
    used: usize,
    most: usize,
}

impl Budget {
    pub(crate) fn new(most: usize) -> Self {
        Self { used: 0, most }
    }

    /// # Errors
    /// With this event the answer is larger than allowed.
    pub(crate) fn take(&mut self, event: &Event) -> ApiResult<()> {
        self.used = self.used.saturating_add(weight(event));
        if self.used <= self.most {
            return Ok(());
        }
        let message = format!("the answer is larger than {} bytes: ask for a stream", self.most);
        Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message).code("answer_too_large"))
    }
}

/// What an event adds to memory, roughly: log-probabilities weigh the most.
fn weight(event: &Event) -> usize {
    const TOKEN: usize = std::mem::size_of::<v1::TokenLogprob>();
    let logprobs = |entries: &[v1::TokenLogprobs]| {
        entries
            .iter()
            .map(|entry| (entry.top.len() + 2) * TOKEN)
            .sum::<usize>()
    };
    match event {
        Event::Started(started) => started.prompt_token_ids.len() * 4 + logprobs(&started.prompt_logprobs),
        Event::Delta(delta) => {
            let calls = delta
                .tool_calls
                .iter()
                .map(|call| call.arguments.len())
                .sum::<usize>();
            let text = delta.text.len() + delta.reasoning.len();
            text + delta.token_ids.len() * 4 + calls + logprobs(&delta.logprobs)
        }
        Event::Finished(_) | Event::Usage(_) | Event::KeepAlive(_) => 0,
    }
}
