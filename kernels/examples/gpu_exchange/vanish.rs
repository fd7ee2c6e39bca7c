//! A rank that stops in the middle of recorded exchanges, many times over: it queues fewer of them than the others, who wait
//! inside their graph until their deadline or an abort. Then all form the next epoch, and its results must be right.

use std::time::{Duration, Instant};

use conclave_kernels::cuda::exchange::ExchangeShape;
use conclave_kernels::cuda::exchange::station::{Family, Until};

use crate::cases::{Holding, Random, Routing, Tokens, placement};
use crate::rank::Rank;

const SIZES: (usize, usize, usize) = (3072, 8, 256);
const LAYERS: usize = 4;
const DEADLINE: Duration = Duration::from_millis(5);
const PATIENT: Duration = Duration::from_secs(5);
/// What a wait may last beyond its deadline or the abort: the host may be late as well.
const SLACK: Duration = Duration::from_millis(100);

pub fn vanish(rank: &mut Rank) -> usize {
    let placement = placement(Holding::Even, SIZES.2, rank.ranks);
    let shape = ExchangeShape::new(rank.ranks, SIZES.0, SIZES.1, 0, true);
    // The same numbers on every rank.
    let random = &mut Random(11);
    let tokens = Tokens::new(rank.rank as u64, 4, SIZES, Routing::Uniform, rank.ranks);
    let expected = tokens.expected(LAYERS, None);
    let (mut failed, mut aborts, mut inside) = (0, 0, 0);
    let mut longest = Duration::ZERO;
    let began = Instant::now();
    for time in 0..rank.options.times {
        let (victim, whole) = (random.below(rank.ranks), random.below(LAYERS));
        let (halfway, abort) = (random.below(2) == 1, random.below(2) == 1);
        inside += usize::from(halfway);
        aborts += usize::from(abort);
        rank.connect(shape, &placement, if abort { PATIENT } else { DEADLINE });
        rank.set_tokens(&tokens, Family::Few);
        let graph = rank.station.record(Family::Few, LAYERS, Until::All).unwrap();
        // What the victim gets done: some exchanges, and perhaps the first half of one.
        let short = rank.station.record_short(Family::Few, whole, halfway).unwrap();
        rank.station.set_hidden(&tokens.state).unwrap();
        rank.meet();
        // A deadline that suits a device is short for hosts that start one after the other.
        rank.station.set_timeout(PATIENT).unwrap();
        rank.station.launch(&graph).unwrap();
        let right = rank.station.hidden().unwrap() == expected && rank.station.control().fault().is_none();
        rank.station
            .set_timeout(if abort { PATIENT } else { DEADLINE })
            .unwrap();
        let mut wrong = String::new();
        if !right {
            wrong = format!(
                "rank {}: wrong results, {:?}",
                rank.rank,
                rank.station.control().fault()
            );
        }
        rank.meet();
        let control = rank.station.control();
        let start = Instant::now();
        rank.station
            .launch(if rank.rank == victim { &short } else { &graph })
            .unwrap();
        if abort {
            std::thread::sleep(Duration::from_millis(1));
            control.abort();
        }
        let outcome = rank.station.wait();
        let took = start.elapsed();
        if rank.rank != victim {
            longest = longest.max(took);
            let limit = SLACK + if abort { Duration::from_millis(1) } else { DEADLINE };
            if outcome.is_err() || took > limit || control.fault().is_none() {
                wrong = format!(
                    "rank {}: {outcome:?} after {took:?}, {:?}",
                    rank.rank,
                    control.fault()
                );
            }
        }
        let wrong = rank.gather_said(&wrong);
        if !wrong.is_empty() {
            failed += 1;
            rank.say(&format!(
                "FAILED   {time}: rank {victim} left after {whole} exchanges{}: {wrong:?}",
                if halfway { " and a dispatch" } else { "" }
            ));
        }
        if failed > 5 {
            break;
        }
    }
    let (longest, _) = rank.worst(longest.as_secs_f64() * 1e3);
    let times = rank.options.times;
    rank.say(&format!(
        "{times} ranks of {} left recorded exchanges ({inside} between dispatch and combine; {} ended by the deadline of {DEADLINE:?}, \
         {aborts} by an abort after 1 ms): {failed} failures; longest wait {longest:.1} ms; {:.1?} each",
        rank.ranks,
        times - aborts,
        began.elapsed() / times.max(1) as u32,
    ));
    if rank.rank == 0 { failed } else { 0 }
}
