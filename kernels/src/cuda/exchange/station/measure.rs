//! Times of a station's exchanges.

use super::super::peer::copy;
use super::super::trace::{self, TracedPoint};
use super::{Carrier, Family, Station, StationGraph, Until};
use crate::backend::{KernelError, Result};
use crate::cuda::Event;

impl Station {
    /// Milliseconds of each of `repeats` launches, one after the other.
    pub fn time(&self, graph: &StationGraph, repeats: usize) -> Result<Vec<f32>> {
        let (device, stream) = (&self.gpu.device, &self.gpu.stream);
        let events = (0..=repeats)
            .map(|_| Event::new(device))
            .collect::<Result<Vec<_>>>()?;
        for (index, event) in events.iter().enumerate() {
            event.record(device, stream)?;
            if index < repeats {
                self.launch(graph)?;
            }
        }
        self.wait()?;
        events
            .windows(2)
            .map(|pair| pair[1].since(device, &pair[0]))
            .collect()
    }

    /// Exchanges that are recorded from now on in this epoch write down when their blocks do what.
    pub fn start_trace(&mut self) -> Result<()> {
        let Carrier::Ipc(ipc) = &mut self.carrier else {
            return Err(KernelError::Unsupported("a trace of another carrier".into()));
        };
        let memory = self.gpu.alloc(trace::BYTES, "a trace")?;
        ipc.set_trace(memory.address)?;
        self.trace = Some(memory);
        Ok(())
    }

    /// What the last exchanges wrote; ends the trace. No graph recorded with it may be launched afterwards.
    pub fn end_trace(&mut self) -> Result<Vec<TracedPoint>> {
        let (Carrier::Ipc(ipc), Some(memory)) = (&mut self.carrier, self.trace.take()) else {
            return Ok(Vec::new());
        };
        ipc.set_trace(0)?;
        let mut bytes = vec![0; trace::BYTES];
        self.gpu.read(&memory, 0, &mut bytes)?;
        let words = bytes.as_chunks::<8>().0.iter();
        let words: Vec<u64> = words.map(|word| u64::from_le_bytes(*word)).collect();
        Ok(trace::summarise(&words))
    }

    /// Microseconds of each kernel of an exchange, on its own.
    pub fn profile(&mut self, family: Family) -> Result<Vec<(String, f32)>> {
        self.gpu.times = Some(std::cell::RefCell::new(Vec::new()));
        let queued = self.queue(family, 0, Until::All);
        let times = self.gpu.times.take().map(std::cell::RefCell::into_inner);
        queued?;
        self.wait()?;
        let times = times.unwrap_or_default().into_iter();
        times
            .map(|(name, start, end)| Ok((name, end.since(&self.gpu.device, &start)? * 1e3)))
            .collect()
    }

    /// GB/s of copies of `bytes` to the area of `peer`, while nobody exchanges; the peer must connect anew after it.
    pub fn copy_bandwidth(&self, peer: usize, bytes: usize) -> Result<f64> {
        let (device, stream) = (&self.gpu.device, &self.gpu.stream);
        let Carrier::Ipc(ipc) = &self.carrier else {
            return Err(KernelError::Unsupported("no peer's buffers are mapped".into()));
        };
        let (to, from) = (ipc.area(peer)?, &self.buffers()?.sorted);
        let bytes = bytes.min(from.bytes);
        let (start, end) = (Event::new(device)?, Event::new(device)?);
        const REPEATS: usize = 20;
        copy(&self.gpu, stream, to, from.address, bytes)?;
        start.record(device, stream)?;
        for _ in 0..REPEATS {
            copy(&self.gpu, stream, to, from.address, bytes)?;
        }
        end.record(device, stream)?;
        end.wait(device)?;
        let seconds = f64::from(end.since(device, &start)?) / 1e3;
        Ok((bytes * REPEATS) as f64 / seconds / 1e9)
    }
}
