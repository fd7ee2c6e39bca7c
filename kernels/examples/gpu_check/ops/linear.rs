//! Norm and head, and products that are added to a residual: every format of weights.

use super::{KINDS, bound};
use crate::host::*;
use crate::pair;
use crate::report::Report;

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
    let (mut cpu, mut gpu) = pair(&limits(35, 2, 16));
    for kind in KINDS {
        for &(vocab, hidden, rows) in report.some(&shapes, 3) {
            let tokens = rows + 2;
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
    let (mut cpu, mut gpu) = pair(&limits(131, 2, 16));
    for kind in KINDS {
        for &(outputs, inputs, tokens) in report.some(&shapes, 4) {
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
