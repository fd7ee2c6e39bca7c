//! The ops that `Backend` runs one by one: checks of sizes, places in the workspace, launches.
//!
//! Must stay true: an op wider than the few-token kernels goes in pieces of 128 tokens; nothing is launched before every
//! buffer that it names was found long enough.

mod attention;
mod experts;
mod head;
