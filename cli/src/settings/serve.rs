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
    /// Address of the gRPC API, which asks for no key and speaks no TLS; without it --host, or 127.0.0.1 if HTTP has
    /// keys or a certificate.
    #[arg(long, value_name = "HOST")]
    pub grpc_host: Option<String>,
    /// Port of the gRPC API; 0 lets the system choose and prints it.
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

impl ServeSettings {
    /// Where the gRPC API listens. What HTTP guards is not open beside it, unless that was asked for.
    pub fn grpc_host(&self) -> &str {
        match &self.grpc_host {
            Some(host) => host,
            None if self.http.needs_key() || self.http.tls_cert.is_some() => "127.0.0.1",
            None => &self.http.host,
        }
    }
}
