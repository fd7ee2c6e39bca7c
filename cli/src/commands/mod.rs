//! What each subcommand does with its settings.

pub mod bench;
pub mod chat;
pub mod gateway;
pub mod generate;
pub mod plan;
pub mod router;
pub mod serve;
pub mod text;
pub mod verify;
pub mod worker;
