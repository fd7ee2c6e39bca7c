//! Time of dispatch and combine per layer at MiniMax-M2's width, all ranks at once, in a graph.

use std::time::Duration;

use conclave_kernels::cuda::exchange::ExchangeShape;
use conclave_kernels::cuda::exchange::station::{Family, Until};

use crate::cases::{Holding, Routing, Tokens, placement};
use crate::rank::Rank;

const SIZES: (usize, usize, usize) = (3072, 8, 256);
const LAYERS: usize = 32;
const REPEATS: usize = 15;

pub fn bench(rank: &mut Rank) -> usize {
    let timeout = Duration::from_secs(5);
    let placement = placement(Holding::Even, SIZES.2, rank.ranks);
    let base = ExchangeShape {
        many_tokens: 4096,
        ..ExchangeShape::new(rank.ranks, SIZES.0, SIZES.1, 4096, false)
    };
    rank.connect(base, &placement, timeout);
    rank.say(&format!(
        "{}, {}",
        rank.station.device_name(),
        rank.station.describe()
    ));
    let mut copies = 0.0;
    if rank.ranks > 1 && !rank.options.nccl {
        for turn in 0..rank.ranks.min(2) {
            if rank.rank == turn {
                let peer = (turn + 1) % rank.ranks;
                copies = rank.station.copy_bandwidth(peer, 64 << 20).unwrap();
            }
            rank.meet();
        }
        copies = rank.gather(&copies.to_string())[0].parse().unwrap();
        let peer = (rank.rank + 1) % rank.ranks;
        rank.meet();
        let both = rank.station.copy_bandwidth(peer, 64 << 20).unwrap();
        let (slowest, _) = rank.worst(-both);
        rank.say(&format!(
            "copies to a peer, 64 MiB: {copies:.0} GB/s; by all ranks at once {:.0} GB/s each",
            -slowest
        ));
    }
    rank.say(" tokens  rows          us a layer   MB to others  share of copies");
    for (family, exact, wire_name) in [
        (Family::Few, true, "few f32"),
        (Family::Few, false, "few bf16"),
        (Family::Many, false, "many bf16"),
        (Family::Many, false, "many fp8"),
    ] {
        let wire = match wire_name {
            "many fp8" => conclave_kernels::cuda::exchange::Wire::Fp8,
            _ => conclave_kernels::cuda::exchange::Wire::Bf16,
        };
        let shape = ExchangeShape { exact, wire, ..base };
        if !wire_name.contains(&rank.options.only) {
            continue;
        }
        rank.connect(shape, &placement, timeout);
        for count in [1, 8, 32, 128, 512, 4096] {
            if family == Family::Few && count > shape.few_tokens || family == Family::Many && count < 128 {
                continue;
            }
            let tokens = Tokens::new(rank.rank as u64 + 9, count, SIZES, Routing::Uniform, rank.ranks);
            rank.set_tokens(&tokens, family);
            rank.station.set_hidden(&tokens.state).unwrap();
            rank.meet();
            // Warms up, and leaves the sort's lists for the exchanges that do not sort.
            rank.station.queue(family, 0, Until::All).unwrap();
            rank.station.wait().unwrap();
            let graph = rank.station.record(family, LAYERS, Until::Exchange).unwrap();
            rank.station.launch(&graph).unwrap();
            rank.station.wait().unwrap();
            rank.meet();
            let mut times = rank.station.time(&graph, REPEATS).unwrap();
            times.sort_by(f32::total_cmp);
            let each = f64::from(times[REPEATS / 2]) * 1e3 / LAYERS as f64;
            let (each, _) = rank.worst(each);
            // Rows to other ranks, there and back.
            let owners = &placement.layers[0].owners;
            let mut rows = 0;
            for slots in tokens.ids.chunks_exact(SIZES.1) {
                let mut ranks: Vec<u32> = slots.iter().map(|id| owners[*id as usize][0]).collect();
                ranks.sort_unstable();
                ranks.dedup();
                rows += ranks.iter().filter(|owner| **owner as usize != rank.rank).count();
            }
            let (there, back) = match family {
                Family::Few => (shape.wire_bytes().0, shape.wire_bytes().0),
                Family::Many => (shape.wire_bytes().1, SIZES.0 * 2),
            };
            let bytes = (rows * (there + back)) as f64;
            let share = if copies > 0.0 {
                bytes / copies / 1e3 / each * 100.0
            } else {
                0.0
            };
            if let Some(fault) = rank.station.control().fault() {
                println!("FAILED   rank {}: {fault:?}", rank.rank);
                return 1;
            }
            rank.say(&format!(
                "{count:>7}  {wire_name:<12} {each:>11.1}  {:>13.2}  {share:>14.0}%",
                bytes / 1e6
            ));
            if family == Family::Many && count == 4096 {
                rank.meet();
                rank.station.profile(family).unwrap();
                rank.meet();
                let kernels = rank.station.profile(family).unwrap();
                let kernels: Vec<String> = kernels
                    .iter()
                    .map(|(name, us)| format!("{name} {us:.0}"))
                    .collect();
                rank.say(&format!(
                    "         us of each kernel, alone: {}",
                    kernels.join(", ")
                ));
                rank.meet();
            }
        }
    }
    0
}
