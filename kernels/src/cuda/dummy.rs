//! Random weights made on the device, for benchmarks at full size; bandwidth probe; kernel times.

use super::format::{TILE_ROWS, padded};
use super::weights::Linear;
use super::{CudaBackend, Event, Format, Launch, Memory};
use crate::backend::{ExpertsId, KvId, LinearId, Result, VectorId};
use crate::ops::attention::cuda::kv_bytes;

/// The format of a dummy weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightKind {
    /// INT4 with groups of 128.
    Int4,
    /// INT4 with groups of 32.
    Int4G32,
    /// FP8 e4m3 with blocks of 128 x 128.
    Fp8,
    Bf16,
    F32,
}

impl WeightKind {
    fn format(self) -> Format {
        match self {
            WeightKind::Int4 => Format::Int4G128,
            WeightKind::Int4G32 => Format::Int4G32,
            WeightKind::Fp8 => Format::Fp8,
            WeightKind::Bf16 => Format::Bf16,
            WeightKind::F32 => Format::F32,
        }
    }
}

/// Mirrors `DummyParams` of `repack.cu`.
#[repr(C)]
struct DummyParams {
    stream: u64,
    stages: u64,
    seed: u64,
    format: i32,
    scale: f32,
}

/// Mirrors `MultiplyParams` of `probe.cu`.
#[repr(C)]
struct MultiplyParams {
    sink: u64,
    rounds: i32,
}

/// Mirrors `ReadParams` of `probe.cu`.
#[repr(C)]
struct ReadParams {
    data: u64,
    units: u64,
    sink: u64,
}

impl CudaBackend {
    pub(super) fn fill(
        &self,
        address: u64,
        bytes: usize,
        format: Format,
        seed: u64,
        inputs: usize,
    ) -> Result<()> {
        // Outputs of unit variance for inputs of unit variance. A random FP8 byte below 2 has a root mean square of 0.62.
        let deviation = 1.0 / (inputs as f32).sqrt();
        let scale = if matches!(format, Format::Fp8 | Format::Fp8Experts) {
            deviation / 0.62
        } else {
            deviation
        };
        let stages = (bytes / format.repeated().1) as u64;
        let params = DummyParams {
            stream: address,
            stages,
            seed,
            format: format.id(),
            scale,
        };
        let launch = Launch {
            grid: (self.gpu.blocks() * 8, 1),
            threads: 256,
            shared: 0,
            overlap: false,
        };
        self.gpu.launch("dummy_stream", launch, &params)
    }

    /// A random linear weight.
    pub fn dummy_linear(
        &mut self,
        outputs: usize,
        inputs: usize,
        kind: WeightKind,
        seed: u64,
    ) -> Result<LinearId> {
        self.gpu.device.enter()?;
        let format = kind.format();
        let bytes = format.stream_bytes(outputs.div_ceil(TILE_ROWS), padded(inputs));
        let memory = Memory::raw(&self.gpu.device, bytes, "a weight")?;
        self.fill(memory.address, bytes, format, seed, inputs)?;
        self.linears.push(Linear {
            memory,
            format,
            rows: outputs,
            inputs,
            bf16_scales: false,
        });
        Ok(LinearId(self.linears.len() as u32 - 1))
    }

    /// Random experts.
    pub fn dummy_experts(
        &mut self,
        count: usize,
        hidden: usize,
        inter: usize,
        kind: WeightKind,
        seed: u64,
    ) -> Result<ExpertsId> {
        self.gpu.device.enter()?;
        let block = self.expert_memory(count, hidden, inter, kind.format(), false)?;
        self.fill(
            block.memory.address,
            block.memory.bytes,
            block.format,
            seed,
            hidden,
        )?;
        Ok(self.keep_experts(block))
    }

    /// A vector of `base` plus noise.
    pub fn dummy_vector(&mut self, len: usize, base: f32, noise: f32, seed: u64) -> Result<VectorId> {
        self.gpu.device.enter()?;
        let memory = Memory::raw(&self.gpu.device, len * 4, "a vector")?;
        let (mut address, mut count, mut base, mut noise, mut seed) =
            (memory.address, len as i32, base, noise, seed);
        let mut params = [
            std::ptr::from_mut(&mut address).cast(),
            std::ptr::from_mut(&mut count).cast(),
            std::ptr::from_mut(&mut base).cast(),
            std::ptr::from_mut(&mut noise).cast(),
            std::ptr::from_mut(&mut seed).cast(),
        ];
        let launch = Launch {
            grid: ((len as u32).div_ceil(256), 1),
            threads: 256,
            shared: 0,
            overlap: false,
        };
        self.gpu.kernels.launch_raw(
            &self.gpu.device,
            &self.gpu.stream,
            "dummy_vector",
            launch,
            &mut params,
        )?;
        self.vectors.push((memory, len));
        Ok(VectorId(self.vectors.len() as u32 - 1))
    }

    /// Fills a cache with random keys and values, so that attention over it is not over zeros.
    pub fn dummy_kv(&mut self, kv: KvId, seed: u64) -> Result<()> {
        let Some(cache) = self.caches.get(kv.0 as usize) else {
            return Ok(());
        };
        let format = if kv_bytes(cache.dtype) == 2 {
            Format::Bf16
        } else {
            Format::Fp8
        };
        for (memory, seed) in [(&cache.keys, seed), (&cache.values, !seed)] {
            self.fill(memory.address, memory.bytes, format, seed, 4)?;
        }
        Ok(())
    }

    /// Waits for everything queued.
    pub fn synchronize(&self) -> Result<()> {
        self.gpu.stream.wait(&self.gpu.device)
    }

    /// Bytes per second of reading `bytes` once, the best of `runs`.
    pub fn read_bandwidth(&mut self, bytes: usize, runs: usize) -> Result<f64> {
        self.gpu.device.enter()?;
        let memory = Memory::raw(&self.gpu.device, bytes, "bandwidth probe")?;
        self.fill(memory.address, bytes, Format::Bf16, 1, 64)?;
        let params = ReadParams {
            data: memory.address,
            units: bytes as u64 / 16,
            sink: memory.address,
        };
        let launch = Launch {
            grid: (self.gpu.blocks() * 4, 1),
            threads: 512,
            shared: 0,
            overlap: false,
        };
        let mut best = f64::INFINITY;
        for _ in 0..runs + 1 {
            best = best.min(self.timed(|backend| backend.gpu.launch("probe_read", launch, &params))?);
        }
        Ok(bytes as f64 / best)
    }

    /// Operations per second of BF16 products of random numbers, the best of `runs`.
    pub fn product_rate(&mut self, runs: usize) -> Result<f64> {
        /// Of one round of a block: 2 warpgroups, 2 sets, 8 products of 64 x 128 x 16.
        const ROUND: f64 = 2.0 * 2.0 * 8.0 * 2.0 * 64.0 * 128.0 * 16.0;
        const ROUNDS: i32 = 8192;
        self.gpu.device.enter()?;
        let sink = Memory::raw(&self.gpu.device, 16, "multiplication probe")?;
        let params = MultiplyParams {
            sink: sink.address,
            rounds: ROUNDS,
        };
        let launch = Launch {
            grid: (self.gpu.blocks(), 1),
            threads: 256,
            shared: 2 * 128 * 128 + 1024,
            overlap: false,
        };
        let mut best = f64::INFINITY;
        for _ in 0..runs + 1 {
            best = best.min(self.timed(|backend| backend.gpu.launch("probe_multiply", launch, &params))?);
        }
        Ok(f64::from(self.gpu.blocks()) * f64::from(ROUNDS) * ROUND / best)
    }

    /// Seconds that the device takes for what `work` queues.
    pub fn timed(&mut self, work: impl FnOnce(&mut CudaBackend) -> Result<()>) -> Result<f64> {
        self.gpu.device.enter()?;
        let (start, end) = (Event::new(&self.gpu.device)?, Event::new(&self.gpu.device)?);
        start.record(&self.gpu.device, &self.gpu.stream)?;
        work(self)?;
        end.record(&self.gpu.device, &self.gpu.stream)?;
        end.wait(&self.gpu.device)?;
        Ok(f64::from(end.since(&self.gpu.device, &start)?) / 1e3)
    }

    /// From now on every launch is timed by itself (and forward passes are not recorded as graphs), until `take_times`.
    pub fn time_kernels(&mut self) {
        self.gpu.times = Some(std::cell::RefCell::new(Vec::new()));
    }

    /// Kernels and their seconds since `time_kernels`, in order.
    pub fn take_times(&mut self) -> Result<Vec<(String, f64)>> {
        self.synchronize()?;
        let times = self
            .gpu
            .times
            .take()
            .map(std::cell::RefCell::into_inner)
            .unwrap_or_default();
        let seconds = |(name, start, end): (String, Event, Event)| {
            Ok((name, f64::from(end.since(&self.gpu.device, &start)?) / 1e3))
        };
        times.into_iter().map(seconds).collect()
    }

    /// The experts chosen for the first `tokens` tokens of the last step of 5 to 128 tokens, by layer's end.
    pub fn chosen(&self, tokens: usize, top_k: usize) -> Result<Vec<u32>> {
        let mut bytes = vec![0; tokens * top_k * 4];
        if let Some(memory) = self.workspace.memory(super::workspace::Slot::ChosenIds) {
            self.gpu.read(memory, 0, &mut bytes)?;
        }
        Ok(bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| u32::from_le_bytes(*b))
            .collect())
    }
}
