//! What rows ask for beyond numbers, packed for one copy: biases, forbidden tokens, tokens for penalties, masks.
//!
//! Pure. The area is bounded; a row that does not fit, or that the kernels do not take (an unknown token, a temperature
//! that is none), is left to the CPU's sampler, which also says what is wrong with it.

#[cfg(test)]
mod tests;

use super::histories::{Histories, Kept};
use super::{MAX_TOP, MAX_VOCAB, SampleSpec};
use crate::backend::{SampleParams, SampleRow};

/// Room for the lists of all rows of a step together, beside their masks: a million tokens.
pub(crate) const LIST_BYTES: usize = 4 << 20;
/// So many rows may have a mask and no list; more if they leave each other room.
const MASKED_ROWS: usize = 256;
/// Lists begin at multiples of so many words.
const ALIGN: usize = 4;

/// Mirrors `SampleExtra`.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq)]
struct SampleExtra {
    mask: u32,
    bias: u32,
    biases: u32,
    forbidden: u32,
    forbids: u32,
    tokens: u32,
    token_count: u32,
    kept_from: u32,
    kept_count: u32,
    kept_to: u32,
    output_start: u32,
    repetition: f32,
    presence: f32,
    frequency: f32,
    unused: [u32; 2],
}

/// In `kept_to`: the device keeps nothing of the row.
const NOT_KEPT: u32 = u32::MAX;

const EXTRA_WORDS: usize = size_of::<SampleExtra>() / 4;

/// Bytes of the area for `rows` rows.
pub(crate) fn bytes(rows: usize, vocab: usize) -> usize {
    let mask = vocab.div_ceil(32).next_multiple_of(ALIGN) * 4;
    rows * size_of::<SampleExtra>() + rows.min(MASKED_ROWS) * mask + LIST_BYTES
}

/// Rows ready for the device.
pub(crate) struct Packed {
    /// One for each row; of a row that is left to the host, a plain one.
    pub(crate) specs: Vec<SampleSpec>,
    /// Words of the area in use, from the first on.
    pub(crate) words: usize,
    /// Rows that are left to the host.
    pub(crate) on_host: Vec<usize>,
}

/// `queued`: of rows of a step that is queued. The device knows their positions, so that specs change only when the rows do,
/// and keeps the tokens that penalties look at; if a row is left to the host, `Histories::forget_step` must follow.
pub(crate) fn pack(
    rows: &[SampleRow<'_>],
    vocab: usize,
    mut queued: Option<&mut Histories>,
    area: &mut [u32],
) -> Packed {
    if let Some(histories) = &mut queued {
        histories.begin_step();
    }
    let mut on_host = Vec::new();
    let headers = rows.iter().filter(|row| has_extra(row)).count();
    let mut filler = Filler {
        used: (headers * EXTRA_WORDS).min(area.len()),
        area,
    };
    let mut next = 0;
    let mut spec = |(i, row): (usize, &SampleRow<'_>)| {
        let place = match has_extra(row) {
            true => {
                next += 1;
                Some(next - 1)
            }
            false => None,
        };
        let position = if queued.is_some() { 0 } else { row.position };
        let kept = match (&mut queued, row.history) {
            (Some(histories), Some(id)) if penalises(row.params) => histories.place(id, penalised(row).0),
            _ => None,
        };
        let fits = suits(row, vocab, kept)
            && place.is_none_or(|place| filler.put(place, row, vocab, kept).is_some());
        if fits {
            return SampleSpec::new(row, position, i, place.map(|place| place as u32));
        }
        on_host.push(i);
        SampleSpec {
            token: i as u32,
            extra: SampleSpec::NO_EXTRA,
            ..SampleSpec::default()
        }
    };
    let specs: Vec<SampleSpec> = rows.iter().enumerate().map(&mut spec).collect();
    Packed {
        specs,
        words: if headers > 0 { filler.used } else { 0 },
        on_host,
    }
}

fn looks_at_all_tokens(params: &SampleParams) -> bool {
    params.repetition_penalty != 1.0
}

fn penalises(params: &SampleParams) -> bool {
    looks_at_all_tokens(params) || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0
}

/// The tokens that penalties look at, and where the output begins among them.
fn penalised<'a>(row: &SampleRow<'a>) -> (&'a [u32], usize) {
    let params = row.params;
    if looks_at_all_tokens(params) {
        let counts = params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        let start = if counts {
            row.output_start
        } else {
            row.tokens.len()
        };
        return (row.tokens, start);
    }
    if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        return (row.tokens.get(row.output_start..).unwrap_or_default(), 0);
    }
    (&[], 0)
}

fn has_extra(row: &SampleRow<'_>) -> bool {
    let listed = !row.params.logit_bias.is_empty() || !row.forbidden.is_empty();
    // Also without a token yet: the first one that is drawn will be kept.
    let counted = !penalised(row).0.is_empty() || (row.history.is_some() && penalises(row.params));
    listed || row.mask.is_some() || counted
}

/// Those of the row's tokens that the device does not have.
fn to_send<'a>(row: &SampleRow<'a>, kept: Option<Kept>) -> &'a [u32] {
    let known = kept.map_or(0, |kept| kept.count as usize);
    penalised(row).0.get(known..).unwrap_or_default()
}

/// Whether the kernels know all that the row asks for.
fn suits(row: &SampleRow<'_>, vocab: usize, kept: Option<Kept>) -> bool {
    let params = row.params;
    let plain = params.temperature == 0.0 && params.logprobs.is_none() && !has_extra(row);
    let numbers = params.temperature >= 0.0
        && params.temperature.is_finite()
        && params.logprobs.is_none_or(|best| best as usize <= MAX_TOP);
    let known = |token: &u32| (*token as usize) < vocab;
    numbers
        && (plain || vocab <= MAX_VOCAB)
        && params.logit_bias.iter().all(|(token, _)| known(token))
        && row.forbidden.iter().all(known)
        && to_send(row, kept)
            .iter()
            .copied()
            .max()
            .is_none_or(|most| known(&most))
        && row.mask.is_none_or(|mask| mask.len() * 8 >= vocab)
}

struct Filler<'a> {
    area: &'a mut [u32],
    used: usize,
}

impl Filler<'_> {
    /// Writes the row's header and its lists; `None`, and nothing taken, if they do not fit.
    fn put(&mut self, place: usize, row: &SampleRow<'_>, vocab: usize, kept: Option<Kept>) -> Option<()> {
        let before = self.used;
        let extra = self.lists(row, vocab, kept);
        let Some(header) = self
            .area
            .get_mut(place * EXTRA_WORDS..(place + 1) * EXTRA_WORDS)
            .filter(|_| extra.is_some())
        else {
            self.used = before;
            return None;
        };
        header.copy_from_slice(&extra?.words());
        Some(())
    }

    fn lists(&mut self, row: &SampleRow<'_>, vocab: usize, kept: Option<Kept>) -> Option<SampleExtra> {
        let params = row.params;
        let (all, output_start) = penalised(row);
        let tokens = to_send(row, kept);
        let mut extra = SampleExtra {
            biases: params.logit_bias.len() as u32,
            forbids: row.forbidden.len() as u32,
            token_count: tokens.len() as u32,
            kept_from: kept.map_or(0, |kept| kept.from),
            kept_count: kept.map_or(0, |kept| kept.count),
            kept_to: kept.map_or(NOT_KEPT, |kept| kept.to),
            output_start: output_start.min(all.len()) as u32,
            repetition: params.repetition_penalty,
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
            ..SampleExtra::default()
        };
        extra.bias = self.list(2 * params.logit_bias.len(), |to| {
            let mut entries = params.logit_bias.clone();
            // Stable: several biases of one token are added in their order.
            entries.sort_by_key(|(token, _)| *token);
            for ([token, bias], entry) in to.as_chunks_mut::<2>().0.iter_mut().zip(entries) {
                (*token, *bias) = (entry.0, entry.1.to_bits());
            }
        })?;
        extra.forbidden = self.list(row.forbidden.len(), |to| to.copy_from_slice(row.forbidden))?;
        extra.tokens = self.list(tokens.len(), |to| to.copy_from_slice(tokens))?;
        if let Some(mask) = row.mask {
            extra.mask = self.list(vocab.div_ceil(32), |to| {
                let (whole, rest) = mask.as_chunks::<4>();
                for (to, word) in to.iter_mut().zip(whole) {
                    *to = u32::from_le_bytes(*word);
                }
                if let Some(to) = to.get_mut(whole.len()) {
                    let mut last = [0; 4];
                    last[..rest.len()].copy_from_slice(rest);
                    *to = u32::from_le_bytes(last);
                }
            })?;
        }
        Some(extra)
    }

    /// Where a list of `words` words begins; 0 for none.
    fn list(&mut self, words: usize, fill: impl FnOnce(&mut [u32])) -> Option<u32> {
        if words == 0 {
            return Some(0);
        }
        let begin = self.used;
        fill(self.area.get_mut(begin..begin + words)?);
        self.used = (begin + words).next_multiple_of(ALIGN).min(self.area.len());
        Some(begin as u32)
    }
}

impl SampleExtra {
    fn words(&self) -> [u32; EXTRA_WORDS] {
        [
            self.mask,
            self.bias,
            self.biases,
            self.forbidden,
            self.forbids,
            self.tokens,
            self.token_count,
            self.kept_from,
            self.kept_count,
            self.kept_to,
            self.output_start,
            self.repetition.to_bits(),
            self.presence.to_bits(),
            self.frequency.to_bits(),
            self.unused[0],
            self.unused[1],
        ]
    }
}
