//! What the machine can do at best.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::backend::Result;
use crate::cpu::memory::Memory;
use crate::cpu::pool::Pool;
use crate::simd::{Isa, Kernel, LANES, Simd, run};

/// Bytes read per thread for a bandwidth: several times any last-level cache's share.
const READ_BYTES: usize = 256 << 20;
/// Each figure is the best of several runs, for at least so long.
const MEASURE: Duration = Duration::from_millis(300);

/// The machine's floors with some threads.
#[derive(Clone, Copy, Debug)]
pub struct Floors {
    pub threads: usize,
    /// Bytes per second, read from memory.
    pub read: f64,
    /// Floating-point operations per second (a multiply-add counts two).
    pub flops: f64,
}

impl Floors {
    /// Measures both.
    pub fn measure(threads: usize, isa: Isa) -> Result<Floors> {
        Ok(Floors {
            threads,
            read: read_bandwidth(threads, isa)?,
            flops: fma_peak(threads, isa),
        })
    }
}

/// Bytes per second that `threads` threads read from memory together. `OutOfMemory` if the buffer does not fit.
pub fn read_bandwidth(threads: usize, isa: Isa) -> Result<f64> {
    // In small pages, as most weights are; huge ones are read faster.
    let mut memory = Memory::lazy(threads.saturating_mul(READ_BYTES), "read bandwidth")?;
    // Untouched pages would all be one page of zeros.
    memory.bytes_mut().fill(1);
    let bytes = memory.bytes();
    let time = best(threads, |i| {
        black_box(run(isa, Read(&bytes[i * READ_BYTES..][..READ_BYTES])));
    });
    Ok(bytes.len() as f64 / time)
}

/// Floating-point operations per second of `threads` threads at multiply-adds in registers.
pub fn fma_peak(threads: usize, isa: Isa) -> f64 {
    let steps = if isa == Isa::Portable { 20_000 } else { 2_000_000 };
    let time = best(threads, |_| {
        black_box(run(isa, MultiplyAdd(steps)));
    });
    (threads * steps * CHAINS * LANES * 2) as f64 / time
}

/// Seconds of the fastest run of `task` on all threads at once.
fn best(threads: usize, task: impl Fn(usize) + Sync) -> f64 {
    // The floor of a pool that cannot be started is that of the caller's thread.
    let Ok(mut pool) = Pool::new(threads) else {
        return f64::INFINITY;
    };
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while best.is_infinite() || start.elapsed() < MEASURE {
        let start = Instant::now();
        pool.run(threads, &|i, _| task(i));
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

struct Read<'a>(&'a [u8]);

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 4];
        for lines in self.0.as_chunks::<64>().0.as_chunks::<4>().0 {
            for (sum, line) in sums.iter_mut().zip(lines) {
                *sum = s.max(*sum, s.f32x16(line));
            }
        }
        s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
    }
}

/// Independent chains of multiply-adds: enough for two units of latency 4 or 5.
const CHAINS: usize = 12;

struct MultiplyAdd(usize);

impl Kernel for MultiplyAdd {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let factor = s.splat(black_box(0.999));
        let mut sums = [s.splat(black_box(0.5)); CHAINS];
        for _ in 0..self.0 {
            for sum in &mut sums {
                *sum = s.fma(*sum, factor, factor);
            }
        }
        sums.into_iter().map(|sum| s.sum(sum)).sum()
    }
}
