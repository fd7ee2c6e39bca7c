//! The exchange of ranks of one host: kernels write straight into peers' memory, over NVLink or within one device.
//!
//! Life: [`IpcExchange::new`] allocates the receive buffers once; for each epoch the ranks exchange [`PeerHandle`]s and each
//! calls [`IpcExchange::connect`]; the first exchange may start when all ranks have connected. Peers that are no longer
//! named are unmapped, so memory of a dead process goes back to its device.

use std::time::Duration;

use conclave_plan::placement::Placement;

use super::control::Control;
use super::layout::{
    Area, CombineFew, CombineMany, DispatchFew, DispatchMany, ExchangeParams, ExchangeTokens, GroupRows,
};
use super::peer::{OwnArea, PeerArea, PeerHandle, multi_process};
use super::places::{Places, table};
use super::{
    Exchange, ExchangeShape, Fault, FewResults, FewRows, MAX_RANKS, ManyResults, ManyRows, Tokens, Wire,
    launch,
};
use crate::backend::{KernelError, Result};
use crate::cuda::format::padded;
use crate::cuda::{Gpu, shape};

/// What an epoch fixes.
#[derive(Clone, Debug)]
pub struct Epoch<'a> {
    /// Never used before by any of the ranks.
    pub number: u32,
    pub rank: usize,
    pub shape: ExchangeShape,
    pub placement: &'a Placement,
    pub layers: usize,
    /// How long a rank waits for another within one exchange.
    pub timeout: Duration,
}

pub(crate) struct IpcExchange {
    own: OwnArea,
    control: Control,
    peers: Vec<PeerArea>,
    connected: Option<Connected>,
}

struct Connected {
    shape: ExchangeShape,
    places: Places,
    params: ExchangeParams,
    /// Ranks on this device, and how they run beside each other.
    sharing: usize,
    beside: &'static str,
}

impl IpcExchange {
    /// Buffers for epochs of shapes that need at most `bytes` ([`ExchangeShape::area_bytes`]).
    pub(crate) fn new(gpu: &Gpu, bytes: usize) -> Result<IpcExchange> {
        Ok(IpcExchange {
            own: OwnArea::new(gpu, bytes)?,
            control: Control::new(&gpu.device)?,
            peers: Vec::new(),
            connected: None,
        })
    }

    pub(crate) fn handle(&self) -> PeerHandle {
        self.own.handle
    }

    pub(crate) fn control(&self) -> Control {
        self.control.clone()
    }

    /// Waits for this device to leave the epoch before, maps the peers (`peers[rank]`, this rank included) and starts
    /// anew.
    pub(crate) fn connect(&mut self, gpu: &Gpu, epoch: &Epoch<'_>, peers: &[PeerHandle]) -> Result<()> {
        const OP: &str = "exchange";
        let sizes = epoch.shape;
        sizes.check()?;
        if peers.len() != sizes.ranks || epoch.placement.ranks as usize != sizes.ranks {
            return Err(shape(OP, "peers", peers.len(), sizes.ranks));
        }
        if peers.get(epoch.rank) != Some(&self.own.handle) {
            return Err(shape(
                OP,
                "own rank",
                epoch.rank,
                "the index of this rank's handle",
            ));
        }
        let (at, bytes) = Area::new(&sizes);
        if let Some(small) = peers.iter().find(|peer| peer.area_bytes < bytes as u64) {
            return Err(shape(OP, "bytes of a rank's buffers", small.area_bytes, bytes));
        }
        let (entries, local) = table(epoch.placement, epoch.layers, epoch.rank as u32)?;
        gpu.device.enter()?;
        gpu.stream.wait(&gpu.device)?;
        self.connected = None;
        self.peers.retain(|peer| peers.contains(&peer.handle));
        let mut area = [0; MAX_RANKS];
        for (place, handle) in area.iter_mut().zip(peers) {
            if *handle == self.own.handle {
                *place = self.own.memory.address;
                continue;
            }
            let known = self.peers.iter().find(|peer| peer.handle == *handle);
            *place = match known {
                Some(peer) => peer.address,
                None => {
                    self.peers.push(PeerArea::open(gpu, handle)?);
                    self.peers.last().map_or(0, |peer| peer.address)
                }
            };
        }
        let own = &self.own.handle;
        let here: Vec<_> = peers.iter().filter(|peer| peer.shares_device(own)).collect();
        let beside = if here.len() == 1 {
            "alone on its device"
        } else if here.iter().all(|peer| peer.shares_process(own)) {
            "as threads of one process"
        } else if multi_process(&gpu.device)? {
            "under MPS"
        } else {
            "time-sliced, milliseconds an exchange: start nvidia-cuda-mps-control"
        };
        let places = Places::new(gpu, &sizes, &entries, local)?;
        let timeout = epoch.timeout.as_nanos().try_into().unwrap_or(u64::MAX);
        places.start(gpu, epoch.number, timeout)?;
        self.own.memory.clear(&gpu.device, &gpu.stream, bytes)?;
        self.control.clear();
        gpu.stream.wait(&gpu.device)?;
        let params = ExchangeParams {
            area,
            at,
            state: places.state.address,
            host: self.control.address(),
            placement: places.placement.address,
            loads: places.loads.address,
            owner: places.owner.address,
            counts: places.counts.address,
            ids: places.ids.address,
            weights: places.weights.address,
            ranks: sizes.ranks as i32,
            rank: epoch.rank as i32,
            hidden: sizes.hidden as i32,
            k: sizes.top_k as i32,
            experts: epoch.placement.experts as i32,
            few_tokens: sizes.few_tokens as i32,
            many_tokens: sizes.many_tokens as i32,
            row_bytes: sizes.row_bytes() as i32,
            deterministic: i32::from(sizes.deterministic),
            alone: i32::from(here.len() == 1),
        };
        self.connected = Some(Connected {
            shape: sizes,
            places,
            params,
            sharing: here.len(),
            beside,
        });
        Ok(())
    }

    pub(crate) fn set_timeout(&self, gpu: &Gpu, timeout: Duration) -> Result<()> {
        let nanoseconds = timeout.as_nanos().try_into().unwrap_or(u64::MAX);
        self.connected()?.places.set_timeout(gpu, nanoseconds)
    }

    /// Experts of a layer that this rank holds, at most.
    pub(crate) fn local_experts(&self) -> Result<usize> {
        Ok(self.connected()?.places.local_experts)
    }

    /// Where the area of `peer` is mapped.
    pub(crate) fn area(&self, peer: usize) -> Result<u64> {
        let areas = &self.connected()?.params.area[..self.peers.len() + 1];
        areas
            .get(peer)
            .copied()
            .ok_or_else(|| shape("exchange", "peer", peer, format!("below {}", areas.len())))
    }

    fn connected(&self) -> Result<&Connected> {
        self.connected
            .as_ref()
            .ok_or_else(|| KernelError::Unsupported("the exchange has no epoch: connect it first".into()))
    }
}

impl Connected {
    fn tokens(&self, tokens: &Tokens, most: usize) -> Result<ExchangeTokens> {
        if tokens.count > most {
            return Err(shape(
                "exchange",
                "tokens",
                tokens.count,
                format!("at most {most}"),
            ));
        }
        Ok(ExchangeTokens {
            ids: tokens.ids,
            weights: tokens.weights,
            count: tokens.count as i32,
            layer: tokens.layer as i32,
        })
    }
}

impl Exchange for IpcExchange {
    fn describe(&self) -> String {
        match &self.connected {
            None => "ipc (not connected)".into(),
            Some(connected) => format!(
                "ipc (rank {} of {}, {} on this device {})",
                connected.params.rank, connected.shape.ranks, connected.sharing, connected.beside
            ),
        }
    }

    fn shape(&self) -> Result<&ExchangeShape> {
        Ok(&self.connected()?.shape)
    }

    fn local_experts(&self) -> Result<usize> {
        IpcExchange::local_experts(self)
    }

    fn dispatch_few(&self, gpu: &Gpu, tokens: &Tokens, normed: u64) -> Result<FewRows> {
        let c = self.connected()?;
        let params = DispatchFew {
            exchange: c.params,
            tokens: c.tokens(tokens, c.shape.few_tokens)?,
            normed,
            x: c.places.x.address,
            group: GroupRows {
                groups: c.places.groups,
                rows: c.places.rows.address,
                experts: c.places.local_experts as i32,
                words: c.shape.few_rows().div_ceil(32) as i32,
            },
        };
        launch::dispatch_few(gpu, c.shape.exact, c.sharing, &params)?;
        Ok(FewRows {
            x: c.places.x.address,
            groups: c.places.groups,
            most_groups: c.places.most_groups,
        })
    }

    fn combine_few(&self, gpu: &Gpu, tokens: &Tokens, results: &FewResults) -> Result<()> {
        let c = self.connected()?;
        let params = CombineFew {
            exchange: c.params,
            tokens: c.tokens(tokens, c.shape.few_tokens)?,
            y: results.y,
            norm: results.norm,
        };
        launch::combine_few(gpu, c.shape.exact, c.sharing, &params)
    }

    fn dispatch_many(&self, gpu: &Gpu, tokens: &Tokens, plane: u64, blocks: usize) -> Result<ManyRows> {
        let c = self.connected()?;
        let params = DispatchMany {
            exchange: c.params,
            tokens: c.tokens(tokens, c.shape.many_tokens)?,
            plane,
            plane_blocks: blocks as i32,
            padded: padded(c.shape.hidden) as i32,
            fp8: i32::from(c.shape.wire == Wire::Fp8),
            rows: c.places.rows.address,
        };
        launch::dispatch_many(gpu, &params)?;
        let own = self.own.memory.address;
        Ok(ManyRows {
            rows: own + c.params.at.many_rows,
            row_bytes: c.shape.row_bytes(),
            wire: c.shape.wire,
            ids: own + c.params.at.many_ids,
            counts: c.places.counts.address,
            total: c.places.rows.address,
        })
    }

    fn combine_many(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()> {
        let c = self.connected()?;
        let params = CombineMany {
            exchange: c.params,
            tokens: c.tokens(tokens, c.shape.many_tokens)?,
            sorted: results.sorted,
            row_of_slot: results.row_of_slot,
            hidden: results.hidden,
        };
        launch::combine_many(gpu, c.shape.many_rows(), &params)
    }

    fn fault(&self) -> Option<Fault> {
        self.control.fault()
    }
}
