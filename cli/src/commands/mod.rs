//! What each subcommand does with its settings.

pub mod generate;
pub mod plan;
