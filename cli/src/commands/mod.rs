//! What each subcommand does with its settings.

pub mod plan;
