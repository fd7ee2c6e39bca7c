//! Opens the device that was asked for. What this build or machine lacks is an error, never another device.

use conclave_kernels::backend::{Backend, Limits};
use conclave_kernels::cpu::CpuBackend;

use crate::error::{Result, WorkerError};
use crate::model::ModelError;

/// The kind of a device: what a worker says of itself, before the device is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    Cpu,
}

impl DeviceKind {
    /// `auto` takes the best that this build has.
    pub fn parse(device: &str) -> Result<DeviceKind> {
        match device {
            "auto" | "cpu" => Ok(DeviceKind::Cpu),
            _ => Err(WorkerError::config(
                "device",
                device,
                "this build has auto and cpu",
            )),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::Cpu => "cpu",
        }
    }

    /// Transports that ranks on such a device may use.
    pub fn transports(self) -> Vec<String> {
        match self {
            DeviceKind::Cpu => vec!["local".into(), "tcp".into()],
        }
    }

    pub fn open(self, limits: Limits, threads: usize) -> Result<Box<dyn Backend>> {
        match self {
            DeviceKind::Cpu => {
                let backend = CpuBackend::new(limits, threads, None).map_err(ModelError::from)?;
                Ok(Box::new(backend))
            }
        }
    }
}
