//! How unevenly uniform routing loads the ranks: the most loaded rank's share over the mean, which bounds what
//! expert parallelism can gain at small batches.

use crate::placement::Placement;
use crate::random;

/// Mean over `draws` batches of (most loaded rank's tokens) / (mean tokens per rank), each token going to `top_k`
/// distinct experts of layer 0 drawn uniformly; an expert's first owner takes its tokens. Same inputs, same result.
pub fn max_over_mean_load(placement: &Placement, top_k: u32, batch: u32, draws: u32) -> f64 {
    let owners = &placement.layer(0).owners;
    let chosen = (top_k as usize).min(owners.len());
    let mean = f64::from(batch) * chosen as f64 / f64::from(placement.ranks.max(1));
    let most = mean_over(placement, top_k, batch, draws, |experts| {
        let mut load = vec![0u32; placement.ranks as usize];
        for &expert in experts {
            load[owners[expert][0] as usize] += 1;
        }
        load.into_iter().max().unwrap_or(0)
    });
    most / mean
}

/// The same of the most distinct experts that one rank has to read: what a step of few tokens takes.
pub fn busiest_rank_experts(placement: &Placement, top_k: u32, batch: u32, draws: u32) -> f64 {
    let owners = &placement.layer(0).owners;
    mean_over(placement, top_k, batch, draws, |experts| {
        let (mut touched, mut read) = (vec![false; owners.len()], vec![0u32; placement.ranks as usize]);
        for &expert in experts {
            if !std::mem::replace(&mut touched[expert], true) {
                read[owners[expert][0] as usize] += 1;
            }
        }
        read.into_iter().max().unwrap_or(0)
    })
}

/// Mean over `draws` batches of what `most` says of the experts that the batch chose.
fn mean_over(
    placement: &Placement,
    top_k: u32,
    batch: u32,
    draws: u32,
    most: impl Fn(&[usize]) -> u32,
) -> f64 {
    let mut experts: Vec<usize> = (0..placement.layer(0).owners.len()).collect();
    let top_k = (top_k as usize).min(experts.len());
    let mut random = Random(0);
    let mut batch_of = Vec::with_capacity(batch as usize * top_k);
    let mut sum = 0.0;
    for _ in 0..draws {
        batch_of.clear();
        for _ in 0..batch {
            // The first top_k steps of a shuffle: distinct experts.
            for chosen in 0..top_k {
                let other = chosen + random.below(experts.len() - chosen);
                experts.swap(chosen, other);
                batch_of.push(experts[chosen]);
            }
        }
        sum += f64::from(most(&batch_of));
    }
    sum / f64::from(draws.max(1))
}

struct Random(u64);

impl Random {
    /// Nearly uniform below `bound` (which is small against 2^32).
    fn below(&mut self, bound: usize) -> usize {
        ((random::next(&mut self.0) >> 32) as usize * bound) >> 32
    }
}
