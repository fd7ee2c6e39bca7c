//! Choice of experts, their products, and the sum over them.

use conclave_kernels::backend::*;
use conclave_plan::model::{MoeSpec, Scoring};

use super::EXACT;
use crate::host::*;
use crate::pair;
use crate::report::Report;

pub fn route(report: &mut Report) {
    let shapes = [
        (5, 3, 128, 1),
        (6, 4, 256, 7),
        (256, 8, 3072, 4),
        (256, 8, 3072, 130),
        (128, 8, 384, 33),
    ];
    let (mut cpu, mut gpu) = pair(&limits(130, 1, 16));
    for &(experts, top_k, hidden, tokens) in report.some(&shapes, 4) {
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
    let shapes: [(usize, usize, usize, usize); 7] = [
        (128, 128, 5, 1),
        // Fewer units than blocks, some of a group of more than four rows.
        (128, 128, 2, 14),
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
    let (mut cpu, mut gpu) = pair(&limits(1100, 1, 80));
    for kind in kinds {
        for &(hidden, inter, count, rows) in report.some(&shapes, 4) {
            let tokens = rows.div_ceil(2);
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
    let (mut cpu, mut gpu) = pair(&limits(33, 1, 8));
    for (tokens, k, hidden) in [(1, 3, 128), (5, 8, 3072), (33, 4, 252)] {
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
