//! The exchange of experts: every token to the ranks that own its experts, the results back to its owner.
//!
//! Contract of a [`Transport`], tested for every implementation by one suite:
//! - every rank calls `begin_step`, then for each layer `dispatch`, `next` until it gives nothing more (`give` after
//!   each piece of work that is staged), and `combine`; in the same order, also with no tokens;
//! - a token's row goes once to each destination rank; its results come back per (token, slot) in F32, so that the
//!   owner adds them in the order of slots: what comes out does not depend on the placement or on the number of
//!   ranks (invariant E1);
//! - every wait has a deadline and ends at once when the epoch is aborted; after any error the transport is of no
//!   further use and has hung up on its peers;
//! - nothing from a peer is used before it was checked against the capacity that all ranks declared.
//!
//! Keeps invariants E1 and E2 of ARCHITECTURE.md.

mod abort;
#[cfg_attr(not(feature = "cuda"), path = "no_device.rs")]
pub mod device;
mod error;
pub mod greeting;
pub mod group;
mod local;
pub mod nccl;
pub mod routing;
pub mod tcp;

use std::time::Duration;

use conclave_kernels::backend::{Backend, Buffer, ExpertRow};

pub use abort::Abort;
pub use error::{Result, TransportError, suspect_of};
pub use local::LocalTransport;

/// Longest wait for peers that a router may ask for.
pub const MAX_COLLECTIVE_DEADLINE_MS: u64 = 600_000;

/// What ranks exchange over; the router chooses for an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportKind {
    Local,
    Tcp,
    Ipc,
    Nccl,
}

impl TransportKind {
    pub const ALL: [TransportKind; 4] = [
        TransportKind::Local,
        TransportKind::Tcp,
        TransportKind::Ipc,
        TransportKind::Nccl,
    ];

    pub fn name(self) -> &'static str {
        match self {
            TransportKind::Local => "local",
            TransportKind::Tcp => "tcp",
            TransportKind::Ipc => "ipc",
            TransportKind::Nccl => "nccl",
        }
    }

    pub fn named(name: &str) -> Option<TransportKind> {
        TransportKind::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// This rank's tokens in one layer.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    pub layer: usize,
    pub count: usize,
    /// Experts per token.
    pub top_k: usize,
    /// F32 `[count, hidden]`.
    pub rows: &'a Buffer,
    /// U32 `[count, top_k]`, experts of each token.
    pub experts: &'a Buffer,
}

/// Rows for this rank's experts to compute.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    pub rows: &'a [ExpertRow],
    pub input: Input,
}

/// Where the rows of a piece of work lie and where its results go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// In the tokens' own rows; result i goes to row i of `y`, and `give` is not called.
    Own,
    /// In the staging buffer; results go to a buffer that is handed to `give`.
    Staged,
}

/// Sizes that all ranks agree on: they bound what a rank may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Tokens of one rank in one step, and rows of the staging buffer.
    pub max_tokens: usize,
    pub max_top_k: usize,
    pub hidden: usize,
}

impl Capacity {
    /// Rows of results that a piece of work may have.
    pub fn max_work_rows(&self) -> usize {
        self.max_tokens * self.max_top_k
    }

    pub fn row_bytes(&self) -> usize {
        self.hidden * 4
    }
}

/// See the head of this file.
pub trait Transport: Send {
    /// `local`, `tcp (2 of 3 ranks connected)`, …
    fn describe(&self) -> String;

    /// From the next step on no wait ends before `least`, nor before the epoch's deadline. Does nothing where a device
    /// waits, by the epoch's.
    fn set_patience(&mut self, _least: Duration) {}

    fn begin_step(&mut self, step: u64) -> Result<()>;

    /// Sends every token to the ranks of its experts and takes in what the others send here.
    fn dispatch(&mut self, backend: &mut dyn Backend, tokens: Tokens<'_>) -> Result<()>;

    /// The next rows to compute; their inputs are in `staging` (F32 `[max_tokens, hidden]`) unless they are the
    /// tokens' own.
    fn next<'a>(&'a mut self, backend: &mut dyn Backend, staging: &Buffer) -> Result<Option<Work<'a>>>;

    /// Results of the last piece of work, F32 `[rows, hidden]`.
    fn give(&mut self, backend: &mut dyn Backend, out: &Buffer) -> Result<()>;

    /// Waits for the results of this rank's tokens: `y` F32 `[count * top_k, hidden]`, token-major.
    fn combine(&mut self, backend: &mut dyn Backend, y: &Buffer) -> Result<()>;
}
