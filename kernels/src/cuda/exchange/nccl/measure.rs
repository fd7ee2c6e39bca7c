//! What the library itself costs, without the kernels around it: joining, pairs of exchanges recorded and not, and the
//! end of a communicator whose peer never comes. For benchmarks; serving does not use it.

use std::time::{Duration, Instant};

use super::{Communicator, Nccl, UniqueId, Until};
use crate::backend::{KernelError, Result};
use crate::cuda::{Device, Event, Gpu, Graph, Kernels, Memory, Stream};

/// Pairs of exchanges in one recorded graph.
const GRAPH_PAIRS: usize = 20;
const REPEATS: usize = 15;
/// Bounds every wait of a measurement.
const PATIENCE: Duration = Duration::from_secs(20);

/// One rank's end of a measurement.
pub struct Bench {
    communicator: Communicator,
    sent: Memory,
    there: Memory,
    back: Memory,
    gpu: Gpu,
    /// How long joining took.
    pub joined: Duration,
}

/// Times of a pair of exchanges, there and back.
#[derive(Clone, Copy, Debug)]
pub struct PairTimes {
    /// On the device, recorded in a graph.
    pub recorded_us: f32,
    /// On the device, queued one by one.
    pub queued_us: f32,
    /// On the host, to queue one pair.
    pub host_us: f32,
}

fn until(deadline: Instant) -> Until<'static> {
    Until {
        deadline,
        cancelled: &|| false,
    }
}

impl Bench {
    /// Opens device `ordinal` and joins. `bytes`: the most that one rank sends another.
    pub fn new(
        ordinal: i32,
        id: UniqueId,
        (rank, ranks): (u32, u32),
        bytes: usize,
        blocking: bool,
    ) -> Result<Bench> {
        let device = Device::open(ordinal)?;
        let kernels = Kernels::load(&device)?;
        let stream = Stream::new(&device)?;
        let gpu = Gpu {
            times: None,
            kernels,
            stream,
            device,
        };
        let begin = Instant::now();
        let until = until(begin + PATIENCE);
        let communicator =
            Communicator::connect(Nccl::open()?, &gpu.device, id, (rank, ranks), blocking, until)?;
        let joined = begin.elapsed();
        let all = bytes * ranks as usize;
        let sent = gpu.alloc(all, "rows to send")?;
        let pattern: Vec<u8> = (0..all).map(|i| (i as u32 * 31 + rank * 7 + 1) as u8).collect();
        gpu.write(&sent, 0, &pattern)?;
        gpu.stream.wait(&gpu.device)?;
        Ok(Bench {
            communicator,
            there: gpu.alloc(all, "received rows")?,
            back: gpu.alloc(all, "returned rows")?,
            sent,
            gpu,
            joined,
        })
    }

    fn exchange(&self, from: &Memory, to: &Memory, bytes: usize) -> Result<()> {
        let Communicator { rank, ranks, .. } = self.communicator;
        self.communicator
            .group(until(Instant::now() + PATIENCE), |group| {
                // From the next rank on, so that not all begin with the same one.
                for peer in (1..=ranks).map(|distance| (rank + distance) % ranks) {
                    let at = u64::from(peer) * bytes as u64;
                    // SAFETY: both memories hold `ranks` times the most bytes, and live longer than the stream's work:
                    // every measurement waits for it.
                    unsafe {
                        group.send(from.address + at, bytes, peer, &self.gpu.stream)?;
                        group.recv(to.address + at, bytes, peer, &self.gpu.stream)?;
                    }
                }
                Ok(())
            })
    }

    fn pair(&self, bytes: usize) -> Result<()> {
        self.exchange(&self.sent, &self.there, bytes)?;
        self.exchange(&self.there, &self.back, bytes)
    }

    /// Records `pairs` pairs of `bytes` bytes per pair of ranks.
    pub fn record(&self, bytes: usize, pairs: usize) -> Result<Recorded> {
        let graph = self
            .gpu
            .stream
            .capture(&self.gpu.device, || (0..pairs).try_for_each(|_| self.pair(bytes)))?;
        Ok(Recorded(graph))
    }

    pub fn launch(&self, graph: &Recorded) -> Result<()> {
        graph.0.launch(&self.gpu.device, &self.gpu.stream)
    }

    pub fn wait(&self) -> Result<()> {
        self.gpu.stream.wait(&self.gpu.device)
    }

    /// What came back must be what was sent.
    pub fn check(&self, bytes: usize) -> Result<()> {
        let all = bytes * self.communicator.ranks as usize;
        let (mut sent, mut back) = (vec![0; all], vec![1; all]);
        self.gpu.read(&self.sent, 0, &mut sent)?;
        self.gpu.read(&self.back, 0, &mut back)?;
        match (0..all).find(|&i| sent[i] != back[i]) {
            None => Ok(()),
            Some(i) => Err(KernelError::Unsupported(format!(
                "byte {i} of {all} came back as {}, not {}",
                back[i], sent[i]
            ))),
        }
    }

    /// Times pairs of `bytes` bytes per pair of ranks; every rank calls it with the same.
    pub fn time(&self, bytes: usize) -> Result<PairTimes> {
        let (device, stream) = (&self.gpu.device, &self.gpu.stream);
        (0..3).try_for_each(|_| self.pair(bytes))?;
        self.check(bytes)?;
        let (begin, end) = (Event::new(device)?, Event::new(device)?);
        let median = |mut times: Vec<f32>| {
            times.sort_unstable_by(f32::total_cmp);
            times[times.len() / 2]
        };
        let (mut queued, mut host) = (Vec::new(), Vec::new());
        for _ in 0..REPEATS {
            begin.record(device, stream)?;
            let now = Instant::now();
            (0..GRAPH_PAIRS).try_for_each(|_| self.pair(bytes))?;
            host.push(now.elapsed().as_secs_f32() * 1e6 / GRAPH_PAIRS as f32);
            end.record(device, stream)?;
            end.wait(device)?;
            queued.push(end.since(device, &begin)? * 1e3 / GRAPH_PAIRS as f32);
        }
        let graph = self.record(bytes, GRAPH_PAIRS)?;
        self.launch(&graph)?;
        self.wait()?;
        let mut recorded = Vec::new();
        for _ in 0..REPEATS {
            begin.record(device, stream)?;
            self.launch(&graph)?;
            end.record(device, stream)?;
            end.wait(device)?;
            recorded.push(end.since(device, &begin)? * 1e3 / GRAPH_PAIRS as f32);
        }
        Ok(PairTimes {
            recorded_us: median(recorded),
            queued_us: median(queued),
            host_us: median(host),
        })
    }

    /// Launches `graph`, which waits for a peer that never comes, and ends the communicator after `patience` from
    /// another thread. How long after that the stream was free, and whether the library had freed everything by then.
    pub fn hang(&self, graph: &Recorded, patience: Duration) -> Result<(Duration, bool)> {
        self.launch(graph)?;
        let communicator = &self.communicator;
        std::thread::scope(|scope| {
            let ending = scope.spawn(move || {
                std::thread::sleep(patience);
                let begin = Instant::now();
                (begin, communicator.abort())
            });
            let freed = self.wait();
            let now = Instant::now();
            let (begin, freed_all) = ending.join().map_err(|_| {
                KernelError::Unsupported("the thread that ends the communicator panicked".into())
            })?;
            freed.map(|()| (now.saturating_duration_since(begin), freed_all))
        })
    }

    /// The device still computes: a copy comes back as it was.
    pub fn usable(&self) -> Result<()> {
        let probe: Vec<u8> = (0..64).collect();
        let mut found = vec![0; probe.len()];
        self.gpu.write(&self.there, 0, &probe)?;
        self.gpu.read(&self.there, 0, &mut found)?;
        (found == probe)
            .then_some(())
            .ok_or_else(|| KernelError::Unsupported(format!("the device gave back {found:?}")))
    }
}

/// A recorded run of pairs.
pub struct Recorded(Graph);
