//! Connections: accepting them, telling HTTP/1.1 from HTTP/2, and ending those that cost too much.
//!
//! hyper and its HTTP/2 layer leave several limits open; each is set here, by name, from [`crate::Limits`].

mod accept;
mod guarded;
mod head_scan;
mod tls;

pub(crate) use accept::{Connections, accept_loop};
pub(crate) use tls::{RELOAD_INTERVAL, Tls};
