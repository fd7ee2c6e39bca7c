//! Settings: one struct per subcommand in a file of its own, made of the groups that several of them share.
//!
//! A field's name is its key everywhere: `max_model_len` in a file, `CONCLAVE_MAX_MODEL_LEN` in the environment,
//! `--max-model-len` on the command line (see [`layers`](crate::layers)).

mod bench;
mod chat;
mod checkpoint;
mod device;
mod engine;
mod format;
mod gateway;
mod generate;
mod http;
mod log;
mod model;
mod parallel;
mod plan;
mod router;
mod serve;
mod text;
mod values;
mod verify;
mod worker;

pub use bench::{AgentSettings, Backend, BenchSettings, LoadSettings, Scenario};
pub use chat::ChatSettings;
pub use checkpoint::CheckpointSettings;
pub use device::{DeviceSettings, Fp8Activations};
pub use engine::{ClusterSettings, EngineSettings, GenerationConfig, Transport};
pub use format::FormatSettings;
pub use gateway::GatewaySettings;
pub use generate::GenerateSettings;
pub use http::{DrainSettings, HttpSettings};
pub use log::{LogFormat, LogSettings};
pub use model::{KvCacheDtype, LoadFormat, ModelSettings};
pub use parallel::ParallelSettings;
pub use plan::PlanSettings;
pub use router::RouterSettings;
pub use serve::ServeSettings;
pub use text::{EndedBy, ParseSettings, RenderSettings, TextSettings};
pub use verify::VerifySettings;
pub use worker::WorkerSettings;
