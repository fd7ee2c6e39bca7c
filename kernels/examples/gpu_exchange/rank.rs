//! One rank of a check: its station, and how it meets the others.

use std::time::Duration;

use conclave_kernels::cuda::exchange::ExchangeShape;
use conclave_kernels::cuda::exchange::ipc::Epoch;
use conclave_kernels::cuda::exchange::peer::PeerHandle;
use conclave_kernels::cuda::exchange::station::Station;
use conclave_plan::placement::Placement;

use crate::Options;
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
}

/// Factor of an expert: a product with it is exact for few bits.
pub fn factors(experts: usize) -> Vec<f32> {
    (0..experts).map(|e| 0.5 + e as f32 / 256.0).collect()
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn handle(text: &str) -> PeerHandle {
    let bytes: Vec<u8> = (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
        .collect();
    PeerHandle::from_bytes(&bytes).unwrap()
}

/// Bytes of receive buffers for everything that `check` and `bench` do.
pub fn area_bytes(ranks: usize) -> usize {
    let shape = ExchangeShape::new(ranks, 3072, 8, 4096, false);
    let many = ExchangeShape {
        many_tokens: 4096,
        exact: true,
        ..shape
    };
    let exact = ExchangeShape::new(ranks, 3072, 8, 4096, true);
    many.area_bytes().max(exact.area_bytes())
}

impl Rank {
    pub fn new(options: &Options, rank: usize, ranks: usize, link: Box<dyn Link>) -> Rank {
        let station = Station::open((rank % options.gpus) as i32, area_bytes(ranks)).unwrap();
        Rank {
            options: options.clone(),
            rank,
            ranks,
            station,
            link,
            epoch: 0,
        }
    }

    pub fn gather(&mut self, line: &str) -> Vec<String> {
        self.link.gather(line)
    }

    pub fn meet(&mut self) {
        self.link.gather("");
    }

    /// The next epoch, with all ranks.
    pub fn connect(&mut self, shape: ExchangeShape, placement: &Placement, timeout: Duration) {
        let handle_text = hex(&self.station.handle().to_bytes());
        let peers: Vec<PeerHandle> = self
            .gather(&handle_text)
            .iter()
            .map(|text| handle(text))
            .collect();
        self.epoch += 1;
        let epoch = Epoch {
            number: self.epoch,
            rank: self.rank,
            shape,
            placement,
            layers: 1,
            timeout,
        };
        let factors = factors(placement.experts as usize);
        self.station.connect(&epoch, &peers, &factors).unwrap();
        self.meet();
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

    /// Printed once.
    pub fn say(&self, line: &str) {
        if self.rank == 0 {
            println!("{line}");
        }
    }
}
