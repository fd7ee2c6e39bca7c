//! Many tokens over NCCL: each rank carries as many rows as it has. Pieces of even and of odd number have messages of their
//! own, and NCCL a stream of its own, so that two can be under way at once: while the library carries one, the device
//! works for the other. What a piece alone sends to ranks of this host is written straight into their memory by the kernels that make it, and
//! only its heads are carried ([`super::reach`]).
//!
//! Must stay true: what the library carries waits for the kernel that wrote it (`packed`), and what reads it waits for the
//! library (`carried`), whichever streams they are on; the library is asked in the same order on every rank.

use super::epoch::Live;
use super::launch;
use super::messages::{ArriveMany, HEAD, Messages, PackMany, Places, ResultsMany, Rows, carried};
use crate::backend::Result;
use crate::cuda::exchange::connected::{Connected, of_no_epoch};
use crate::cuda::exchange::{ManyResults, ManyRows, Tokens, Wire};
use crate::cuda::format::padded;
use crate::cuda::plane::PLANE_ROWS;
use crate::cuda::{Event, Gpu, Memory, Stream};

/// Pieces under way at once.
const CHANNELS: usize = 2;
/// Multiprocessors that the library's kernel wants, each to itself: while others occupy them all, it does not begin.
const CHANNELS_OF_NCCL: u32 = 32;
/// From so many tokens on, this rank's own results are summed while the others' are carried.
const BESIDE_TOKENS: usize = 1024;

/// The library's stream beside the backend's.
pub(super) struct Beside {
    stream: Stream,
    packed: [Event; CHANNELS],
    carried: [Event; CHANNELS],
}

impl Beside {
    pub(super) fn new(gpu: &Gpu) -> Result<Beside> {
        let events = || Ok([Event::new(&gpu.device)?, Event::new(&gpu.device)?]);
        Ok(Beside {
            stream: Stream::first(&gpu.device)?,
            packed: events()?,
            carried: events()?,
        })
    }

    pub(super) fn is_idle(&self, gpu: &Gpu) -> Result<bool> {
        self.stream.is_idle(&gpu.device)
    }

    /// The library's stream, which goes on when the backend's has come as far as it stands.
    fn follow(&self, gpu: &Gpu, channel: usize) -> Result<&Stream> {
        self.packed[channel].record(&gpu.device, &gpu.stream)?;
        self.stream.wait_for(&gpu.device, &self.packed[channel])?;
        Ok(&self.stream)
    }

    /// All of a channel has been asked for.
    fn asked(&self, gpu: &Gpu, channel: usize) -> Result<()> {
        self.carried[channel].record(&gpu.device, &self.stream)
    }

    /// The backend's stream goes on when it has been carried.
    fn come(&self, gpu: &Gpu, channel: usize) -> Result<()> {
        gpu.stream.wait_for(&gpu.device, &self.carried[channel])
    }
}

/// Where a piece's messages are.
struct Channel<'a> {
    index: usize,
    connected: &'a Connected,
    places: &'a Places,
    /// Which slots are for experts here: U32 `[ranks][many_tokens, top_k]`.
    local: u64,
    /// Ranks whose memory is written straight: a bit each.
    straight: u64,
}

/// This rank's tokens of a piece, and the results that there are for all ranks' tokens of it.
type Work<'a> = (&'a Tokens, &'a ManyResults);

impl Channel<'_> {
    /// Where this rank's tokens are in its message, as a plane of so many blocks; as FP8 they are none.
    fn plane(&self, rank: u32, count: usize) -> Option<(u64, usize)> {
        let rows = self.places.message(rank) + HEAD as u64;
        (self.connected.shape.wire == Wire::Bf16).then(|| (rows, count.div_ceil(PLANE_ROWS)))
    }

    fn messages(&self) -> Messages {
        let mut messages = self.places.many();
        messages.straight = self.straight;
        messages
    }

    /// Of so many bytes to or from `rank`, those that the library carries.
    fn carried(&self, rank: u32, bytes: usize) -> usize {
        carried(self.straight, rank, bytes)
    }

    fn results(&self, (tokens, results): Work<'_>, own: Rows) -> Result<ResultsMany> {
        Ok(ResultsMany {
            exchange: self.connected.params,
            messages: self.messages(),
            tokens: self.connected.tokens(tokens, self.connected.shape.many_tokens)?,
            sorted: results.sorted,
            row_of_slot: results.row_of_slot,
            hidden: results.hidden,
            parts: 1,
            own: own as i32,
        })
    }
}

impl Live {
    fn channel(&self, index: usize, local: &Memory) -> Result<Channel<'_>> {
        let (connected, places) = match (index, &self.second) {
            (0, _) => (&self.connected, &self.places),
            (_, Some((connected, places))) => (connected, places),
            _ => return Err(of_no_epoch()),
        };
        let shape = &connected.shape;
        Ok(Channel {
            index,
            connected,
            places,
            local: local.address + (index * shape.many_rows() * shape.top_k * 4) as u64,
            straight: 0,
        })
    }

    /// Of a piece beside which another is under way: what it sends is carried while the device works for the other.
    fn of_piece(&self, tokens: &Tokens, local: &Memory) -> Result<Channel<'_>> {
        self.channel(tokens.piece % CHANNELS, local)
    }

    /// Of a piece alone.
    fn alone(&self, local: &Memory) -> Result<Channel<'_>> {
        let straight = self.straight;
        self.channel(0, local)
            .map(|channel| Channel { straight, ..channel })
    }

    pub(super) fn plane(&self, local: &Memory, piece: usize, count: usize) -> Option<(u64, usize)> {
        let channel = self.channel(piece % CHANNELS, local).ok()?;
        let fits = count <= channel.connected.shape.many_tokens;
        channel
            .plane(self.communicator.rank, count)
            .filter(|_| fits && count > 0)
    }

    fn pack_many(
        &self,
        gpu: &Gpu,
        channel: &Channel<'_>,
        tokens: &Tokens,
        plane: (u64, usize),
    ) -> Result<()> {
        self.fits(tokens, self.tokens_of(self.communicator.rank, tokens.piece))?;
        let (connected, shape) = (channel.connected, &channel.connected.shape);
        let there = channel.plane(self.communicator.rank, tokens.count) == Some(plane);
        let pack = PackMany {
            exchange: connected.params,
            messages: channel.messages(),
            tokens: connected.tokens(tokens, shape.many_tokens)?,
            plane: if there { 0 } else { plane.0 },
            rows: connected.places.rows.address,
            plane_blocks: plane.1 as i32,
            padded: padded(shape.hidden) as i32,
            fp8: i32::from(shape.wire == Wire::Fp8),
            parts: 1,
            // Of two ranks nearly every row is for both.
            picks: i32::from(channel.straight.count_ones() > 1),
        };
        launch::pack_many(gpu, &pack)
    }

    fn carry_there(&self, stream: &Stream, channel: &Channel<'_>, tokens: &Tokens) -> Result<()> {
        let (places, own) = (channel.places, self.communicator.rank);
        let bytes = |rank| places.sizes.many_bytes(self.tokens_of(rank, tokens.piece));
        let to = |rank| (places.message(own), channel.carried(rank, bytes(own)));
        let from = |rank| (places.message(rank), channel.carried(rank, bytes(rank)));
        self.carry(stream, to, from)
    }

    fn arrive_many(&self, gpu: &Gpu, channel: &Channel<'_>, tokens: &Tokens) -> Result<ManyRows> {
        let (connected, places) = (channel.connected, channel.places);
        let arrive = ArriveMany {
            exchange: connected.params,
            messages: places.many(),
            local: channel.local,
            layer: tokens.layer as i32,
        };
        launch::arrive_many(gpu, self.rows(tokens.piece), &arrive)?;
        Ok(ManyRows {
            rows: places.there + HEAD as u64,
            row_bytes: places.sizes.many_row,
            planes: connected.shape.wire == Wire::Bf16,
            region_bytes: places.sizes.there_stride,
            wire: connected.shape.wire,
            ids: channel.local,
            counts: connected.places.counts.address,
            total: connected.places.rows.address,
        })
    }

    /// Sums for the other ranks, for this one, or for all.
    fn return_many(&self, gpu: &Gpu, channel: &Channel<'_>, work: Work<'_>, own: Rows) -> Result<()> {
        let (params, tokens) = (channel.results(work, own)?, work.0);
        let (rows, beside) = match own {
            Rows::Own => (tokens.count, Some(CHANNELS_OF_NCCL)),
            Rows::Others => (self.rows(tokens.piece) - tokens.count, None),
            Rows::All => (self.rows(tokens.piece), None),
        };
        launch::return_many(gpu, rows, beside, &params)
    }

    fn carry_back(&self, stream: &Stream, channel: &Channel<'_>, tokens: &Tokens) -> Result<()> {
        let places = channel.places;
        let to = |rank| {
            let bytes = places.sizes.many_back_bytes(self.tokens_of(rank, tokens.piece));
            (places.results_for(rank), channel.carried(rank, bytes))
        };
        let own = places.sizes.many_back_bytes(tokens.count);
        let from = |rank| (places.results_of(rank), channel.carried(rank, own));
        self.carry(stream, to, from)
    }

    /// `whole`: this rank's own results have been summed.
    fn sum_many(&self, gpu: &Gpu, channel: &Channel<'_>, work: Work<'_>, whole: bool) -> Result<()> {
        launch::sum_many(gpu, whole, &channel.results(work, Rows::Own)?)?;
        // A long step is watched layer by layer.
        if gpu.stream.is_capturing(&gpu.device)? {
            return Ok(());
        }
        self.watch.mark(gpu).map(|_| ())
    }

    pub(super) fn dispatch_many(
        &self,
        gpu: &Gpu,
        local: &Memory,
        tokens: &Tokens,
        plane: (u64, usize),
    ) -> Result<ManyRows> {
        let channel = self.alone(local)?;
        self.pack_many(gpu, &channel, tokens, plane)?;
        self.carry_there(&gpu.stream, &channel, tokens)?;
        self.arrive_many(gpu, &channel, tokens)
    }

    pub(super) fn combine_many(
        &self,
        gpu: &Gpu,
        (beside, local): (&Beside, &Memory),
        tokens: &Tokens,
        results: &ManyResults,
    ) -> Result<()> {
        let (channel, work) = (self.alone(local)?, (tokens, results));
        if channel.straight != 0 {
            // The links hold these up, not the memory: own sums are made beside them.
            self.return_many(gpu, &channel, work, Rows::All)?;
            self.carry_back(&gpu.stream, &channel, tokens)?;
            return self.sum_many(gpu, &channel, work, true);
        }
        if tokens.count < BESIDE_TOKENS {
            self.return_many(gpu, &channel, work, Rows::Others)?;
            self.carry_back(&gpu.stream, &channel, tokens)?;
            return self.sum_many(gpu, &channel, work, false);
        }
        self.start_combine(gpu, (beside, &channel), work)?;
        beside.come(gpu, channel.index)?;
        self.sum_many(gpu, &channel, work, true)
    }

    fn start_combine(
        &self,
        gpu: &Gpu,
        (beside, channel): (&Beside, &Channel<'_>),
        work: Work<'_>,
    ) -> Result<()> {
        self.return_many(gpu, channel, work, Rows::Others)?;
        let stream = beside.follow(gpu, channel.index)?;
        self.carry_back(stream, channel, work.0)?;
        beside.asked(gpu, channel.index)?;
        self.return_many(gpu, channel, work, Rows::Own)
    }

    pub(super) fn start_dispatch_of(
        &self,
        gpu: &Gpu,
        (beside, local): (&Beside, &Memory),
        tokens: &Tokens,
        plane: (u64, usize),
    ) -> Result<()> {
        let channel = self.of_piece(tokens, local)?;
        self.pack_many(gpu, &channel, tokens, plane)?;
        let stream = beside.follow(gpu, channel.index)?;
        self.carry_there(stream, &channel, tokens)?;
        beside.asked(gpu, channel.index)
    }

    pub(super) fn finish_dispatch_of(
        &self,
        gpu: &Gpu,
        (beside, local): (&Beside, &Memory),
        tokens: &Tokens,
    ) -> Result<ManyRows> {
        let channel = self.of_piece(tokens, local)?;
        beside.come(gpu, channel.index)?;
        self.arrive_many(gpu, &channel, tokens)
    }

    pub(super) fn start_combine_of(
        &self,
        gpu: &Gpu,
        (beside, local): (&Beside, &Memory),
        work: Work<'_>,
    ) -> Result<()> {
        let channel = self.of_piece(work.0, local)?;
        self.start_combine(gpu, (beside, &channel), work)
    }

    pub(super) fn finish_combine_of(
        &self,
        gpu: &Gpu,
        (beside, local): (&Beside, &Memory),
        work: Work<'_>,
    ) -> Result<()> {
        let channel = self.of_piece(work.0, local)?;
        beside.come(gpu, channel.index)?;
        self.sum_many(gpu, &channel, work, true)
    }
}
