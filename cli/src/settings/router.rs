//! `conclave router`.

use clap::Args;

use super::{ClusterSettings, DrainSettings, EngineSettings, LogSettings, ModelSettings};

#[derive(Args, Clone, Debug)]
pub struct RouterSettings {
    #[command(flatten)]
    pub model: ModelSettings,
    /// Address to listen on for clients and gateways; this port asks for no key, which is the gateway's part.
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub host: String,
    /// Port of the gRPC API for clients and gateways; 0 lets the system choose and prints it.
    #[arg(long, value_name = "PORT", default_value_t = 50051)]
    pub grpc_port: u16,
    /// Address to listen on for workers.
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub cluster_host: String,
    /// Port for workers; 0 lets the system choose and prints it.
    #[arg(long, value_name = "PORT", default_value_t = 50052)]
    pub cluster_port: u16,
    /// Secret that workers present, at least 8 bytes; better given as CONCLAVE_CLUSTER_TOKEN than as a flag.
    #[arg(long, value_name = "TOKEN")]
    pub cluster_token: Option<String>,
    /// Start serving when so many workers have attached.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub expected_workers: u32,
    #[command(flatten)]
    pub engine: EngineSettings,
    #[command(flatten)]
    pub cluster: ClusterSettings,
    #[command(flatten)]
    pub drain: DrainSettings,
    #[command(flatten)]
    pub log: LogSettings,
}
