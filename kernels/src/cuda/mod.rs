//! The CUDA backend: the same ops on one Hopper GPU (H100, H200).
//!
//! `driver` and `kernels` are the only files that call the driver; `weights` turns checkpoints' rows into the streams
//! that `stream.cuh` describes; `step` holds what changes from step to step; each op's launch stands in its folder
//! beside its `.cu` files. May touch: the device, memory it allocated. Must stay true: no op allocates once `begin`
//! has been called with all weights uploaded; every kernel keeps the rule of dependent launch in `ptx.cuh`; every
//! size is checked on the host before a kernel sees it.

mod backend;
mod by_op;
mod devices;
mod driver;
mod dummy;
pub mod exchange;
mod experts;
pub(crate) mod format;
mod forward;
mod kernels;
mod kv;
mod loader;
mod made;
pub(crate) mod plane;
mod rows;
mod sampling;
pub(crate) mod step;
pub(crate) mod weights;
mod wide_cut;
pub(crate) mod workspace;

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;

pub use devices::{DeviceInfo, devices};
pub(crate) use driver::{Device, Event, Graph, Memory, Pinned, Stream};
pub use dummy::WeightKind;
pub(crate) use format::Format;
pub(crate) use kernels::{Kernels, Launch};
pub(crate) use kv::KvCache;
pub(crate) use rows::as_bytes;

use crate::backend::{Buffer, KernelError, Limits, Result};
use experts::ExpertBlock;
use forward::Forward;
use loader::Loader;
use sampling::Sampling;
use step::Step;
use weights::Linear;
use workspace::Workspace;

/// The device with its code and its one queue.
pub(crate) struct Gpu {
    /// Times of single launches, while somebody wants them.
    times: Option<RefCell<Vec<(String, Event, Event)>>>,
    pub(crate) kernels: Kernels,
    pub(crate) stream: Stream,
    pub(crate) device: Device,
}

impl Gpu {
    pub(crate) fn launch<P>(&self, name: &str, launch: Launch, params: &P) -> Result<()> {
        let Some(times) = &self.times else {
            return self
                .kernels
                .launch(&self.device, &self.stream, name, launch, params);
        };
        let (start, end) = (Event::new(&self.device)?, Event::new(&self.device)?);
        start.record(&self.device, &self.stream)?;
        self.kernels
            .launch(&self.device, &self.stream, name, launch, params)?;
        end.record(&self.device, &self.stream)?;
        times.borrow_mut().push((name.to_owned(), start, end));
        Ok(())
    }

    pub(crate) fn alloc(&self, bytes: usize, what: &str) -> Result<Memory> {
        Memory::new(&self.device, &self.stream, bytes, what)
    }

    pub(crate) fn write(&self, to: &Memory, offset: usize, from: &[u8]) -> Result<()> {
        to.write(&self.device, &self.stream, offset, from)
    }

    pub(crate) fn read(&self, from: &Memory, offset: usize, to: &mut [u8]) -> Result<()> {
        from.read(&self.device, &self.stream, offset, to)
    }

    pub(crate) fn blocks(&self) -> u32 {
        self.device.multiprocessors
    }
}

/// A [`crate::backend::Backend`] on one GPU.
pub struct CudaBackend {
    limits: Limits,
    buffers: HashMap<u64, Memory>,
    linears: Vec<Linear>,
    vectors: Vec<(Memory, usize)>,
    experts: Vec<Option<ExpertBlock>>,
    caches: Vec<KvCache>,
    step: Step,
    workspace: Workspace,
    loader: Loader,
    forward: Option<Forward>,
    sampling: Sampling,
    group: exchange::group::Group,
    /// Every sum in one order, whatever the batch.
    deterministic: bool,
    /// What the gates said, by layer, while somebody wants to know.
    watched: Option<RefCell<Vec<Vec<f32>>>>,
    /// Steps of many tokens multiply FP8 weights by activations of FP8, those of fewer dense ones.
    fp8_activations: bool,
    /// Width of the hidden state, from the last `route`.
    width: usize,
    gpu: Gpu,
}

impl CudaBackend {
    /// A backend on device `ordinal`. `Unsupported` says what is missing: driver, device or compute capability.
    pub fn new(limits: Limits, ordinal: i32) -> Result<CudaBackend> {
        if limits.page_tokens == 0 || !limits.page_tokens.is_multiple_of(step::TILE_TOKENS) {
            return Err(KernelError::Shape {
                op: "cuda backend",
                what: "tokens of a page",
                found: limits.page_tokens.to_string(),
                expected: format!("a multiple of {}", step::TILE_TOKENS),
            });
        }
        let device = Device::open(ordinal)?;
        let kernels = Kernels::load(&device)?;
        let stream = Stream::new(&device)?;
        let gpu = Gpu {
            times: None,
            kernels,
            stream,
            device,
        };
        Ok(CudaBackend {
            buffers: HashMap::new(),
            linears: Vec::new(),
            vectors: Vec::new(),
            experts: Vec::new(),
            caches: Vec::new(),
            step: Step::new(&gpu, &limits)?,
            workspace: Workspace::new(&gpu)?,
            loader: Loader::new(&gpu)?,
            forward: None,
            sampling: Sampling::new(&gpu, &limits)?,
            group: exchange::group::Group::default(),
            deterministic: false,
            watched: None,
            fp8_activations: false,
            width: 0,
            limits,
            gpu,
        })
    }

    /// Free and total bytes of the device's memory.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.gpu.device.enter()?;
        self.gpu.device.memory()
    }

    /// The buffer's memory, if it is one of this backend's and holds `bytes`.
    fn memory_of(&self, op: &'static str, what: &'static str, buffer: &Buffer, bytes: usize) -> Result<u64> {
        match self.buffers.get(&buffer.handle) {
            Some(memory) if memory.bytes >= bytes => Ok(memory.address),
            found => Err(KernelError::Shape {
                op,
                what,
                found: found.map_or("a buffer of another backend".into(), |memory| {
                    format!("{} bytes", memory.bytes)
                }),
                expected: format!("{bytes} bytes"),
            }),
        }
    }
}

impl fmt::Debug for CudaBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda ({})", self.gpu.device.name)
    }
}

/// Names the value that does not fit.
pub(crate) fn shape(
    op: &'static str,
    what: &'static str,
    found: impl ToString,
    expected: impl ToString,
) -> KernelError {
    KernelError::Shape {
        op,
        what,
        found: found.to_string(),
        expected: expected.to_string(),
    }
}
