//! A rank that was left behind, paused before it stored its rows, goes on: it writes to where it wrote in its epoch, while the others
//! exchange rows in the next one. Their results must be right, epoch after epoch.

use std::time::Duration;

use conclave_kernels::cuda::exchange::ExchangeShape;
use conclave_kernels::cuda::exchange::station::{Family, Until};

use crate::cases::{Holding, Routing, Tokens, compare, placement};
use crate::check::PATIENT;
use crate::rank::Rank;

const SIZES: (usize, usize, usize) = (3072, 8, 256);
/// Tokens of a rank in the first epoch. In the next there are more: the last rank's rows, which come late, lie where rows of that are.
const MANY: usize = 1152;
const MORE: usize = 2304;
/// Exchanges beside which the late rows come.
const EXCHANGES: usize = 64;
/// How long the late rank waits for an answer.
const SHORT: Duration = Duration::from_millis(20);

pub fn late(rank: &mut Rank) -> usize {
    let shape = |ranks, many_tokens| ExchangeShape {
        many_tokens,
        exact: false,
        ..ExchangeShape::new(ranks, SIZES.0, SIZES.1, 0, false)
    };
    let (ranks, behind) = (rank.ranks, rank.rank + 1 == rank.ranks);
    let place = |ranks| placement(Holding::Even, SIZES.2, ranks);
    let tokens = |count| Tokens::new(rank.rank as u64, count, SIZES, Routing::Uniform, ranks);
    let (first, next) = (tokens(MANY), tokens(MORE));
    let expected = next.expected(EXCHANGES, None);
    let times = if rank.options.nccl { 6 } else { 20 };
    let mut failed = 0;
    for time in 0..times {
        rank.connect(shape(ranks, MANY), &place(ranks), PATIENT);
        rank.set_tokens(&first, Family::Many);
        rank.station.set_hidden(&first.state).unwrap();
        rank.station.queue(Family::Many, 0, Until::All).unwrap();
        rank.station.wait().unwrap();
        rank.leave_behind(shape(ranks - 1, MORE), &place(ranks - 1), PATIENT);
        let mut wrong = String::new();
        if behind {
            rank.station.set_timeout(SHORT).unwrap();
            rank.gather("0");
            rank.meet();
            // At another moment of the others' exchanges every time.
            std::thread::sleep(Duration::from_micros(1000 + 200 * time as u64));
            // Nobody answers it.
            let _ = rank.station.queue(Family::Many, 0, Until::Dispatch);
            let _ = rank.station.wait();
        } else {
            rank.set_tokens(&next, Family::Many);
            rank.station.set_hidden(&next.state).unwrap();
            let graph = rank.station.record(Family::Many, EXCHANGES, Until::All).unwrap();
            rank.meet();
            rank.station.launch(&graph).unwrap();
            let (error, different, at) = compare(&rank.station.hidden().unwrap(), &expected);
            let fault = rank.station.control().fault();
            if error > 6e-3 || fault.is_some() {
                wrong = format!(
                    "rank {}: error {error:.1e}, {different} values differ, {fault:?}, token {}",
                    rank.rank,
                    at / SIZES.0
                );
            }
        }
        let wrong = rank.gather_said(&wrong);
        if !wrong.is_empty() {
            failed += 1;
            rank.say(&format!(
                "FAILED   rows of a rank that was left behind, {time}: {wrong:?}"
            ));
        }
    }
    if failed == 0 {
        rank.say(&format!(
            "ok       rows of a rank that was left behind, {times} times"
        ));
    }
    failed
}
