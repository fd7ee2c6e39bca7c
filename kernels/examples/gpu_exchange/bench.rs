//! Time of dispatch and combine per layer at MiniMax-M2's width, all ranks at once, in a graph.

use std::time::Duration;

use conclave_kernels::cuda::exchange::ExchangeShape;
use conclave_kernels::cuda::exchange::station::{Family, StationGraph, Until};
use conclave_plan::placement::Placement;

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
    rank.say(" tokens  rows                 us a layer   MB to others  share of copies   fastest and slowest graph");
    for (family, exact, wire_name) in [
        (Family::Few, true, "few f32"),
        (Family::Few, false, "few bf16"),
        (Family::Many, false, "many bf16"),
        (Family::Halves, false, "halves bf16"),
        (Family::Many, false, "many fp8"),
    ] {
        let wire = match wire_name {
            "many fp8" => conclave_kernels::cuda::exchange::Wire::Fp8,
            _ => conclave_kernels::cuda::exchange::Wire::Bf16,
        };
        let shape = ExchangeShape { exact, wire, ..base };
        // Over ipc they are not recorded.
        if !wire_name.contains(&rank.options.only) || family == Family::Halves && !rank.options.nccl {
            continue;
        }
        rank.connect(shape, &placement, timeout);
        for count in [1, 8, 32, 128, 512, 4096] {
            if family == Family::Few && count > shape.few_tokens
                || family == Family::Many && count < 128
                || family == Family::Halves && count < 4096
            {
                continue;
            }
            let tokens = Tokens::new(rank.rank as u64 + 9, count, SIZES, Routing::Uniform, rank.ranks);
            if !time(rank, (family, wire_name), &shape, &placement, &tokens, copies) {
                return 1;
            }
            if family != Family::Halves && !exact {
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
    carrying(rank, &base, &placement, copies)
}

/// The transfer with little beside it: every token has one expert, of the next rank, so that no sum of several results is timed.
fn carrying(rank: &mut Rank, base: &ExchangeShape, placement: &Placement, copies: f64) -> usize {
    let name = "many bf16, one slot";
    if rank.ranks == 1 || rank.options.nccl || !name.contains(&rank.options.only) {
        return 0;
    }
    let shape = ExchangeShape { top_k: 1, ..*base };
    rank.connect(shape, placement, Duration::from_secs(5));
    let sizes = (SIZES.0, 1, SIZES.2);
    let mut tokens = Tokens::new(rank.rank as u64 + 9, 4096, sizes, Routing::Uniform, rank.ranks);
    let next = ((rank.rank + 1) % rank.ranks) as u32;
    let owners = placement.layers[0].owners.iter().zip(0u32..);
    let its: Vec<u32> = owners
        .filter(|(owners, _)| owners[0] == next)
        .map(|(_, expert)| expert)
        .collect();
    for (id, expert) in tokens.ids.iter_mut().zip(its.iter().cycle()) {
        *id = *expert;
    }
    usize::from(!time(
        rank,
        (Family::Many, name),
        &shape,
        placement,
        &tokens,
        copies,
    ))
}

/// Times recorded exchanges of the tokens on all ranks and prints a line; whether there was no fault.
fn time(
    rank: &mut Rank,
    (family, name): (Family, &str),
    shape: &ExchangeShape,
    placement: &Placement,
    tokens: &Tokens,
    copies: f64,
) -> bool {
    rank.set_tokens(tokens, family);
    rank.station.set_hidden(&tokens.state).unwrap();
    rank.meet();
    // Warms up, and leaves the sort's lists for the exchanges that do not sort.
    rank.station.queue(family, 0, Until::All).unwrap();
    rank.station.wait().unwrap();
    let graph = rank.station.record(family, LAYERS, Until::Exchange).unwrap();
    rank.station.launch(&graph).unwrap();
    rank.station.wait().unwrap();
    rank.meet();
    let times = match rank.options.skew_us {
        0 => rank.station.time(&graph, REPEATS).unwrap(),
        late => late_times(rank, &graph, Duration::from_micros(late)),
    };
    let layer = |time: f32| f64::from(time) * 1e3 / LAYERS as f64;
    let slowest = (0..REPEATS)
        .max_by(|a, b| times[*a].total_cmp(&times[*b]))
        .unwrap_or(0);
    let mut sorted = times.clone();
    sorted.sort_by(f32::total_cmp);
    let (each, _) = rank.worst(layer(sorted[REPEATS / 2]));
    // Rows to other ranks, there and back.
    let owners = &placement.layers[0].owners;
    let mut rows = 0;
    for slots in tokens.ids.chunks_exact(tokens.top_k) {
        let mut ranks: Vec<u32> = slots.iter().map(|id| owners[*id as usize][0]).collect();
        ranks.sort_unstable();
        ranks.dedup();
        rows += ranks.iter().filter(|owner| **owner as usize != rank.rank).count();
    }
    let (there, back) = match family {
        Family::Few => (shape.wire_bytes().0, shape.wire_bytes().0),
        Family::Many | Family::Halves => (shape.wire_bytes().1, SIZES.0 * 2),
    };
    let bytes = (rows * (there + back)) as f64;
    let share = match copies > 0.0 {
        true => bytes / copies / 1e3 / each * 100.0,
        false => 0.0,
    };
    if let Some(fault) = rank.station.control().fault() {
        println!("FAILED   rank {}: {fault:?}", rank.rank);
        return false;
    }
    rank.say(&format!(
        "{:>7}  {name:<20} {each:>8.1}  {:>13.2}  {share:>14.0}%   {:.1} to {:.1} (launch {slowest})",
        tokens.ids.len() / tokens.top_k,
        bytes / 1e6,
        layer(sorted[0]),
        layer(times[slowest]),
    ));
    if rank.options.trace {
        trace(rank, family);
    }
    true
}

/// Milliseconds of each launch on the rank that launches last, the others' wait included in theirs.
fn late_times(rank: &mut Rank, graph: &StationGraph, late: Duration) -> Vec<f32> {
    let mut times = Vec::new();
    for _ in 0..REPEATS {
        rank.meet();
        if rank.rank + 1 == rank.ranks {
            std::thread::sleep(late);
        }
        times.extend(rank.station.time(graph, 1).unwrap());
    }
    // Of the last, since its launches wait for nobody's host.
    let last = rank.gather(&times.iter().map(f32::to_string).collect::<Vec<_>>().join(" "));
    let last = last.last().map_or("", String::as_str);
    last.split(' ').filter_map(|time| time.parse().ok()).collect()
}

/// Records and runs the exchanges once more, and prints when their blocks did what.
fn trace(rank: &mut Rank, family: Family) {
    rank.meet();
    rank.station.start_trace().unwrap();
    let graph = rank.station.record(family, LAYERS, Until::Exchange).unwrap();
    rank.meet();
    for _ in 0..3 {
        rank.station.launch(&graph).unwrap();
    }
    rank.station.wait().unwrap();
    drop(graph);
    for point in rank.station.end_trace().unwrap() {
        rank.say(&format!(
            "         {:<9} {:<30} {:>4} blocks: {:>7.2} {:>7.2} {:>7.2} us",
            point.kernel, point.point, point.blocks, point.first, point.median, point.last
        ));
    }
    rank.meet();
}
