//! Where the checkpoint is: an argument or a flag.

use std::path::{Path, PathBuf};

use clap::Args;

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub struct CheckpointSettings {
    /// Directory of a Hugging Face checkpoint; without it, the bundled demo model.
    #[arg(value_name = "MODEL")]
    model_position: Option<PathBuf>,
    /// MODEL as a flag, for those whose scripts have one.
    #[arg(
        long,
        value_name = "MODEL",
        visible_alias = "model-path",
        conflicts_with = "model_position"
    )]
    model: Option<PathBuf>,
}

impl CheckpointSettings {
    /// `None`: the bundled model.
    pub fn path(&self) -> Option<&Path> {
        self.model_position.as_deref().or(self.model.as_deref())
    }
}
