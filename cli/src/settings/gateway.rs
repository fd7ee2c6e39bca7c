//! `conclave gateway`.

use clap::Args;

use super::{DrainSettings, HttpSettings, LogSettings};

#[derive(Args, Clone, Debug)]
pub struct GatewaySettings {
    /// Addresses of routers, host:port or http://host:port.
    #[arg(long, value_name = "ADDR", num_args = 1.., default_value = "127.0.0.1:50051")]
    pub router: Vec<String>,
    #[command(flatten)]
    pub http: HttpSettings,
    #[command(flatten)]
    pub drain: DrainSettings,
    #[command(flatten)]
    pub log: LogSettings,
}
