//! How much of a GPU's memory is in use while a cluster serves.

use anyhow::Result;
use conclave_worker::device::{DeviceKind, gpus};
use tokio::process::Command;

/// Bytes in use on a GPU, as the driver's tool tells; nothing on a CPU, whose pages stay mapped once touched.
pub(super) struct DeviceMemory {
    /// The driver's name of the GPU: ordinals of this process may not be the tool's.
    uuid: Option<String>,
    pub(super) seen: Vec<u64>,
}

impl DeviceMemory {
    pub(super) fn new(device: &str) -> Result<DeviceMemory> {
        let uuid = match DeviceKind::choose(device)? {
            DeviceKind::Cpu => None,
            DeviceKind::Cuda(ordinal) => {
                let gpus = gpus().map_err(anyhow::Error::msg)?;
                gpus.into_iter()
                    .find(|gpu| gpu.ordinal == ordinal)
                    .map(|gpu| gpu.uuid)
            }
        };
        Ok(DeviceMemory {
            uuid,
            seen: Vec::new(),
        })
    }

    pub(super) async fn look(&mut self) {
        let Some(uuid) = &self.uuid else { return };
        let output = Command::new("nvidia-smi")
            .args([
                "--query-gpu=memory.used",
                "--format=csv,noheader,nounits",
                "-i",
                uuid,
            ])
            .output()
            .await;
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().parse::<u64>());
        if let Ok(Ok(mebibytes)) = text {
            self.seen.push(mebibytes << 20);
        }
    }

    /// At first, at most and at last.
    pub(super) fn figures(&self) -> Option<(u64, u64, u64)> {
        let seen = &self.seen;
        Some((*seen.first()?, *seen.iter().max()?, *seen.last()?))
    }
}
