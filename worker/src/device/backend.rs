//! Which device a worker runs on, and its opening. What this build or machine lacks is an error that names it; only
//! `auto` chooses, and says why.

use conclave_kernels::backend::{Backend, Limits};
use conclave_kernels::cpu::CpuBackend;

use crate::error::{Result, WorkerError};
use crate::model::ModelError;
use crate::transport::TransportKind;

/// The kind of a device: what a worker says of itself, before the device is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    Cpu,
    /// By ordinal.
    Cuda(u32),
}

/// A GPU that this build can use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    pub ordinal: u32,
    pub name: String,
    pub memory_bytes: u64,
    pub uuid: String,
}

/// The GPUs of this machine that the kernels run on; the error says what is missing.
pub fn gpus() -> std::result::Result<Vec<Gpu>, String> {
    #[cfg(feature = "cuda")]
    {
        let all = conclave_kernels::cuda::devices().map_err(|error| error.to_string())?;
        let usable = all.iter().filter(|device| device.is_usable());
        let usable: Vec<Gpu> = usable
            .map(|device| Gpu {
                ordinal: device.ordinal as u32,
                name: device.name.clone(),
                memory_bytes: device.memory_bytes,
                uuid: device.uuid.clone(),
            })
            .collect();
        if usable.is_empty() {
            let found: Vec<&str> = all.iter().map(|device| device.name.as_str()).collect();
            return Err(format!(
                "no GPU of compute capability 9.0 (H100, H200); the driver shows {found:?}"
            ));
        }
        Ok(usable)
    }
    #[cfg(not(feature = "cuda"))]
    Err("this build has no CUDA kernels: they come with `cargo build --release --features cuda`".into())
}

impl DeviceKind {
    /// `auto` takes the first GPU if there is one, else the CPU, and logs why.
    pub fn choose(device: &str) -> Result<DeviceKind> {
        let wrong = |problem: String| WorkerError::config("device", device, problem);
        let ordinal = match device {
            "cpu" => return Ok(DeviceKind::Cpu),
            "auto" => {
                return Ok(match gpus() {
                    Ok(gpus) => DeviceKind::Cuda(gpus[0].ordinal),
                    Err(reason) => {
                        tracing::info!(reason, "device auto takes the CPU");
                        DeviceKind::Cpu
                    }
                });
            }
            "cuda" => None,
            _ => match device.strip_prefix("cuda:").map(str::parse::<u32>) {
                Some(Ok(ordinal)) => Some(ordinal),
                _ => return Err(wrong("it is one of auto, cpu, cuda, cuda:N".into())),
            },
        };
        let gpus = gpus().map_err(wrong)?;
        let ordinal = ordinal.unwrap_or(gpus[0].ordinal);
        if gpus.iter().all(|gpu| gpu.ordinal != ordinal) {
            let usable: Vec<u32> = gpus.iter().map(|gpu| gpu.ordinal).collect();
            return Err(wrong(format!("there is no such GPU; usable ones are {usable:?}")));
        }
        Ok(DeviceKind::Cuda(ordinal))
    }

    /// All that `device` names, for ranks to share: every usable GPU unless one was chosen by its number.
    pub fn choose_all(device: &str) -> Result<Vec<DeviceKind>> {
        let first = DeviceKind::choose(device)?;
        if first == DeviceKind::Cpu || device.starts_with("cuda:") {
            return Ok(vec![first]);
        }
        let gpus = gpus().map_err(|problem| WorkerError::config("device", device, problem))?;
        Ok(gpus.iter().map(|gpu| DeviceKind::Cuda(gpu.ordinal)).collect())
    }

    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Cuda(_) => "cuda",
        }
    }

    /// Transports that ranks on such a device may use.
    pub fn transports(self) -> Vec<String> {
        let every_device = [TransportKind::Local, TransportKind::Tcp];
        let kinds = every_device.into_iter().chain(self.between_gpus());
        kinds.map(|kind| kind.name().to_owned()).collect()
    }

    /// Transports that a GPU and its libraries add; `auto` takes them before tcp.
    fn between_gpus(self) -> Vec<TransportKind> {
        #[cfg(feature = "cuda")]
        if let DeviceKind::Cuda(_) = self {
            let nccl = conclave_kernels::cuda::exchange::nccl::Nccl::open();
            match &nccl {
                Ok(nccl) => tracing::info!(version = %nccl.version, "NCCL"),
                Err(reason) => tracing::info!(%reason, "without NCCL"),
            }
            let nccl = nccl.is_ok().then_some(TransportKind::Nccl);
            return [TransportKind::Ipc].into_iter().chain(nccl).collect();
        }
        Vec::new()
    }

    pub fn open(self, limits: Limits, threads: usize) -> Result<Box<dyn Backend>> {
        match self {
            DeviceKind::Cpu => {
                let backend = CpuBackend::new(limits, threads, None).map_err(ModelError::from)?;
                Ok(Box::new(backend))
            }
            #[cfg(feature = "cuda")]
            DeviceKind::Cuda(ordinal) => {
                let backend = conclave_kernels::cuda::CudaBackend::new(limits, ordinal as i32);
                Ok(Box::new(backend.map_err(ModelError::from)?))
            }
            #[cfg(not(feature = "cuda"))]
            DeviceKind::Cuda(_) => Err(WorkerError::config(
                "device",
                "cuda",
                "this build has no CUDA kernels: they come with `cargo build --release --features cuda`",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::DeviceKind;

    #[test]
    fn devices_are_named_and_what_is_missing_is_told() {
        assert_eq!(DeviceKind::choose("cpu").unwrap(), DeviceKind::Cpu);
        for device in ["gpu", "cuda:", "cuda:x", "cuda:-1", ""] {
            let error = DeviceKind::choose(device).unwrap_err().to_string();
            assert!(error.contains("auto, cpu, cuda, cuda:N"), "{error}");
        }
        if let Err(reason) = super::gpus() {
            assert_eq!(DeviceKind::choose("auto").unwrap(), DeviceKind::Cpu);
            let error = DeviceKind::choose("cuda").unwrap_err().to_string();
            assert!(error.contains(&reason), "{error}");
        }
    }
}
