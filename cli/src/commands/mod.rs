//! What each subcommand does with its settings.

pub mod bench;
pub mod gateway;
pub mod generate;
pub mod plan;
pub mod router;
pub mod serve;
pub mod verify;
pub mod worker;
