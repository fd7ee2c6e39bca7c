//! `conclave serve`.

use clap::Args;

use super::{
    ClusterSettings, DeviceSettings, DrainSettings, EngineSettings, HttpSettings, LogSettings, ModelSettings,
    ParallelSettings,
};

#[derive(Args, Clone, Debug)]
pub struct ServeSettings {
    #[command(flatten)]
    pub model: ModelSettings,
    #[command(flatten)]
    pub http: HttpSettings,
    /// Port of the gRPC API, on --host; 0 lets the system choose and prints it.
    #[arg(long, value_name = "PORT", default_value_t = 50051)]
    pub grpc_port: u16,
    #[command(flatten)]
    pub parallel: ParallelSettings,
    #[command(flatten)]
    pub engine: EngineSettings,
    #[command(flatten)]
    pub device: DeviceSettings,
    #[command(flatten)]
    pub cluster: ClusterSettings,
    #[command(flatten)]
    pub drain: DrainSettings,
    /// Started by `chat` or `bench`: end when standard input closes.
    #[arg(long, hide = true)]
    pub child: bool,
    #[command(flatten)]
    pub log: LogSettings,
}
