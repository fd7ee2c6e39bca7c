//! Times of the kernels' blocks in recorded exchanges, for `gpu_exchange bench --trace`: the device's clock in nanoseconds at
//! points that `mark` names in the kernels.

/// Mirror the constants of `exchange.cuh`.
const KERNELS: usize = 3;
const EXCHANGES: usize = 32;
const BLOCKS: usize = 1024;
const POINTS: usize = 8;
pub(super) const BYTES: usize = KERNELS * EXCHANGES * BLOCKS * POINTS * 8;

/// What each kernel's points are.
const NAMES: [(&str, [&str; POINTS]); KERNELS] = [
    (
        "dispatch",
        [
            "on the device",
            "may read",
            "row read, destinations known",
            "sent",
            "first row there, or all slots",
            "done",
            "",
            "",
        ],
    ),
    ("arrive", ["", "may read", "", "", "", "all ranks there", "", ""]),
    (
        "combine",
        [
            "on the device",
            "may read",
            "slots known, own shares summed",
            "results sent",
            "first results added",
            "done",
            "all ranks done",
            "",
        ],
    ),
];

/// Microseconds after the dispatch's first block may read, at each point: first, median and last block, medians over exchanges.
#[derive(Clone, Debug)]
pub struct TracedPoint {
    pub kernel: &'static str,
    pub point: &'static str,
    pub blocks: usize,
    pub first: f64,
    pub median: f64,
    pub last: f64,
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// `words`: what the device wrote.
pub(super) fn summarise(words: &[u64]) -> Vec<TracedPoint> {
    let at = |kernel: usize, exchange: usize, block: usize, point: usize| {
        words[((kernel * EXCHANGES + exchange) * BLOCKS + block) * POINTS + point]
    };
    let times = |kernel: usize, exchange: usize, point: usize| -> Vec<u64> {
        let all = (0..BLOCKS).map(|block| at(kernel, exchange, block, point));
        all.filter(|time| *time > 0).collect()
    };
    let mut points = Vec::new();
    for (kernel, (name, names)) in NAMES.iter().enumerate() {
        for (point, what) in names.iter().enumerate().filter(|(_, what)| !what.is_empty()) {
            let (mut first, mut middle, mut last, mut blocks) = (Vec::new(), Vec::new(), Vec::new(), 0);
            for exchange in 0..EXCHANGES {
                let Some(zero) = times(0, exchange, 1).into_iter().min() else {
                    continue;
                };
                let since = |time: &u64| (*time as f64 - zero as f64) / 1e3;
                let mut found: Vec<f64> = times(kernel, exchange, point).iter().map(since).collect();
                if found.is_empty() {
                    continue;
                }
                blocks = found.len();
                middle.push(median(&mut found));
                first.push(found[0]);
                last.push(found[found.len() - 1]);
            }
            if blocks > 0 {
                points.push(TracedPoint {
                    kernel: name,
                    point: what,
                    blocks,
                    first: median(&mut first),
                    median: median(&mut middle),
                    last: median(&mut last),
                });
            }
        }
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_medians_over_exchanges_of_first_median_and_last_block() {
        let mut words = vec![0; BYTES / 8];
        for exchange in 0..EXCHANGES {
            for block in 0..3 {
                let base = 1_000_000 * (exchange as u64 + 1);
                let mut set = |kernel: usize, point: usize, time: u64| {
                    words[((kernel * EXCHANGES + exchange) * BLOCKS + block) * POINTS + point] = base + time;
                };
                set(0, 1, block as u64 * 100);
                set(2, 5, 5000 + block as u64 * 500);
            }
        }
        let points = summarise(&words);
        let found: Vec<_> = points
            .iter()
            .map(|p| (p.kernel, p.point, p.blocks, p.first, p.median, p.last))
            .collect();
        assert_eq!(
            found,
            [
                ("dispatch", "may read", 3, 0.0, 0.1, 0.2),
                ("combine", "done", 3, 5.0, 5.5, 6.0)
            ]
        );
    }
}
