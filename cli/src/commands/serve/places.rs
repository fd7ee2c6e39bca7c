//! How many workers `serve` starts, and on which device each runs: one per GPU where there are GPUs.

use anyhow::{Result, bail};
use conclave_worker::device::DeviceKind;

/// Local CPU workers where nothing says otherwise.
const DEFAULT_CPU_WORKERS: u32 = 2;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    pub workers: u32,
    /// Ordinals; empty: CPUs.
    gpus: Vec<u32>,
}

impl Places {
    /// `workers`: as asked for.
    pub fn choose(device: &str, workers: Option<u32>) -> Result<Places> {
        let ordinal = |kind: DeviceKind| match kind {
            DeviceKind::Cpu => None,
            DeviceKind::Cuda(ordinal) => Some(ordinal),
        };
        let kinds = DeviceKind::choose_all(device)?;
        let gpus = kinds.into_iter().filter_map(ordinal).collect();
        Places::on(gpus, workers)
    }

    fn on(gpus: Vec<u32>, workers: Option<u32>) -> Result<Places> {
        let workers = workers.unwrap_or(match gpus.len() {
            0 => DEFAULT_CPU_WORKERS,
            gpus => gpus as u32,
        });
        if workers == 0 {
            bail!("workers is 0: at least one is needed");
        }
        Ok(Places { workers, gpus })
    }

    /// As `--device` spells it. Workers beyond the number of GPUs share them.
    pub fn device_of(&self, rank: u32) -> String {
        match self.gpus.len() {
            0 => "cpu".into(),
            gpus => format!("cuda:{}", self.gpus[rank as usize % gpus]),
        }
    }

    /// They share its memory.
    pub fn workers_per_gpu(&self) -> u32 {
        match self.gpus.len() {
            0 => 1,
            gpus => self.workers.div_ceil(gpus as u32),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Places;

    #[test]
    fn a_worker_has_a_gpu_or_shares_one() {
        let cpu = Places::on(Vec::new(), None).expect("places");
        assert_eq!(
            (cpu.workers, cpu.device_of(1), cpu.workers_per_gpu()),
            (2, "cpu".into(), 1)
        );
        let gpus = Places::on(vec![0, 2], None).expect("places");
        assert_eq!(
            (gpus.workers, gpus.device_of(1), gpus.workers_per_gpu()),
            (2, "cuda:2".into(), 1)
        );
        let shared = Places::on(vec![0, 2], Some(3)).expect("places");
        assert_eq!(
            (shared.device_of(2), shared.workers_per_gpu()),
            ("cuda:0".into(), 2)
        );
        assert!(Places::on(Vec::new(), Some(0)).is_err());
    }
}
