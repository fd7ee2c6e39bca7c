//! Experts against F64, and bit-equality over batches, orders of rows, threads and instruction sets.

use super::CHUNK_ROWS;
use crate::backend::{Backend, ExpertRow, HostExpert};
use crate::cpu::CpuBackend;
use crate::cpu::weights::CpuLinear;
use crate::dummy::{self, DummyFormat};
use crate::ops::linear::dequantize_row;
use crate::testing::*;

const FORMATS: [DummyFormat; 6] = [
    DummyFormat::F32,
    DummyFormat::F16,
    DummyFormat::Bf16,
    DummyFormat::Fp8Block,
    DummyFormat::Int4 { group: 128 },
    DummyFormat::Int4 { group: 32 },
];

fn layer(format: DummyFormat, experts: usize, hidden: usize, intermediate: usize) -> Vec<HostExpert> {
    let linear = |seed: usize, out, input| dummy::linear(format, out, input, seed as u64, 1).unwrap();
    (0..experts)
        .map(|e| HostExpert {
            gate: linear(3 * e, intermediate, hidden),
            up: linear(3 * e + 1, intermediate, hidden),
            down: linear(3 * e + 2, hidden, intermediate),
        })
        .collect()
}

fn run(backend: &mut CpuBackend, layer: &[HostExpert], input: &[f32], rows: &[ExpertRow]) -> Vec<f32> {
    let width = layer[0].gate.in_features;
    let experts = backend.upload_experts(layer).unwrap();
    let input = upload(backend, input);
    let out = poisoned(backend, rows.len() * width);
    backend.experts(experts, &input, rows, &out).unwrap();
    backend.drop_experts(experts);
    download(backend, &out, rows.len() * width)
}

fn random_rows(random: &mut Random, count: usize, inputs: usize, experts: usize) -> Vec<ExpertRow> {
    (0..count)
        .map(|_| ExpertRow {
            row: random.below(inputs) as u32,
            expert: random.below(experts) as u32,
        })
        .collect()
}

fn exact(expert: &HostExpert, x: &[f32]) -> Vec<f64> {
    let multiply = |weight: &crate::weight::HostLinear, x: &[f64]| -> Vec<f64> {
        let weight = CpuLinear::new(weight).unwrap();
        let mut row = vec![0.0; weight.in_features];
        (0..weight.out_features)
            .map(|r| {
                dequantize_row(&weight, r, &mut row);
                row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()
            })
            .collect()
    };
    let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    let (gate, up) = (multiply(&expert.gate, &x), multiply(&expert.up, &x));
    let hidden: Vec<f64> = gate
        .iter()
        .zip(&up)
        .map(|(u, v)| u / (1.0 + (-u).exp()) * v)
        .collect();
    multiply(&expert.down, &hidden)
}

#[test]
fn equals_f64_over_the_shapes() {
    let mut random = Random::new(1);
    for format in FORMATS {
        for (experts, hidden, intermediate, count) in
            [(1, 16, 2, 1), (3, 96, 40, 7), (5, 130, 200, 33), (2, 256, 384, 3)]
        {
            let layer = layer(format, experts, hidden, intermediate);
            let input = random.vec(4 * hidden);
            let rows = random_rows(&mut random, count, 4, experts);
            let mut backend = CpuBackend::new(limits(), 1, None).unwrap();
            let found = run(&mut backend, &layer, &input, &rows);
            for (row, found) in rows.iter().zip(found.chunks(hidden)) {
                let x = &input[row.row as usize * hidden..][..hidden];
                let exact = exact(&layer[row.expert as usize], x);
                let largest = exact.iter().fold(0.0, |m: f64, y| m.max(y.abs()));
                let bound = largest
                    * if matches!(format, DummyFormat::Int4 { .. }) {
                        3e-4
                    } else {
                        5e-6
                    };
                assert_close(
                    &format!("{format:?} {hidden} {intermediate}"),
                    found,
                    &exact,
                    &vec![bound; hidden],
                );
            }
        }
    }
}

#[test]
fn is_the_same_for_all_batches_orders_threads_and_instruction_sets() {
    let mut random = Random::new(2);
    for format in FORMATS {
        let (experts, hidden, intermediate) = (4, 96, 136);
        let layer = layer(format, experts, hidden, intermediate);
        let input = random.vec(9 * hidden);
        let rows = random_rows(&mut random, 61, 9, experts);
        let mut first = CpuBackend::new(limits(), 1, None).unwrap();
        let all = run(&mut first, &layer, &input, &rows);
        for (row, expected) in rows.iter().zip(all.chunks(hidden)) {
            let alone = run(&mut first, &layer, &input, &[*row]);
            assert_eq!(bits(&alone), bits(expected), "{format:?}: {row:?} alone");
        }
        let backwards: Vec<ExpertRow> = rows.iter().rev().copied().collect();
        for mut backend in backends(&limits()) {
            let found = run(&mut backend, &layer, &input, &backwards);
            let found: Vec<f32> = found.chunks(hidden).rev().flatten().copied().collect();
            assert_eq!(bits(&found), bits(&all), "{backend:?} {format:?}");
        }
    }
}

/// More rows than the workspace holds at a time.
#[test]
fn rows_beyond_a_chunk_are_computed_too() {
    let mut random = Random::new(3);
    let layer = layer(DummyFormat::Fp8Block, 3, 32, 16);
    let input = random.vec(11 * 32);
    let rows = random_rows(&mut random, 2 * CHUNK_ROWS + 77, 11, 3);
    let mut backend = CpuBackend::new(limits(), 2, None).unwrap();
    let all = run(&mut backend, &layer, &input, &rows);
    for (row, found) in rows.iter().zip(all.chunks(32)).step_by(97) {
        assert_eq!(bits(&run(&mut backend, &layer, &input, &[*row])), bits(found));
    }
}

#[test]
fn layers_and_rows_that_do_not_fit_are_refused() {
    let mut backend = CpuBackend::new(limits(), 1, None).unwrap();
    let mut wrong = layer(DummyFormat::Bf16, 2, 32, 16);
    wrong[1].down = dummy::linear(DummyFormat::Bf16, 32, 18, 1, 1).unwrap();
    let error = backend.upload_experts(&wrong).unwrap_err().to_string();
    assert!(
        error.contains("down (w2) is [32, 18], expected [32, 16]"),
        "{error}"
    );
    wrong[1].down = dummy::linear(DummyFormat::Fp8Block, 32, 16, 1, 1).unwrap();
    let error = backend.upload_experts(&wrong).unwrap_err().to_string();
    assert!(
        error.contains("expert 1 of a layer is stored in another format"),
        "{error}"
    );

    let none = backend.upload_experts(&[]).unwrap();
    let some = backend
        .upload_experts(&layer(DummyFormat::Bf16, 2, 32, 16))
        .unwrap();
    let (input, out) = (upload(&mut backend, &[0.0; 96]), upload(&mut backend, &[0.0; 96]));
    let row = |row, expert| ExpertRow { row, expert };
    backend.experts(none, &input, &[], &out).unwrap();
    backend.experts(some, &input, &[], &out).unwrap();
    backend.experts(some, &input, &[row(2, 1)], &out).unwrap();
    let too_many = vec![row(0, 0); limits().max_expert_rows + 1];
    for (experts, rows, what) in [
        (none, &[row(0, 0)][..], "rows for a layer without experts"),
        (some, &[row(0, 2)], "local expert is 2, expected below the 2"),
        (some, &[row(3, 0)], "buffer is 384 bytes, expected 128 F32"),
        (some, &[row(u32::MAX, 0)], "buffer is 384 bytes"),
        (
            some,
            &too_many,
            "rows is 3001, expected at most max_expert_rows 3000",
        ),
    ] {
        let error = backend
            .experts(experts, &input, rows, &out)
            .unwrap_err()
            .to_string();
        assert!(error.contains(what), "{error}");
    }
    backend.drop_experts(some);
    let error = backend.experts(some, &input, &[], &out).unwrap_err().to_string();
    assert!(error.contains("dropped"), "{error}");
    // The handle is used again.
    assert_eq!(
        backend
            .upload_experts(&layer(DummyFormat::F32, 1, 32, 16))
            .unwrap(),
        some
    );
}
