//! One op at a time, over tables of shapes.

use conclave_kernels::backend::*;
use conclave_plan::model::{AttentionSpec, MoeSpec, QkNorm, Scoring};

use crate::host::*;
use crate::pair;
use crate::report::Report;

const KINDS: [Kind; 8] = [
    Kind::Bf16,
    Kind::F16,
    Kind::F32,
    Kind::Fp8,
    Kind::Int4(128, true),
    Kind::Int4(128, false),
    Kind::Int4(32, false),
    Kind::Int4(64, true),
];

/// Few-token kernels keep activations to 16 bits of mantissa and accumulate in F32.
const EXACT: f64 = 2e-4;
/// The CPU rounds INT4's activations to 16 bits of a row's largest.
const INT4: f64 = 1e-3;
/// Matrix products on bf16 operands.
const ROUNDED: f64 = 1e-2;

fn bound(kind: Kind) -> f64 {
    if matches!(kind, Kind::Int4(..)) {
        INT4
    } else {
        EXACT
    }
}

/// Norm and head: (vocab, hidden), rows of logits.
pub fn head(report: &mut Report) {
    let shapes = [
        (48, 128, 1),
        (200, 256, 3),
        (384, 384, 5),
        (130, 3072, 9),
        (6, 128, 2),
        (1000, 6144, 33),
    ];
    for kind in KINDS {
        for (vocab, hidden, rows) in shapes {
            let tokens = rows + 2;
            let (mut cpu, mut gpu) = pair(&limits(tokens, 2, 8));
            let mut results = Vec::new();
            for backend in [&mut cpu, &mut gpu] {
                let random = &mut Random(vocab as u64);
                let weight = backend
                    .upload_linear(&linear(random, vocab, hidden, kind))
                    .unwrap();
                let norm = backend.upload_vector(&random.values(hidden, 2.0)).unwrap();
                let x = upload(backend.as_mut(), &random.values(tokens * hidden, 3.0));
                let mut batch = batch(random, &[(0, tokens)], 8, 10);
                batch.logit_rows = (1..=rows as u32).collect();
                let logits = poisoned(backend.as_mut(), rows * vocab);
                backend.begin(&batch).unwrap();
                backend.head(1e-6, norm, weight, &x, &logits).unwrap();
                results.push(download(backend.as_mut(), &logits, rows * vocab));
            }
            report.compare(
                &format!("head {kind:?} [{vocab}, {hidden}] x {rows}"),
                &results[1],
                &results[0],
                bound(kind),
            );
        }
    }
}

pub fn linear_add(report: &mut Report) {
    let shapes = [
        (128, 128, 1),
        (96, 384, 2),
        (256, 512, 4),
        (112, 640, 7),
        (3072, 1536, 1),
        (320, 3072, 131),
    ];
    for kind in KINDS {
        for (outputs, inputs, tokens) in shapes {
            let (mut cpu, mut gpu) = pair(&limits(tokens, 2, 16));
            let mut results = Vec::new();
            for backend in [&mut cpu, &mut gpu] {
                let random = &mut Random(outputs as u64 + 7);
                let weight = backend
                    .upload_linear(&linear(random, outputs, inputs, kind))
                    .unwrap();
                let x = upload(backend.as_mut(), &random.values(tokens * inputs, 2.0));
                let hidden = upload(backend.as_mut(), &random.values(tokens * outputs, 0.5));
                backend.begin(&batch(random, &[(0, tokens)], 16, 10)).unwrap();
                backend.linear_add(weight, &x, &hidden).unwrap();
                results.push(download(backend.as_mut(), &hidden, tokens * outputs));
            }
            report.compare(
                &format!("linear_add {kind:?} [{outputs}, {inputs}] x {tokens}"),
                &results[1],
                &results[0],
                bound(kind),
            );
        }
    }
}

/// Projections, norm, rope, pages and attention: a first step fills contexts, a second reads them.
pub fn qkv_attention(report: &mut Report) {
    // heads, kv heads, head_dim, rotary
    let specs = [
        (6, 2, 64, 32),
        (6, 2, 128, 64),
        (48, 8, 128, 64),
        (4, 4, 64, 64),
        (10, 1, 128, 128),
    ];
    let norms = [QkNorm::WholeProjection, QkNorm::PerHead, QkNorm::None];
    let types = [KvDtype::Bf16, KvDtype::Fp8E4m3, KvDtype::Fp8E5m2];
    for (index, (heads, kv_heads, head_dim, rotary_dim)) in specs.into_iter().enumerate() {
        for (turn, dtype) in types.into_iter().enumerate() {
            let qk_norm = norms[(index + turn) % 3];
            let spec = AttentionSpec {
                heads,
                kv_heads,
                head_dim,
                rotary_dim,
                rope_theta: 5e6,
                qk_norm,
            };
            let hidden = 256;
            let first: &[(usize, usize)] = &[(0, 1), (0, 40), (0, 77), (0, 128)];
            let second: &[(usize, usize)] = &[(1, 1), (40, 9), (77, 1), (128, 33)];
            let third: &[(usize, usize)] = &[(2, 1), (49, 1), (78, 150), (161, 7)];
            let total = 256;
            let (mut cpu, mut gpu) = pair(&limits(total, 4, 20));
            let mut results = Vec::new();
            for backend in [&mut cpu, &mut gpu] {
                let random = &mut Random(heads as u64);
                let mut matrix = |rows| {
                    backend
                        .upload_linear(&linear(random, rows, hidden, Kind::Bf16))
                        .unwrap()
                };
                let (q, k, v) = (
                    matrix(spec.q_width()),
                    matrix(spec.kv_width()),
                    matrix(spec.kv_width()),
                );
                let o = matrix(hidden);
                let lengths = match qk_norm {
                    QkNorm::PerHead => (head_dim, head_dim),
                    _ => (spec.q_width(), spec.kv_width()),
                };
                let norm = backend.upload_vector(&random.values(hidden, 1.5)).unwrap();
                let q_norm = Some(backend.upload_vector(&random.values(lengths.0, 1.5)).unwrap());
                let k_norm = Some(backend.upload_vector(&random.values(lengths.1, 1.5)).unwrap());
                let weights = AttentionWeights {
                    norm,
                    q,
                    k,
                    v,
                    o,
                    q_norm,
                    k_norm,
                };
                let kv = backend
                    .alloc_kv(64, PAGE_TOKENS, kv_heads, head_dim, dtype)
                    .unwrap();
                let tables = batch(random, &[(0, 16), (0, 64), (0, 240), (0, 176)], 64, 10);
                let mut outputs = Vec::new();
                for runs in [first, second, third] {
                    let mut step = Batch::default();
                    for (run, table) in runs.iter().zip(&tables.runs) {
                        let at = step.ids.len() as u32;
                        step.ids.extend(std::iter::repeat_n(0, run.1));
                        step.positions.extend((run.0 as u32..).take(run.1));
                        step.runs.push(BatchRun {
                            first: at,
                            len: run.1 as u32,
                            position: run.0 as u32,
                            pages: table.pages.clone(),
                        });
                    }
                    let tokens = step.ids.len();
                    let x = upload(backend.as_mut(), &random.values(tokens * hidden, 3.0));
                    let queries = poisoned(backend.as_mut(), tokens * spec.q_width());
                    let out = poisoned(backend.as_mut(), tokens * spec.q_width());
                    backend.begin(&step).unwrap();
                    backend.qkv(&spec, 1e-6, &weights, &x, kv, &queries).unwrap();
                    backend.attention(&spec, kv, &queries, &out).unwrap();
                    outputs.push(download(backend.as_mut(), &queries, tokens * spec.q_width()));
                    outputs.push(download(backend.as_mut(), &out, tokens * spec.q_width()));
                }
                results.push(outputs);
            }
            for (i, (found, expected)) in results[1].iter().zip(&results[0]).enumerate() {
                let what = if i % 2 == 0 { "q" } else { "attention" };
                // Keys that round differently by one bit; the prefill kernel rounds q and p to bf16.
                let few = found.len() <= 128 * spec.q_width();
                let bound = if i % 2 == 0 {
                    EXACT
                } else if few {
                    2e-3
                } else {
                    ROUNDED
                };
                let bound = if dtype == KvDtype::Bf16 || i % 2 == 0 {
                    bound
                } else {
                    ROUNDED
                };
                report.compare(
                    &format!(
                        "{what} {heads}/{kv_heads} x {head_dim} {qk_norm:?} {dtype:?} step {}",
                        i / 2
                    ),
                    found,
                    expected,
                    bound,
                );
            }
        }
    }
}

pub fn route(report: &mut Report) {
    let shapes = [
        (5, 3, 128, 1),
        (6, 4, 256, 7),
        (256, 8, 3072, 4),
        (256, 8, 3072, 130),
        (128, 8, 384, 33),
    ];
    for (experts, top_k, hidden, tokens) in shapes {
        for (scoring, renormalize, biased) in
            [(Scoring::Sigmoid, true, true), (Scoring::Softmax, false, false)]
        {
            let spec = MoeSpec {
                experts,
                top_k,
                intermediate: 128,
                scoring,
                selection_bias: biased,
                renormalize,
            };
            let (mut cpu, mut gpu) = pair(&limits(tokens, 1, 16));
            let mut results = Vec::new();
            for backend in [&mut cpu, &mut gpu] {
                let random = &mut Random(experts as u64);
                let gate = backend
                    .upload_linear(&linear(random, experts, hidden, Kind::F32))
                    .unwrap();
                let norm = backend.upload_vector(&random.values(hidden, 1.5)).unwrap();
                let bias = backend.upload_vector(&random.values(experts, 0.3)).unwrap();
                let x = upload(backend.as_mut(), &random.values(tokens * hidden, 3.0));
                let b = backend.as_mut();
                let normed = poisoned(b, tokens * hidden);
                let (ids, weights, logits) = (
                    poisoned(b, tokens * top_k),
                    poisoned(b, tokens * top_k),
                    poisoned(b, tokens * experts),
                );
                b.begin(&batch(random, &[(0, tokens)], 16, 10)).unwrap();
                b.route(
                    &spec,
                    1e-6,
                    norm,
                    gate,
                    biased.then_some(bias),
                    &x,
                    &normed,
                    &ids,
                    &weights,
                    Some(&logits),
                )
                .unwrap();
                let ids = download(b, &ids, tokens * top_k)
                    .iter()
                    .map(|x| x.to_bits())
                    .collect::<Vec<_>>();
                let floats = [
                    download(b, &normed, tokens * hidden),
                    download(b, &logits, tokens * experts),
                    download(b, &weights, tokens * top_k),
                ];
                results.push((ids, floats));
            }
            let name = format!("{top_k} of {experts}, {hidden} x {tokens} {scoring:?}");
            let equal = results[0]
                .0
                .iter()
                .zip(&results[1].0)
                .filter(|(a, b)| a == b)
                .count();
            // Scores closer than rounding may change places.
            let total = results[0].0.len();
            report.expect(
                &format!("ids {name}"),
                equal * 1000 >= total * 995,
                &format!("{equal} of {total}"),
            );
            for (i, what) in ["normed", "router logits", "weights"].into_iter().enumerate() {
                report.compare(
                    &format!("{what} {name}"),
                    &results[1].1[i],
                    &results[0].1[i],
                    if i == 2 { 2e-3 } else { EXACT },
                );
            }
        }
    }
}

pub fn experts(report: &mut Report) {
    let shapes: [(usize, usize, usize, usize); 6] = [
        (128, 128, 5, 1),
        (256, 128, 6, 9),
        (384, 256, 3, 70),
        (3072, 1536, 8, 3),
        (3072, 1536, 8, 37),
        (128, 384, 16, 1100),
    ];
    let kinds = [
        Kind::Bf16,
        Kind::Fp8,
        Kind::Int4(128, true),
        Kind::Int4(32, false),
    ];
    for kind in kinds {
        for (hidden, inter, count, rows) in shapes {
            let tokens = rows.div_ceil(2);
            let (mut cpu, mut gpu) = pair(&limits(tokens.max(rows), 1, 80));
            let mut results = Vec::new();
            for backend in [&mut cpu, &mut gpu] {
                let random = &mut Random((hidden + rows) as u64);
                let list: Vec<HostExpert> = (0..count).map(|_| expert(random, hidden, inter, kind)).collect();
                let id = backend.upload_experts(&list).unwrap();
                let input = upload(backend.as_mut(), &random.values(tokens * hidden, 2.0));
                let out = poisoned(backend.as_mut(), rows * hidden);
                // The first third all to one expert: more rows than one group holds.
                let pick = |i: usize, random: &mut Random| if i < rows / 3 { 1 } else { random.below(count) };
                let rows: Vec<ExpertRow> = (0..rows)
                    .map(|i| ExpertRow {
                        row: (i / 2) as u32,
                        expert: pick(i, random) as u32,
                    })
                    .collect();
                backend.experts(id, &input, &rows, &out).unwrap();
                results.push(download(backend.as_mut(), &out, rows.len() * hidden));
            }
            let bound = if matches!(kind, Kind::Int4(..)) {
                2e-3
            } else {
                5e-4
            };
            report.compare(
                &format!("experts {kind:?} {count} x [{hidden}, {inter}], {rows} rows"),
                &results[1],
                &results[0],
                bound,
            );
        }
    }
}

pub fn combine(report: &mut Report) {
    for (tokens, k, hidden) in [(1, 3, 128), (5, 8, 3072), (33, 4, 252)] {
        let (mut cpu, mut gpu) = pair(&limits(tokens, 1, 8));
        let mut results = Vec::new();
        for backend in [&mut cpu, &mut gpu] {
            let random = &mut Random(tokens as u64);
            // Both backends learn the width from `route`.
            let gate = backend
                .upload_linear(&linear(random, 8, hidden, Kind::F32))
                .unwrap();
            let norm = backend.upload_vector(&random.values(hidden, 1.0)).unwrap();
            let spec = MoeSpec {
                experts: 8,
                top_k: k,
                intermediate: 128,
                scoring: Scoring::Sigmoid,
                selection_bias: false,
                renormalize: true,
            };
            let b = backend.as_mut();
            let x = upload(b, &random.values(tokens * hidden, 1.0));
            let y = upload(b, &random.values(tokens * k * hidden, 1.0));
            let weights = upload(b, &random.values(tokens * k, 1.0));
            let (normed, ids, unused) = (
                poisoned(b, tokens * hidden),
                poisoned(b, tokens * k),
                poisoned(b, tokens * k),
            );
            b.begin(&batch(random, &[(0, tokens)], 8, 10)).unwrap();
            b.route(&spec, 1e-6, norm, gate, None, &x, &normed, &ids, &unused, None)
                .unwrap();
            b.combine(k, &y, &weights, &x).unwrap();
            results.push(download(b, &x, tokens * hidden));
        }
        report.compare(
            &format!("combine {tokens} x {k} x {hidden}"),
            &results[1],
            &results[0],
            1e-6,
        );
    }
}

/// Tokens drawn on the device equal those of the CPU, whatever the parameters.
pub fn sample(report: &mut Report) {
    for vocab in [50, 3072, 200_064] {
        let rows = 24;
        let (mut cpu, mut gpu) = pair(&limits(rows, 1, 8));
        let mut drawn = Vec::new();
        for backend in [&mut cpu, &mut gpu] {
            let random = &mut Random(vocab as u64);
            // The CPU's scratch is as wide as the widest weight.
            backend
                .upload_linear(&linear(random, vocab, 32, Kind::Bf16))
                .unwrap();
            let mut logits = random.values(rows * vocab, 1.0);
            for (i, x) in logits.iter_mut().enumerate() {
                *x = *x * *x * *x * 12.0 - if i % 97 == 0 { 30.0 } else { 0.0 };
            }
            logits[5 * vocab + 7] = f32::NAN;
            logits[6 * vocab + 9] = f32::NEG_INFINITY;
            let params: Vec<SampleParams> = (0..rows)
                .map(|i| SampleParams {
                    temperature: if i % 6 == 0 { 0.0 } else { 0.4 + 0.1 * i as f32 },
                    top_k: [0, 1, 20, 0, 500, 40][i % 6],
                    top_p: [1.0, 0.9, 0.95, 0.5, 1.0, 0.999][(i / 2) % 6],
                    min_p: if i % 5 == 4 { 0.05 } else { 0.0 },
                    repetition_penalty: if i == 9 { 1.3 } else { 1.0 },
                    presence_penalty: 0.0,
                    frequency_penalty: 0.0,
                    logit_bias: if i == 10 { vec![(3, 4.0)] } else { Vec::new() },
                    seed: random.bits(),
                    logprobs: (i == 11).then_some(3),
                })
                .collect();
            let history = [1u32, 5, 9, 5];
            let rows_to_sample: Vec<SampleRow<'_>> = params
                .iter()
                .enumerate()
                .map(|(i, params)| SampleRow {
                    params,
                    position: 100 + i as u32,
                    tokens: &history,
                    output_start: 2,
                    mask: None,
                    forbidden: &[],
                })
                .collect();
            let buffer = upload(backend.as_mut(), &logits);
            drawn.push(backend.sample(&buffer, vocab, 0, &rows_to_sample).unwrap());
        }
        let equal = drawn[0]
            .iter()
            .zip(&drawn[1])
            .filter(|(a, b)| a.token == b.token && a.error.is_some() == b.error.is_some())
            .count();
        for (i, (a, b)) in drawn[0]
            .iter()
            .zip(&drawn[1])
            .enumerate()
            .filter(|(_, (a, b))| a.token != b.token)
        {
            println!("         row {i}: {} for {}, {:?}", b.token, a.token, b.error);
        }
        let bad = drawn[1][5].error.is_some();
        report.expect(
            &format!("sample vocabulary {vocab}"),
            equal == rows && bad,
            &format!("{equal} of {rows}"),
        );
    }
}
