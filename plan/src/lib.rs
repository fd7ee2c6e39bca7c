//! Arithmetic of models and clusters: what a model is (as data), what its tensors weigh, where its experts go,
//! what fits into memory. Pure: the only I/O in this crate is reading `config.json`.
//!
//! Must stay true: no number read from a file is used for an allocation or a product before it was checked
//! against the limits in [`limits`]; every error names the field, the value and what to do.

pub mod balance;
pub mod config;
pub mod error;
pub mod families;
pub mod fields;
pub mod gpu;
pub mod limits;
pub mod memory;
pub mod model;
pub mod parameters;
pub mod pattern;
pub mod placement;
pub mod quant;
pub mod random;
pub mod refit;
pub mod roofline;
pub mod storage;

pub use error::PlanError;
