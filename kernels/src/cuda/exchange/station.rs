//! One rank of an exchange without a model, for `gpu_exchange`: its experts multiply by a number each.

use std::time::Duration;

use super::control::Control;
use super::group::most_bytes;
use super::ipc::{Epoch, IpcExchange};
use super::nccl::{NcclExchange, UniqueId};
use super::peer::{PeerHandle, copy, poke};
use super::{Exchange, ExchangeShape, FewResults, ManyResults, StepSizes, Tokens};
use crate::backend::{KernelError, Result};
use crate::cuda::format::padded;
use crate::cuda::plane::{PLANE_ROWS, plane_blocks, plane_bytes};
use crate::cuda::{Device, Event, Gpu, Graph, Kernels, Launch, Memory, Stream, as_bytes, shape};
use crate::ops::experts::many::{SortArea, SortParams, sort, sorted_rows};
use crate::ops::rmsnorm::cuda::{NormInput, NormRows, norm_rows};
use crate::ops::route::cuda::Groups;

/// Which family of kernels carries an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Few,
    Many,
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

struct Buffers {
    shape: ExchangeShape,
    rows: Memory,
    plane: Memory,
    blocks: usize,
    ids: Memory,
    weights: Memory,
    hidden: Memory,
    y: Memory,
    factors: Memory,
    sort: Memory,
    sorted: Memory,
    sorted_blocks: usize,
    sorted_y: Memory,
    count: usize,
    /// What the buffers were made for.
    room: (ExchangeShape, usize),
}

/// What the ranks of an epoch are connected by.
#[derive(Clone, Copy)]
pub enum Peers<'a> {
    /// By rank.
    Ipc(&'a [PeerHandle]),
    Nccl(UniqueId),
}

enum Carrier {
    Ipc(Box<IpcExchange>),
    Nccl(Box<NcclExchange>),
}

pub struct Station {
    carrier: Carrier,
    buffers: Option<Buffers>,
    gpu: Gpu,
}

/// Mirrors `StandInFew`.
#[repr(C)]
struct StandInFew {
    groups: Groups,
    x: u64,
    y: u64,
    factor: u64,
    hidden: i32,
}

/// Mirrors `StandInMany`.
#[repr(C)]
struct StandInMany {
    tiles: u64,
    tile_count: u64,
    plane: u64,
    y: u64,
    factor: u64,
    hidden: i32,
    blocks: i32,
}

impl Station {
    /// On device `ordinal`, with buffers for `shapes`; over NCCL, or between mapped buffers.
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
                false => {
                    let bytes = shapes.iter().map(ExchangeShape::area_bytes).max();
                    Carrier::Ipc(Box::new(IpcExchange::new(&gpu, bytes.unwrap_or(0))?))
                }
            },
            buffers: None,
            gpu,
        })
    }

    pub fn device_name(&self) -> &str {
        &self.gpu.device.name
    }

    /// For the peers; `None` over NCCL.
    pub fn handle(&self) -> Option<PeerHandle> {
        match &self.carrier {
            Carrier::Ipc(ipc) => Some(ipc.handle()),
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

    /// As [`IpcExchange::connect`] or [`NcclExchange::connect`]; `factors` are those of all experts.
    pub fn connect(&mut self, epoch: &Epoch<'_>, peers: Peers<'_>, factors: &[f32]) -> Result<()> {
        match (&mut self.carrier, peers) {
            (Carrier::Ipc(ipc), Peers::Ipc(handles)) => ipc.connect(&self.gpu, epoch, handles)?,
            (Carrier::Nccl(nccl), Peers::Nccl(id)) => nccl.connect(&self.gpu, epoch, id, &|| false)?,
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
        norm_rows(
            gpu,
            count,
            &NormRows {
                input: NormInput {
                    x0: buffers.rows.address,
                    k: sizes.hidden as i32,
                    ..NormInput::default()
                },
                plane: buffers.plane.address,
                plane_blocks: buffers.blocks as i32,
                padded: padded(sizes.hidden) as i32,
                ..NormRows::default()
            },
        )?;
        gpu.stream.wait(&gpu.device)
    }

    /// Before exchanges are queued or recorded, with the most tokens that any rank has; all ranks call it.
    pub fn begin(&self, family: Family, largest: usize) -> Result<()> {
        let buffers = self.buffers()?;
        let sizes = StepSizes {
            largest,
            tokens: buffers.count,
            many: (family == Family::Many).then_some(buffers.shape.many_tokens),
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

    /// Queues one exchange.
    pub fn queue(&self, family: Family, layer: usize, until: Until) -> Result<()> {
        let (gpu, b) = (&self.gpu, self.buffers()?);
        let tokens = Tokens {
            layer,
            piece: 0,
            count: b.count,
            ids: b.ids.address,
            weights: b.weights.address,
            packed: false,
        };
        match family {
            Family::Few => self.queue_few(gpu, b, &tokens, until)?,
            Family::Many => self.queue_many(gpu, b, &tokens, until)?,
        }
        if gpu.stream.is_capturing(&gpu.device)? {
            return Ok(());
        }
        self.exchange().queued(gpu)
    }

    fn queue_few(&self, gpu: &Gpu, b: &Buffers, tokens: &Tokens, until: Until) -> Result<()> {
        let hidden = b.shape.hidden as i32;
        let rows = self.exchange().dispatch_few(gpu, tokens, b.rows.address)?;
        if until == Until::Dispatch {
            return Ok(());
        }
        if until == Until::All {
            let params = StandInFew {
                groups: rows.groups,
                x: rows.x,
                y: b.y.address,
                factor: b.factors.address,
                hidden,
            };
            gpu.launch("stand_in_few", stand_in(gpu), &params)?;
        }
        let norm = NormRows {
            input: NormInput {
                x0: b.hidden.address,
                sum_out: b.hidden.address,
                k: hidden,
                ..NormInput::default()
            },
            ..NormRows::default()
        };
        let results = FewResults { y: b.y.address, norm };
        self.exchange().combine_few(gpu, tokens, &results)
    }

    fn queue_many(&self, gpu: &Gpu, b: &Buffers, tokens: &Tokens, until: Until) -> Result<()> {
        let sizes = b.shape;
        let rows = self
            .exchange()
            .dispatch_many(gpu, tokens, b.plane.address, b.blocks)?;
        if until == Until::Dispatch {
            return Ok(());
        }
        let area = SortArea::at(b.sort.address, sizes.many_rows(), sizes.top_k);
        if until == Until::All {
            let to = SortParams {
                sorted: b.sorted.address,
                k: sizes.top_k as i32,
                steps: (padded(sizes.hidden) / 128) as i32,
                sorted_blocks: b.sorted_blocks as i32,
                ..SortParams::default()
            };
            let params = rows.sort_params(&sizes, self.exchange().local_experts()?, to);
            sort(gpu, &area.fill(params))?;
            let params = StandInMany {
                tiles: area.tiles,
                tile_count: area.tile_count,
                plane: b.sorted.address,
                y: b.sorted_y.address,
                factor: b.factors.address,
                hidden: sizes.hidden as i32,
                blocks: b.sorted_blocks as i32,
            };
            gpu.launch("stand_in_many", stand_in(gpu), &params)?;
        }
        let results = ManyResults {
            sorted: b.sorted_y.address,
            row_of_slot: area.row_of_slot,
            hidden: b.hidden.address,
        };
        self.exchange().combine_many(gpu, tokens, &results)
    }

    /// Records `layers` exchanges.
    pub fn record(&self, family: Family, layers: usize, until: Until) -> Result<StationGraph> {
        let graph = self.gpu.stream.capture(&self.gpu.device, || {
            (0..layers).try_for_each(|_| self.queue(family, 0, until))
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

    /// Milliseconds of each of `repeats` launches, one after the other.
    pub fn time(&self, graph: &StationGraph, repeats: usize) -> Result<Vec<f32>> {
        let (device, stream) = (&self.gpu.device, &self.gpu.stream);
        let events = (0..=repeats)
            .map(|_| Event::new(device))
            .collect::<Result<Vec<_>>>()?;
        for (index, event) in events.iter().enumerate() {
            event.record(device, stream)?;
            if index < repeats {
                self.launch(graph)?;
            }
        }
        self.wait()?;
        events
            .windows(2)
            .map(|pair| pair[1].since(device, &pair[0]))
            .collect()
    }

    /// Microseconds of each kernel of an exchange, on its own.
    pub fn profile(&mut self, family: Family) -> Result<Vec<(String, f32)>> {
        self.gpu.times = Some(std::cell::RefCell::new(Vec::new()));
        let queued = self.queue(family, 0, Until::All);
        let times = self.gpu.times.take().map(std::cell::RefCell::into_inner);
        queued?;
        self.wait()?;
        let times = times.unwrap_or_default().into_iter();
        times
            .map(|(name, start, end)| Ok((name, end.since(&self.gpu.device, &start)? * 1e3)))
            .collect()
    }

    /// GB/s of copies of `bytes` to the area of `peer`, while nobody exchanges; the peer must connect anew after it.
    pub fn copy_bandwidth(&self, peer: usize, bytes: usize) -> Result<f64> {
        let (device, stream) = (&self.gpu.device, &self.gpu.stream);
        let Carrier::Ipc(ipc) = &self.carrier else {
            return Err(KernelError::Unsupported("no peer's buffers are mapped".into()));
        };
        let (to, from) = (ipc.area(peer)?, &self.buffers()?.sorted);
        let bytes = bytes.min(from.bytes);
        let (start, end) = (Event::new(device)?, Event::new(device)?);
        const REPEATS: usize = 20;
        copy(&self.gpu, to, from.address, bytes)?;
        start.record(device, stream)?;
        for _ in 0..REPEATS {
            copy(&self.gpu, to, from.address, bytes)?;
        }
        end.record(device, stream)?;
        end.wait(device)?;
        let seconds = f64::from(end.since(device, &start)?) / 1e3;
        Ok((bytes * REPEATS) as f64 / seconds / 1e9)
    }
}

fn stand_in(gpu: &Gpu) -> Launch {
    Launch {
        grid: (2 * gpu.blocks(), 1),
        threads: 256,
        shared: 0,
        overlap: true,
    }
}

impl Buffers {
    fn new(gpu: &Gpu, shape: ExchangeShape, experts: usize) -> Result<Buffers> {
        let alloc = |bytes: usize| gpu.alloc(bytes, "a station");
        let (hidden, k) = (shape.hidden, shape.top_k);
        let tokens = shape.few_tokens.max(shape.many_tokens);
        let blocks = plane_blocks(tokens);
        let sorted = sorted_rows(shape.many_rows() * k, experts);
        Ok(Buffers {
            rows: alloc(tokens * hidden * 4)?,
            plane: alloc(plane_bytes(blocks, padded(hidden)))?,
            blocks,
            ids: alloc(tokens * k * 4)?,
            weights: alloc(tokens * k * 4)?,
            hidden: alloc(tokens * hidden * 4)?,
            y: alloc(shape.few_rows() * k * hidden * 4)?,
            factors: alloc(experts * 4)?,
            sort: alloc(SortArea::bytes(shape.many_rows().max(128), k))?,
            sorted: alloc(plane_bytes(sorted / PLANE_ROWS, padded(hidden)))?,
            sorted_blocks: sorted / PLANE_ROWS,
            sorted_y: alloc(sorted * hidden * 2)?,
            count: 0,
            room: (shape, experts),
            shape,
        })
    }

    /// Whether there is room for another epoch.
    fn hold(&self, shape: &ExchangeShape, experts: usize) -> bool {
        let (room, most) = &self.room;
        let same = (room.hidden, room.top_k, *most) == (shape.hidden, shape.top_k, experts);
        same && room.few_rows() >= shape.few_rows()
            && room.few_tokens.max(room.many_tokens) >= shape.few_tokens.max(shape.many_tokens)
            && room.many_rows() >= shape.many_rows()
    }
}
