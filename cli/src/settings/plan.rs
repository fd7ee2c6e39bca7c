//! `conclave plan`.

use clap::Args;
use clap::builder::BoolishValueParser;
use conclave_plan::gpu::{Gpu, H200};

use super::{LogSettings, ModelSettings};

#[derive(Args, Clone, Debug)]
pub struct PlanSettings {
    #[command(flatten)]
    pub model: ModelSettings,
    /// Ranks of the group; without it, the fewest that hold the model.
    #[arg(long, visible_aliases = ["tensor-parallel-size", "tp", "ep-size"], value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub workers: Option<u32>,
    /// Device of each rank: h100 or h200.
    #[arg(long, default_value = H200.name)]
    pub gpu: Gpu,
    /// Share of the device's memory to use.
    #[arg(long, default_value_t = 1.0, value_parser = super::values::fraction)]
    pub gpu_memory_utilization: f64,
    /// Print JSON instead of tables.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub json: bool,
    #[command(flatten)]
    pub log: LogSettings,
}
