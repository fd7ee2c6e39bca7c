//! Arithmetic of models and clusters: what a model is (as data), what its tensors weigh, where its experts go,
//! what fits into memory. Pure: the only I/O in this crate is reading `config.json`.
//!
//! Must stay true: no number read from a file is used for an allocation or a product before it was checked
//! against the limits in [`limits`]; every error names the field, the value and what to do.

pub mod config;
pub mod error;
pub mod families;
pub mod fields;
pub mod limits;
pub mod model;
pub mod pattern;
pub mod placement;
pub mod quant;

pub use error::PlanError;
