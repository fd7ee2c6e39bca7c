//! Tokens drawn on the device.

use conclave_kernels::backend::*;

use crate::host::*;
use crate::pair;
use crate::report::Report;

/// Tokens drawn on the device equal those of the CPU, whatever the parameters.
pub fn sample(report: &mut Report) {
    let (mut cpu, mut gpu) = pair(&limits(24, 1, 8));
    for &vocab in report.some(&[50, 3072, 200_064], 2) {
        let rows = 24;
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
