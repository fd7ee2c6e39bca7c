//! Two pieces of a step under way at once: what a piece sends is packed on the backend's stream and carried by the copy engines,
//! which leave the multiprocessors to another piece's attention and experts.
//!
//! Pieces of even and of odd number each have a channel: receive buffers (behind the others of a rank's area), a staging area,
//! and a count of exchanges of its own, so that the protocol of `mod.rs` holds for each channel alone.
//! Must stay true: a channel's stamps (header, done) are carried behind its rows by the same stream, so whoever sees the
//! stamp sees the rows; nothing is packed before what was packed last has been carried (`carried`).

use std::cell::Cell;

use super::carried::Carried;
use super::connected::{Connected, of_no_epoch};
use super::ipc::Epoch;
use super::layout::Area;
use super::peer::copy;
use super::places::Places;
use super::{ExchangeShape, Halves, MAX_RANKS, ManyResults, ManyRows, StepSizes, Tokens};
use crate::backend::Result;
use crate::cuda::{Event, Gpu, Memory, Stream};

/// Pieces under way at once.
pub(super) const CHANNELS: usize = 2;

pub(super) struct TwoHalves {
    staging: Memory,
    stream: Stream,
    channels: [Channel; CHANNELS],
    step: Cell<StepSizes>,
}

struct Channel {
    connected: Option<Connected>,
    kept: Option<Places>,
    /// This channel's part of every rank's area, as mapped here.
    areas: [u64; MAX_RANKS],
    staging: u64,
    packed: Event,
    carried: Event,
}

/// A channel has no few-token family.
pub(super) fn channel_shape(shape: &ExchangeShape) -> ExchangeShape {
    ExchangeShape {
        few_tokens: 1,
        exact: false,
        ..*shape
    }
}

/// Bytes of one channel; none where there is no many-token family.
pub(super) fn channel_bytes(shape: &ExchangeShape) -> usize {
    match shape.many_tokens {
        0 => 0,
        _ => Area::new(&channel_shape(shape)).1.next_multiple_of(1024),
    }
}

impl TwoHalves {
    /// `bytes`: of a channel.
    pub(super) fn new(gpu: &Gpu, bytes: usize) -> Result<TwoHalves> {
        let staging = gpu.alloc(CHANNELS * bytes, "staging buffers of the exchange")?;
        let channel = || {
            Ok(Channel {
                connected: None,
                kept: None,
                areas: [0; MAX_RANKS],
                staging: 0,
                packed: Event::new(&gpu.device)?,
                carried: Event::new(&gpu.device)?,
            })
        };
        Ok(TwoHalves {
            staging,
            stream: Stream::new(&gpu.device)?,
            channels: [channel()?, channel()?],
            step: Cell::default(),
        })
    }

    /// `areas`: of every rank, as mapped here, with the channels behind `first` bytes. The caller clears this rank's.
    pub(super) fn connect(
        &mut self,
        gpu: &Gpu,
        epoch: &Epoch<'_>,
        (areas, first): (&[u64; MAX_RANKS], usize),
        (host, sharing): (u64, usize),
    ) -> Result<()> {
        self.leave(gpu)?;
        let bytes = channel_bytes(&epoch.shape);
        if self.staging.bytes < CHANNELS * bytes {
            return Err(crate::cuda::shape(
                "exchange",
                "bytes of the staging buffers",
                self.staging.bytes,
                CHANNELS * bytes,
            ));
        }
        let shape = channel_shape(&epoch.shape);
        self.staging.clear(&gpu.device, &gpu.stream, CHANNELS * bytes)?;
        for (index, channel) in self.channels.iter_mut().enumerate() {
            channel.staging = self.staging.address + (index * bytes) as u64;
            channel.areas = areas.map(|area| area + (first + index * bytes) as u64);
            let mut area = [0; MAX_RANKS];
            area[..shape.ranks].fill(channel.staging);
            area[epoch.rank] = channel.areas[epoch.rank];
            let epoch = Epoch {
                shape,
                ..epoch.clone()
            };
            let kept = channel.kept.take();
            channel.connected = Some(Connected::new(gpu, &epoch, area, (host, true, sharing), kept)?);
        }
        Ok(())
    }

    /// Waits for what is being carried.
    pub(super) fn leave(&mut self, gpu: &Gpu) -> Result<()> {
        self.stream.wait(&gpu.device)?;
        for channel in &mut self.channels {
            if let Some(connected) = channel.connected.take() {
                channel.kept = Some(connected.places);
            }
        }
        Ok(())
    }

    pub(super) fn set_timeout(&self, gpu: &Gpu, nanoseconds: u64) -> Result<()> {
        let mut connected = self
            .channels
            .iter()
            .filter_map(|channel| channel.connected.as_ref());
        connected.try_for_each(|connected| connected.places.set_timeout(gpu, nanoseconds))
    }

    pub(super) fn begin(&self, sizes: &StepSizes) {
        self.step.set(*sizes);
    }

    fn of(&self, tokens: &Tokens) -> Result<(&Channel, &Connected)> {
        let channel = &self.channels[tokens.piece % CHANNELS];
        let connected = channel.connected.as_ref().ok_or_else(of_no_epoch)?;
        Ok((channel, connected))
    }

    /// Carries what `pack` leaves in the staging area, stretch by stretch, to every other rank.
    fn carry<const N: usize>(
        &self,
        gpu: &Gpu,
        (channel, connected): (&Channel, &Connected),
        stretches: [Carried; N],
        pack: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        gpu.stream.wait_for(&gpu.device, &channel.carried)?;
        pack()?;
        channel.packed.record(&gpu.device, &gpu.stream)?;
        self.stream.wait_for(&gpu.device, &channel.packed)?;
        let (rank, ranks) = (connected.params.rank as u32, connected.params.ranks as u32);
        for distance in 1..ranks {
            let peer = (rank + distance) % ranks;
            for stretch in stretches.iter().filter(|stretch| stretch.bytes > 0) {
                let to = channel.areas[peer as usize] + stretch.of(rank);
                copy(
                    gpu,
                    &self.stream,
                    to,
                    channel.staging + stretch.of(peer),
                    stretch.bytes,
                )?;
            }
        }
        channel.carried.record(&gpu.device, &self.stream)
    }
}

impl Halves for TwoHalves {
    fn start_dispatch(&self, gpu: &Gpu, tokens: &Tokens, plane: (u64, usize)) -> Result<()> {
        let (channel, connected) = self.of(tokens)?;
        let [header, rows, ids, weights] = connected.at.dispatch_many(&connected.shape, tokens.count);
        self.carry(gpu, (channel, connected), [rows, ids, weights, header], || {
            connected.send_many(gpu, tokens, plane)
        })
    }

    fn finish_dispatch(&self, gpu: &Gpu, tokens: &Tokens) -> Result<ManyRows> {
        self.of(tokens)?.1.arrive_many(gpu, tokens)
    }

    fn start_combine(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()> {
        let (channel, connected) = self.of(tokens)?;
        // How many rows came is known to the device alone; no rank has more than the largest.
        let step = self.step.get();
        let each = step.many.unwrap_or(connected.shape.many_tokens);
        let most = step.largest.saturating_sub(tokens.piece * each).min(each);
        let stretches = connected.at.combine_many(&connected.shape, most);
        self.carry(gpu, (channel, connected), stretches, || {
            connected.return_many(gpu, tokens, results)
        })
    }

    fn finish_combine(&self, gpu: &Gpu, tokens: &Tokens, results: &ManyResults) -> Result<()> {
        self.of(tokens)?.1.settle_many(gpu, tokens, results)
    }
}
