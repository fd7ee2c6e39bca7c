//! One rank of a check: its station, and how it meets the others.

use std::time::{Duration, Instant};

use conclave_kernels::cuda::exchange::ExchangeShape;
use conclave_kernels::cuda::exchange::ipc::Epoch;
use conclave_kernels::cuda::exchange::nccl::{ID_BYTES, Nccl, UniqueId};
use conclave_kernels::cuda::exchange::peer::PeerHandle;
use conclave_kernels::cuda::exchange::station::{Family, Peers, Station};
use conclave_plan::placement::Placement;

use crate::Options;
use crate::cases::Tokens;
use crate::link::Link;

/// What each rank runs; returns how many checks failed.
pub type Work = fn(&mut Rank) -> usize;

pub struct Rank {
    pub options: Options,
    pub rank: usize,
    pub ranks: usize,
    pub station: Station,
    link: Box<dyn Link>,
    epoch: u32,
    /// In epochs' beginnings so far.
    pub connecting: Duration,
}

/// Factor of an expert: a product with it is exact for few bits.
pub fn factors(experts: usize) -> Vec<f32> {
    (0..experts).map(|e| 0.5 + e as f32 / 256.0).collect()
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(text: &str) -> Vec<u8> {
    (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
        .collect()
}

pub fn handle(text: &str) -> PeerHandle {
    PeerHandle::from_bytes(&bytes(text)).unwrap()
}

/// A communicator's id, as rank 0 or the parent draws it.
pub fn draw() -> String {
    hex(&Nccl::open().unwrap().unique_id().unwrap().0)
}

pub fn id(text: &str) -> UniqueId {
    UniqueId(<[u8; ID_BYTES]>::try_from(bytes(text)).unwrap())
}

/// Said for the id of a communicator that stays.
const SAME: &str = "same";

/// Enters an epoch whose ranks said `texts`: handles, or the id of a communicator, first of all by rank 0.
pub fn connect(station: &mut Station, epoch: &Epoch<'_>, texts: &[String], nccl: bool) {
    let factors = factors(epoch.placement.experts as usize);
    if nccl {
        let peers = match texts[0].as_str() {
            SAME => Peers::Same,
            text => Peers::Nccl(id(text)),
        };
        return station.connect(epoch, peers, &factors).unwrap();
    }
    let peers: Vec<PeerHandle> = texts.iter().map(|text| handle(text)).collect();
    station.connect(epoch, Peers::Ipc(&peers), &factors).unwrap();
}

/// The largest that `check` and `bench` do.
pub fn shapes(ranks: usize) -> [ExchangeShape; 2] {
    let shape = ExchangeShape::new(ranks, 3072, 8, 4096, false);
    let many = ExchangeShape {
        many_tokens: 4096,
        exact: true,
        ..shape
    };
    [many, ExchangeShape::new(ranks, 3072, 8, 4096, true)]
}

impl Rank {
    pub fn new(options: &Options, rank: usize, ranks: usize, link: Box<dyn Link>) -> Rank {
        let ordinal = (rank % options.gpus) as i32;
        let station = Station::open(ordinal, &shapes(ranks), options.nccl).unwrap();
        Rank {
            options: options.clone(),
            rank,
            ranks,
            station,
            link,
            epoch: 0,
            connecting: Duration::ZERO,
        }
    }

    /// Whether there is such a way between these ranks.
    pub fn offers(&self, family: Family) -> bool {
        family != Family::Halves || self.ranks > 1 && self.ranks <= self.options.gpus
    }

    pub fn gather(&mut self, line: &str) -> Vec<String> {
        self.link.gather(line)
    }

    /// What the ranks have to say, of those that say something.
    pub fn gather_said(&mut self, line: &str) -> Vec<String> {
        let mut all = self.gather(line);
        all.retain(|line| !line.is_empty());
        all
    }

    pub fn meet(&mut self) {
        self.link.gather("");
    }

    /// The next epoch, with all ranks.
    pub fn connect(&mut self, shape: ExchangeShape, placement: &Placement, timeout: Duration) {
        let own = self.offer();
        self.enter(&own, (shape, placement, timeout));
    }

    /// What this rank says before an epoch.
    fn offer(&mut self) -> String {
        match self.station.offer() {
            Some(handle) => hex(&handle.to_bytes()),
            None if self.rank == 0 => draw(),
            None => "-".into(),
        }
    }

    /// The next epoch, of all ranks but the last: that one stays where it is.
    pub fn leave_behind(&mut self, shape: ExchangeShape, placement: &Placement, timeout: Duration) {
        let behind = self.rank + 1 == self.ranks;
        let own = if behind { "-".into() } else { self.offer() };
        let mut texts = self.gather(&own);
        texts.pop();
        self.epoch += 1;
        if !behind {
            let epoch = self.of_the_epoch(shape, placement, timeout);
            connect(&mut self.station, &epoch, &texts, self.options.nccl);
        }
        self.meet();
    }

    /// The next epoch of ranks that are all well: NCCL's communicator, which takes most of an epoch's beginning, stays.
    pub fn renew(&mut self, shape: ExchangeShape, placement: &Placement, timeout: Duration) {
        match self.options.nccl && self.epoch > 0 {
            true => self.enter(SAME, (shape, placement, timeout)),
            false => self.connect(shape, placement, timeout),
        }
    }

    fn enter(&mut self, own: &str, (shape, placement, timeout): (ExchangeShape, &Placement, Duration)) {
        let start = Instant::now();
        let texts = self.gather(own);
        self.epoch += 1;
        let epoch = self.of_the_epoch(shape, placement, timeout);
        connect(&mut self.station, &epoch, &texts, self.options.nccl);
        self.meet();
        self.connecting += start.elapsed();
    }

    fn of_the_epoch<'a>(
        &self,
        shape: ExchangeShape,
        placement: &'a Placement,
        timeout: Duration,
    ) -> Epoch<'a> {
        Epoch {
            number: self.epoch,
            rank: self.rank,
            shape,
            placement,
            layers: 1,
            timeout,
        }
    }

    /// This rank's tokens of the exchanges that follow; all ranks call it.
    pub fn set_tokens(&mut self, tokens: &Tokens, family: Family) {
        self.station.set_tokens(&tokens.station()).unwrap();
        let counts = self.gather(&(tokens.ids.len() / tokens.top_k).to_string());
        let counts = counts.iter().map(|text| text.parse::<usize>().unwrap());
        self.station.begin(family, counts.max().unwrap_or(0)).unwrap();
    }

    /// Number of the epoch.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The worst of what all ranks say, and who said it.
    pub fn worst(&mut self, value: f64) -> (f64, usize) {
        let all = self.gather(&value.to_string());
        let values = all.iter().map(|text| text.parse::<f64>().unwrap());
        values
            .zip(0..)
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .unwrap_or_default()
    }

    /// Whether any rank says so; all ranks call it.
    pub fn any(&mut self, one: bool) -> bool {
        let all = self.gather(if one { "yes" } else { "" });
        all.iter().any(|line| !line.is_empty())
    }

    /// Printed once.
    pub fn say(&self, line: &str) {
        if self.rank == 0 {
            println!("{line}");
        }
    }
}
