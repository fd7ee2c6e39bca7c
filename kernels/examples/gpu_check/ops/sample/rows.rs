//! Rows of every kind: what their logits look like, and how they are sampled.

use conclave_kernels::backend::*;

use crate::host::*;

/// One row to sample, with what it borrows.
#[derive(Clone)]
pub struct Row {
    pub params: SampleParams,
    position: u32,
    tokens: Vec<u32>,
    output_start: usize,
    /// Whether the device may keep its tokens.
    pub history: Option<u64>,
    /// The step before which its last token was drawn.
    pub drawn: Option<usize>,
    mask: Option<Vec<u8>>,
    forbidden: Vec<u32>,
    pub what: String,
}

impl Row {
    pub fn plain(params: SampleParams, position: u32) -> Row {
        Row {
            params,
            position,
            tokens: Vec::new(),
            output_start: 0,
            history: None,
            drawn: None,
            mask: None,
            forbidden: Vec::new(),
            what: "plain".into(),
        }
    }

    pub fn how(&self) -> SampleRow<'_> {
        SampleRow {
            params: &self.params,
            position: self.position,
            tokens: &self.tokens,
            output_start: self.output_start,
            history: self.history,
            mask: self.mask.as_deref(),
            forbidden: &self.forbidden,
        }
    }

    /// The row of number `index`: its bits turn each kind of adjustment on, so that 64 rows have all combinations; how it is
    /// drawn goes on from row to row.
    pub fn numbered(random: &mut Random, index: usize, vocab: usize, position: u32) -> Row {
        let has = |bit: usize| index >> bit & 1 == 1;
        let token = |random: &mut Random| random.below(vocab) as u32;
        let draw = random.below(8);
        let params = SampleParams {
            temperature: [0.0, 0.0, 0.3, 0.7, 1.0, 1.0, 1.3, 2.0][draw],
            top_k: [0, 0, 1, 20, 500, 40][random.below(6)],
            top_p: [1.0, 1.0, 0.9, 0.5, 0.999, 0.01][random.below(6)],
            min_p: [0.0, 0.0, 0.05, 1.0][random.below(4)],
            repetition_penalty: if has(1) { 1.3 } else { 1.0 },
            presence_penalty: if has(2) { 0.37 } else { 0.0 },
            frequency_penalty: if has(2) && has(1) != has(0) { -0.11 } else { 0.0 },
            // Some tokens twice: their biases are added one after the other.
            logit_bias: match has(0) {
                true => (0..1 + random.below(40))
                    .map(|_| ((token(random) / 3) * 2 % vocab as u32, random.unit() * 9.0))
                    .collect(),
                false => Vec::new(),
            },
            seed: random.bits(),
            logprobs: has(5).then(|| [0, 1, 5, 20][random.below(4)]),
        };
        let length = [3, 70, 1 + random.below(5000)][random.below(3)];
        let tokens: Vec<u32> = (0..if has(1) || has(2) { length } else { 0 })
            .map(|i| {
                if i % 5 == 4 {
                    7 % vocab as u32
                } else {
                    token(random)
                }
            })
            .collect();
        let allowed = [2, 3, 60][random.below(3)];
        let mask = has(3).then(|| {
            let byte =
                |random: &mut Random| (0..8).fold(0, |b, i| b | u8::from(random.below(allowed) == 0) << i);
            (0..vocab.div_ceil(8)).map(|_| byte(random)).collect()
        });
        Row {
            position,
            output_start: random.below(tokens.len() + 2),
            history: None,
            drawn: None,
            tokens,
            mask,
            forbidden: match has(4) {
                true => (0..1 + random.below(60)).map(|_| token(random)).collect(),
                false => Vec::new(),
            },
            what: format!("bits {index:06b}"),
            params,
        }
    }
}

/// What may be wrong with a row, and what rows at the edge of it are.
pub fn odd(vocab: usize) -> Vec<Row> {
    let seen = |tokens: Vec<u32>, presence: f32| {
        let mut row = Row::plain(SampleParams::default(), 9);
        (row.tokens, row.params.presence_penalty) = (tokens, presence);
        row
    };
    let with = |what: &str, change: &dyn Fn(&mut Row)| {
        let mut row = Row::plain(SampleParams::default(), 9);
        change(&mut row);
        row.what = what.into();
        row
    };
    let past = vocab as u32;
    vec![
        with("bias of an unknown token", &|row| {
            row.params.logit_bias = vec![(past, 1.0)]
        }),
        with("an unknown token forbidden", &|row| row.forbidden = vec![0, past]),
        with("an unknown token before", &|row| *row = seen(vec![1, past], 0.5)),
        with("a short mask", &|row| {
            row.mask = Some(vec![255; vocab.div_ceil(8) - 1])
        }),
        with("an empty mask", &|row| {
            row.mask = Some(vec![0; vocab.div_ceil(8)])
        }),
        with("an empty mask, drawn", &|row| {
            row.mask = Some(vec![0; vocab.div_ceil(32) * 4]);
            (row.params.temperature, row.params.logprobs) = (1.0, Some(5));
        }),
        with("a bias on the one allowed token", &|row| {
            let mut mask = vec![0; vocab.div_ceil(8)];
            mask[3] = 4;
            (row.mask, row.params.logit_bias) = (Some(mask), vec![(26, -50.0), (27, 50.0)]);
            row.params.logprobs = Some(20);
        }),
        with("an infinite bias", &|row| {
            row.params.logit_bias = vec![(5, f32::INFINITY)]
        }),
        with("an infinite bias of a forbidden token", &|row| {
            (row.params.logit_bias, row.forbidden) = (vec![(5, f32::INFINITY)], vec![5]);
        }),
        with("a bias of NaN outside the mask", &|row| {
            let mut mask = vec![255; vocab.div_ceil(8)];
            mask[0] = !32;
            (row.params.logit_bias, row.mask) = (vec![(5, f32::NAN)], Some(mask));
        }),
        with("a penalty of infinity", &|row| {
            *row = seen(vec![1, 4], f32::NEG_INFINITY)
        }),
        with("no temperature", &|row| row.params.temperature = f32::NAN),
        with("a temperature below 0", &|row| row.params.temperature = -1.0),
        with("min_p above 1", &|row| {
            (row.params.temperature, row.params.min_p) = (1.0, 1.5)
        }),
        with("more best ones than the kernels give", &|row| {
            row.params.logprobs = Some(300)
        }),
        with("a forced token", &|row| {
            (row.params.logit_bias, row.params.logprobs) = (vec![(past - 1, 1e30)], Some(2));
        }),
    ]
}

/// Logits of row `index`; one kind after the other.
pub fn logits(random: &mut Random, index: usize, vocab: usize) -> Vec<f32> {
    let mut values = random.values(vocab, 1.0);
    let kind = index / 3 % 8;
    for (i, x) in values.iter_mut().enumerate() {
        *x = match kind {
            // Ties everywhere, both zeros among them.
            1 => (*x * 3.0).round(),
            // All but a few left out.
            2 if i % 97 != 5 => f32::NEG_INFINITY,
            3 => 0.25,
            // Falling: the best ones are neighbours.
            4 => 8.0 - 20.0 * i as f32 / vocab as f32,
            // The best ones are one thread's.
            5 => *x + if i % 2048 == 20 { 9.0 } else { 0.0 },
            _ => *x * *x * *x * 12.0 - if i % 97 == 0 { 30.0 } else { 0.0 },
        };
    }
    match index {
        5 => values[vocab - 1] = f32::NAN,
        17 => (values[3], values[9]) = (f32::INFINITY, f32::NAN),
        46 => values[2] = f32::NAN,
        63 => values.fill(f32::NEG_INFINITY),
        _ => {}
    }
    values
}

impl Row {
    /// A sequence with these tokens, the output from `start` on.
    pub fn begin(&mut self, tokens: Vec<u32>, start: usize) {
        (self.tokens, self.output_start) = (tokens, start);
    }

    /// `token` was drawn, for `step`.
    pub fn go_on(&mut self, token: u32, step: usize) {
        self.tokens.push(token);
        self.drawn = Some(step);
    }

    /// The host gives tokens in the place of the last one.
    pub fn replace_last(&mut self, tokens: &[u32]) {
        self.tokens.pop();
        self.tokens.extend_from_slice(tokens);
        self.drawn = None;
    }

    /// Only the device knows the last token.
    pub fn hide_last(&mut self) {
        if let Some(last) = self.tokens.last_mut() {
            *last = SAMPLED;
        }
    }

    /// A history of more than `length` tokens with a penalty on its output.
    pub fn repeat_past(&mut self, length: usize, penalty: f32) {
        self.tokens = (0..=length as u32).map(|i| i % 613).collect();
        (self.output_start, self.params.frequency_penalty) = (0, penalty);
        self.what = format!("{length} tokens");
    }
}
