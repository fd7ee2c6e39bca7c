//! What becomes of a response once it is made.

use std::sync::Arc;

use bytes::Bytes;
use conclave_proto::v1;

use super::items;
use super::store::Turn;
use crate::app::App;
use crate::generate::Block;
use crate::http::auth::Caller;

/// Where it is kept; without a place, it is not.
pub(super) struct Keep {
    pub(super) place: Option<(Arc<App>, Caller)>,
    pub(super) earlier: Option<Arc<Turn>>,
    /// The request's own messages, without instructions: those hold for one response only.
    pub(super) input: Vec<v1::ChatMessage>,
}

impl Keep {
    pub(super) fn store(self, id: &str, blocks: &[Block], json: Bytes) {
        if let Some((app, caller)) = self.place {
            let messages = [self.input, items::messages(blocks)].concat();
            app.responses
                .put(id.to_owned(), caller, self.earlier, messages, json);
        }
    }

    #[cfg(test)]
    pub(super) fn nothing() -> Self {
        Self {
            place: None,
            earlier: None,
            input: Vec::new(),
        }
    }
}
