//! One rank under test: its tokens, and "experts" that are plain arithmetic on the host, so that the only thing under
//! test is where rows go.

use conclave_kernels::backend::{Backend, Buffer, Limits};
use conclave_kernels::cpu::CpuBackend;
use conclave_plan::placement::Placement;
use conclave_worker::transport::{Capacity, Input, Tokens, Transport, TransportError};

pub const HIDDEN: usize = 24;
pub const TOP_K: usize = 3;
pub const MAX_TOKENS: usize = 12;
pub const LAYERS: usize = 2;
pub const CAPACITY: Capacity = Capacity {
    max_tokens: MAX_TOKENS,
    max_top_k: TOP_K,
    hidden: HIDDEN,
};

/// Small, seeded, and the same on every machine.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % bound
    }
}

/// One rank's tokens of one layer: rows and the experts of each.
#[derive(Clone, Debug, Default)]
pub struct Load {
    rows: Vec<f32>,
    experts: Vec<u32>,
}

impl Load {
    /// Different rows for every rank and token; distinct experts per token.
    pub fn random(random: &mut Random, tokens: usize, experts: u32) -> Load {
        let mut load = Load::default();
        for _ in 0..tokens {
            load.rows
                .extend((0..HIDDEN).map(|_| random.below(1000) as f32 / 7.0 - 70.0));
            let mut chosen: Vec<u32> = Vec::new();
            while chosen.len() < TOP_K {
                let expert = random.below(experts as usize) as u32;
                if !chosen.contains(&expert) {
                    chosen.push(expert);
                }
            }
            load.experts.extend(chosen);
        }
        load
    }

    fn tokens(&self) -> usize {
        self.rows.len() / HIDDEN
    }

    /// `[tokens * top_k, hidden]`.
    fn expected(&self, layer: usize) -> Vec<f32> {
        let rows = self.experts.iter().enumerate().flat_map(|(index, &expert)| {
            let row = &self.rows[index / TOP_K * HIDDEN..][..HIDDEN];
            row.iter()
                .map(move |&x| compute(x, layer, expert))
                .collect::<Vec<_>>()
        });
        rows.collect()
    }
}

/// What an expert does to a value.
fn compute(x: f32, layer: usize, expert: u32) -> f32 {
    x * (expert as f32 + 1.5) + layer as f32
}

/// A rank under test: a backend for its buffers, and a transport.
pub struct Rank {
    backend: CpuBackend,
    pub transport: Box<dyn Transport>,
    held: Vec<Vec<u32>>,
    rows: Buffer,
    experts: Buffer,
    staging: Buffer,
    out: Buffer,
    y: Buffer,
}

impl Rank {
    pub fn new(transport: Box<dyn Transport>, placement: &Placement, rank: u32) -> Rank {
        let limits = Limits {
            max_tokens: MAX_TOKENS,
            max_logit_rows: 1,
            max_runs: 1,
            max_pages_per_run: 1,
            max_expert_rows: CAPACITY.max_work_rows(),
            page_tokens: 16,
        };
        let mut backend = CpuBackend::new(limits, 1, None).unwrap();
        let mut alloc = |values: usize| backend.alloc(values * 4, "test").unwrap();
        Rank {
            rows: alloc(MAX_TOKENS * HIDDEN),
            experts: alloc(MAX_TOKENS * TOP_K),
            staging: alloc(MAX_TOKENS * HIDDEN),
            out: alloc(CAPACITY.max_work_rows() * HIDDEN),
            y: alloc(CAPACITY.max_work_rows() * HIDDEN),
            held: (0..LAYERS)
                .map(|layer| placement.experts_of(layer, rank))
                .collect(),
            backend,
            transport,
        }
    }

    pub fn dispatch(&mut self, layer: usize, load: &Load) -> Result<(), TransportError> {
        let bytes: Vec<u8> = load.rows.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.backend.write(&self.rows, 0, &bytes).unwrap();
        let bytes: Vec<u8> = load
            .experts
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        self.backend.write(&self.experts, 0, &bytes).unwrap();
        let tokens = Tokens {
            layer,
            count: load.tokens(),
            top_k: TOP_K,
            rows: &self.rows,
            experts: &self.experts,
        };
        self.transport.dispatch(&mut self.backend, tokens)
    }

    /// Computes everything that came in. The number of pieces it came in.
    pub fn work(&mut self, layer: usize) -> Result<usize, TransportError> {
        let mut pieces = 0;
        while let Some(work) = self.transport.next(&mut self.backend, &self.staging)? {
            pieces += 1;
            assert!(work.rows.len() <= CAPACITY.max_work_rows());
            let (from, to) = match work.input {
                Input::Own => (&self.rows, &self.y),
                Input::Staged => (&self.staging, &self.out),
            };
            let input = floats(&mut self.backend, from, MAX_TOKENS * HIDDEN);
            let out: Vec<u8> = work
                .rows
                .iter()
                .flat_map(|row| {
                    let expert = self.held[layer][row.expert as usize];
                    let values = &input[row.row as usize * HIDDEN..][..HIDDEN];
                    values
                        .iter()
                        .flat_map(move |&x| compute(x, layer, expert).to_le_bytes())
                        .collect::<Vec<_>>()
                })
                .collect();
            let staged = work.input == Input::Staged;
            self.backend.write(to, 0, &out).unwrap();
            if staged {
                self.transport.give(&mut self.backend, &self.out)?;
            }
        }
        Ok(pieces)
    }

    pub fn combine(&mut self, load: &Load) -> Result<Vec<f32>, TransportError> {
        self.transport.combine(&mut self.backend, &self.y)?;
        Ok(floats(&mut self.backend, &self.y, load.experts.len() * HIDDEN))
    }

    pub fn layer(&mut self, layer: usize, load: &Load) -> Result<usize, TransportError> {
        self.dispatch(layer, load)?;
        let pieces = self.work(layer)?;
        assert_eq!(self.combine(load)?, load.expected(layer));
        Ok(pieces)
    }
}

fn floats(backend: &mut CpuBackend, buffer: &Buffer, values: usize) -> Vec<f32> {
    let mut bytes = vec![0; values * 4];
    backend.read(buffer, 0, &mut bytes).unwrap();
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|&value| f32::from_le_bytes(value))
        .collect()
}

/// Runs `body` for every rank on a thread of its own.
pub fn on_ranks<R: Send>(ranks: u32, body: impl Fn(u32) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks)
            .map(|rank| {
                scope.spawn({
                    let body = &body;
                    move || body(rank)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
