//! One rank of an exchange without a model, for `gpu_exchange`: its experts multiply by a number each.

mod buffers;
mod measure;
mod queue;

use std::time::Duration;

use self::buffers::Buffers;
use super::control::Control;
use super::group::most_bytes;
use super::ipc::{Epoch, IpcExchange};
use super::nccl::{NcclExchange, UniqueId};
use super::peer::{PeerHandle, poke};
use super::{Exchange, ExchangeShape, StepSizes};
use crate::backend::{KernelError, Result};
use crate::cuda::format::padded;
use crate::cuda::{Device, Gpu, Graph, Kernels, Memory, Stream, as_bytes, shape};
use crate::ops::rmsnorm::cuda::{NormInput, NormRows, norm_rows};

/// Which family of kernels carries an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Few,
    Many,
    /// Many, as two pieces that are under way at once; not to be recorded.
    Halves,
}

/// Up to where an exchange is queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Only the dispatch: what a rank that dies inside leaves behind.
    Dispatch,
    /// Dispatch and combine, without the work in between: results are meaningless, times are not.
    Exchange,
    All,
}

/// This rank's tokens.
pub struct StationTokens<'a> {
    /// F32 `[count, hidden]`.
    pub rows: &'a [f32],
    /// `[count, top_k]`.
    pub ids: &'a [u32],
    pub weights: &'a [f32],
}

/// Recorded exchanges.
pub struct StationGraph(Graph);

/// What the ranks of an epoch are connected by.
#[derive(Clone, Copy)]
pub enum Peers<'a> {
    /// By rank.
    Ipc(&'a [PeerHandle]),
    Nccl(UniqueId),
    /// The communicator of the epoch before, whose ranks are the same and all well.
    Same,
}

enum Carrier {
    Ipc(Box<IpcExchange>),
    Nccl(Box<NcclExchange>),
}

pub struct Station {
    carrier: Carrier,
    buffers: Option<Buffers>,
    trace: Option<Memory>,
    gpu: Gpu,
}

impl Station {
    /// On device `ordinal`, for epochs of any of `shapes`; over NCCL, or between mapped buffers.
    pub fn open(ordinal: i32, shapes: &[ExchangeShape], nccl: bool) -> Result<Station> {
        let device = Device::open(ordinal)?;
        let kernels = Kernels::load_some(&device, |file| {
            ["exchange_", "nccl_", "experts_sort", "rmsnorm_"]
                .iter()
                .any(|wanted| file.starts_with(wanted))
        })?;
        let stream = Stream::new(&device)?;
        let gpu = Gpu {
            times: None,
            kernels,
            stream,
            device,
        };
        Ok(Station {
            carrier: match nccl {
                true => Carrier::Nccl(Box::new(NcclExchange::new(&gpu, most_bytes(shapes))?)),
                false => Carrier::Ipc(Box::new(IpcExchange::new(&gpu, shapes)?)),
            },
            buffers: None,
            trace: None,
            gpu,
        })
    }

    pub fn device_name(&self) -> &str {
        &self.gpu.device.name
    }

    /// For the peers of the next epoch; `None` over NCCL.
    pub fn offer(&mut self) -> Option<PeerHandle> {
        match &mut self.carrier {
            Carrier::Ipc(ipc) => Some(ipc.offer()),
            Carrier::Nccl(_) => None,
        }
    }

    fn exchange(&self) -> &dyn Exchange {
        match &self.carrier {
            Carrier::Ipc(ipc) => ipc.as_ref(),
            Carrier::Nccl(nccl) => nccl.as_ref(),
        }
    }

    pub fn control(&self) -> Control {
        match &self.carrier {
            Carrier::Ipc(ipc) => ipc.control(),
            Carrier::Nccl(nccl) => nccl.control(),
        }
    }

    pub fn describe(&self) -> String {
        self.exchange().describe()
    }

    /// As [`IpcExchange::connect`], [`NcclExchange::connect`] or [`NcclExchange::renew`]; `factors` are those of all experts.
    pub fn connect(&mut self, epoch: &Epoch<'_>, peers: Peers<'_>, factors: &[f32]) -> Result<()> {
        match (&mut self.carrier, peers) {
            (Carrier::Ipc(ipc), Peers::Ipc(handles)) => ipc.connect(&self.gpu, epoch, handles)?,
            (Carrier::Nccl(nccl), Peers::Nccl(id)) => nccl.connect(&self.gpu, epoch, id, &|| false)?,
            (Carrier::Nccl(nccl), Peers::Same) => nccl.renew(&self.gpu, epoch)?,
            _ => {
                return Err(KernelError::Unsupported(
                    "peers of another kind of exchange".into(),
                ));
            }
        }
        let sizes = epoch.shape;
        match &mut self.buffers {
            Some(buffers) if buffers.hold(&sizes, factors.len()) => buffers.shape = sizes,
            _ => {
                self.buffers = None;
                self.buffers = Some(Buffers::new(&self.gpu, sizes, factors.len())?);
            }
        }
        let owners = &epoch.placement.layer(0).owners;
        let held = owners
            .iter()
            .zip(factors)
            .filter(|(owners, _)| owners.contains(&(epoch.rank as u32)));
        let local: Vec<f32> = held.map(|(_, factor)| *factor).collect();
        if !local.is_empty() {
            self.gpu.write(&self.buffers()?.factors, 0, as_bytes(&local))?;
        }
        self.gpu.stream.wait(&self.gpu.device)
    }

    pub fn set_timeout(&self, timeout: Duration) -> Result<()> {
        match &self.carrier {
            Carrier::Ipc(ipc) => ipc.set_timeout(&self.gpu, timeout),
            Carrier::Nccl(nccl) => nccl.set_timeout(&self.gpu, timeout),
        }
    }

    fn buffers(&self) -> Result<&Buffers> {
        self.buffers
            .as_ref()
            .ok_or_else(|| KernelError::Unsupported("the station is not connected".into()))
    }

    pub fn set_tokens(&mut self, tokens: &StationTokens<'_>) -> Result<()> {
        let gpu = &self.gpu;
        let buffers = self
            .buffers
            .as_mut()
            .ok_or_else(|| KernelError::Unsupported("the station is not connected".into()))?;
        let sizes = buffers.shape;
        let count = tokens.ids.len() / sizes.top_k;
        if tokens.rows.len() != count * sizes.hidden || tokens.weights.len() != tokens.ids.len() {
            return Err(shape(
                "station",
                "values of the rows",
                tokens.rows.len(),
                count * sizes.hidden,
            ));
        }
        gpu.write(&buffers.rows, 0, as_bytes(tokens.rows))?;
        gpu.write(&buffers.ids, 0, as_bytes(tokens.ids))?;
        gpu.write(&buffers.weights, 0, as_bytes(tokens.weights))?;
        buffers.count = count;
        let own = (buffers.plane.address, buffers.blocks);
        let input = NormInput {
            x0: buffers.rows.address,
            k: sizes.hidden as i32,
            ..NormInput::default()
        };
        // For pieces, and where it travels from if all is one piece.
        for (plane, blocks) in std::iter::once(own).chain(self.exchange().plane(0, count)) {
            let params = NormRows {
                input,
                plane,
                plane_blocks: blocks as i32,
                padded: padded(sizes.hidden) as i32,
                ..NormRows::default()
            };
            norm_rows(&self.gpu, count, &params)?;
        }
        self.gpu.stream.wait(&self.gpu.device)
    }

    /// Before exchanges are queued or recorded, with the most tokens that any rank has; all ranks call it.
    pub fn begin(&self, family: Family, largest: usize) -> Result<()> {
        let buffers = self.buffers()?;
        let sizes = StepSizes {
            largest,
            tokens: buffers.count,
            many: match family {
                Family::Few => None,
                Family::Many => Some(buffers.shape.many_tokens),
                Family::Halves => Some(queue::half(&buffers.shape)),
            },
        };
        self.exchange().begin(&self.gpu, &sizes)
    }

    /// The state that results are added to.
    pub fn set_hidden(&self, values: &[f32]) -> Result<()> {
        self.gpu.write(&self.buffers()?.hidden, 0, as_bytes(values))
    }

    /// Waits for the device.
    pub fn hidden(&self) -> Result<Vec<f32>> {
        let buffers = self.buffers()?;
        let mut bytes = vec![0; buffers.count * buffers.shape.hidden * 4];
        self.gpu.read(&buffers.hidden, 0, &mut bytes)?;
        let words = bytes.as_chunks::<4>().0.iter();
        Ok(words.map(|word| f32::from_le_bytes(*word)).collect())
    }

    /// Records `layers` exchanges.
    pub fn record(&self, family: Family, layers: usize, until: Until) -> Result<StationGraph> {
        let graph = self.gpu.stream.capture(&self.gpu.device, || {
            (0..layers).try_for_each(|_| self.queue(family, 0, until))
        })?;
        Ok(StationGraph(graph))
    }

    /// Records `whole` exchanges, and perhaps the dispatch of another: what a rank gets done that then vanishes.
    pub fn record_short(&self, family: Family, whole: usize, halfway: bool) -> Result<StationGraph> {
        let graph = self.gpu.stream.capture(&self.gpu.device, || {
            (0..whole).try_for_each(|_| self.queue(family, 0, Until::All))?;
            match halfway {
                true => self.queue(family, 0, Until::Dispatch),
                false => Ok(()),
            }
        })?;
        Ok(StationGraph(graph))
    }

    pub fn launch(&self, graph: &StationGraph) -> Result<()> {
        graph.0.launch(&self.gpu.device, &self.gpu.stream)?;
        self.exchange().queued(&self.gpu)
    }

    pub fn wait(&self) -> Result<()> {
        self.gpu.stream.wait(&self.gpu.device)
    }

    /// Tells `peer` that so many tokens come in the first exchange of epoch `number`, as a faulty rank might.
    pub fn forge_count(&self, peer: usize, number: u32, count: u32) -> Result<()> {
        let Carrier::Ipc(ipc) = &self.carrier else {
            return Err(KernelError::Unsupported("no peer's buffers are mapped".into()));
        };
        let header = [count, 0, 1, number];
        poke(&self.gpu, ipc.header_at(peer)?, as_bytes(&header))
    }
}
