//! What every endpoint shares: reading bodies, decoding JSON, errors, event streams, keys, request ids.

pub(crate) mod auth;
pub(crate) mod body;
pub(crate) mod context;
pub(crate) mod edge;
pub(crate) mod error;
pub(crate) mod json;
mod pieces;
pub(crate) mod reply;
pub(crate) mod sse;
