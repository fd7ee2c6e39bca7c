//! Tokens, routings and placements, and what an exchange of them must give. Every rank can make everybody's.

use conclave_kernels::cuda::exchange::station::StationTokens;
use conclave_plan::placement::{LayerPlacement, Placement};

use crate::rank::factors;

/// Numbers of a seed.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        conclave_plan::random::next(&mut self.0)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Routing {
    Uniform,
    /// Every token's first expert is this one.
    OneExpert(u32),
    /// Only experts of the first rank's block.
    FirstRank,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Holding {
    Even,
    /// The first rank holds half of all experts.
    Uneven,
    /// Every fourth expert is on three ranks.
    Replicas,
}

pub fn placement(holding: Holding, experts: usize, ranks: usize) -> Placement {
    let even = Placement::even(experts as u32, ranks as u32);
    let owners = even.layers[0]
        .owners
        .iter()
        .zip(0u32..)
        .map(|(owners, expert)| match holding {
            Holding::Even => owners.clone(),
            Holding::Uneven if (expert as usize) < experts / 2 => vec![0],
            // The others from the last rank on.
            Holding::Uneven => vec![(ranks - 1 - (expert as usize - experts / 2) % ranks) as u32],
            Holding::Replicas if expert % 4 == 0 => {
                let mut all: Vec<u32> = (0..3).map(|i| (owners[0] + i) % ranks as u32).collect();
                all.sort_unstable();
                all.dedup();
                all
            }
            Holding::Replicas => owners.clone(),
        });
    Placement {
        ranks: ranks as u32,
        experts: experts as u32,
        layers: vec![LayerPlacement {
            owners: owners.collect(),
        }],
    }
}

pub struct Tokens {
    pub hidden: usize,
    pub top_k: usize,
    pub experts: usize,
    pub rows: Vec<f32>,
    pub ids: Vec<u32>,
    pub weights: Vec<f32>,
    /// The state that results are added to.
    pub state: Vec<f32>,
}

impl Tokens {
    pub fn new(
        seed: u64,
        count: usize,
        (hidden, top_k, experts): (usize, usize, usize),
        routing: Routing,
        ranks: usize,
    ) -> Tokens {
        let random = &mut Random(seed);
        let mut ids = Vec::with_capacity(count * top_k);
        for _ in 0..count {
            let start = ids.len();
            if let Routing::OneExpert(expert) = routing {
                ids.push(expert);
            }
            let among = match routing {
                Routing::FirstRank => (experts / ranks).max(top_k),
                _ => experts,
            };
            while ids.len() < start + top_k {
                let id = random.below(among) as u32;
                if !ids[start..].contains(&id) {
                    ids.push(id);
                }
            }
        }
        let mut values = |n: usize| (0..n).map(|_| random.unit()).collect::<Vec<f32>>();
        Tokens {
            rows: values(count * hidden),
            weights: values(count * top_k).iter().map(|w| 0.6 + 0.5 * w).collect(),
            state: values(count * hidden),
            hidden,
            top_k,
            experts,
            ids,
        }
    }

    pub fn station(&self) -> StationTokens<'_> {
        StationTokens {
            rows: &self.rows,
            ids: &self.ids,
            weights: &self.weights,
        }
    }

    /// What one exchange adds to each value: summed by slots, or by owners first if they are known (`owner` of an
    /// expert).
    fn sums(&self, owner: Option<&dyn Fn(u32) -> u32>) -> Vec<f32> {
        let factors = factors(self.experts);
        let mut sums = vec![0f32; self.rows.len()];
        let mut part = vec![0f32; self.hidden];
        let rows = self.rows.chunks_exact(self.hidden);
        for (token, (row, sum)) in rows.zip(sums.chunks_exact_mut(self.hidden)).enumerate() {
            let slots = token * self.top_k..(token + 1) * self.top_k;
            let (ids, weights) = (&self.ids[slots.clone()], &self.weights[slots]);
            let each: Vec<u32> = ids.iter().map(|id| owner.map_or(0, |owner| owner(*id))).collect();
            let mut owners = each.clone();
            owners.sort_unstable();
            owners.dedup();
            for one in &owners {
                part.fill(0.0);
                for ((id, weight), _) in ids
                    .iter()
                    .zip(weights)
                    .zip(&each)
                    .filter(|(_, owner)| *owner == one)
                {
                    add_slot(&mut part, row, factors[*id as usize], *weight);
                }
                for (sum, part) in sum.iter_mut().zip(&part) {
                    *sum += part;
                }
            }
        }
        sums
    }

    /// The state after `times` exchanges.
    pub fn expected(&self, times: usize, owner: Option<&dyn Fn(u32) -> u32>) -> Vec<f32> {
        let sums = self.sums(owner);
        let mut state = self.state.clone();
        for _ in 0..times {
            for (value, sum) in state.iter_mut().zip(&sums) {
                *value += sum;
            }
        }
        state
    }
}

/// part += weight x (row x factor), rounded once.
fn add_slot(part: &mut [f32], row: &[f32], factor: f32, weight: f32) {
    #[inline(always)]
    fn add(part: &mut [f32], row: &[f32], factor: f32, weight: f32) {
        for (part, x) in part.iter_mut().zip(row) {
            *part = weight.mul_add(x * factor, *part);
        }
    }
    /// With one instruction for what is a call otherwise: the checks wait for these sums.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn add_fused(part: &mut [f32], row: &[f32], factor: f32, weight: f32) {
        add(part, row, factor, weight);
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: this processor has what the function was compiled for.
        return unsafe { add_fused(part, row, factor, weight) };
    }
    add(part, row, factor, weight);
}

/// ||a - b|| / ||b||, the number of values that differ, and the first place where the difference is large.
pub fn compare(a: &[f32], b: &[f32]) -> (f64, usize, usize) {
    if a.len() != b.len() {
        return (f64::INFINITY, a.len(), b.len());
    }
    let (mut error, mut norm, mut different) = (0.0, 0.0, 0);
    let mut first = usize::MAX;
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        let d = f64::from(*x) - f64::from(*y);
        error += d * d;
        norm += f64::from(*y) * f64::from(*y);
        different += usize::from(x.to_bits() != y.to_bits());
        let near = d.abs() < 0.05 + 0.05 * f64::from(y.abs());
        if !near && first == usize::MAX {
            first = i;
        }
    }
    if norm == 0.0 {
        return (if a.is_empty() { 0.0 } else { error.sqrt() }, different, first);
    }
    let relative = (error / norm).sqrt();
    (
        if relative.is_nan() {
            f64::INFINITY
        } else {
            relative
        },
        different,
        first,
    )
}
