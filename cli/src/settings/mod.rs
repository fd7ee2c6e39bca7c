//! Settings: one struct per subcommand in a file of its own, made of the groups that several of them share.
//!
//! A field's name is its key everywhere: `max_model_len` in a file, `CONCLAVE_MAX_MODEL_LEN` in the environment,
//! `--max-model-len` on the command line (see [`layers`](crate::layers)).

mod log;
mod model;
mod plan;

pub use log::{LogFormat, LogSettings};
pub use model::{KvCacheDtype, LoadFormat, ModelSettings};
pub use plan::PlanSettings;

/// A number above 0 and at most 1.
fn fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("it must be a number above 0 and at most 1".into()),
    }
}
