//! Sequences whose tokens the device keeps: what is drawn is what the CPU draws that sees them all.

use conclave_kernels::backend::*;
use conclave_kernels::cuda::CudaBackend;

use super::compare;
use super::rows::Row;
use crate::host::*;
use crate::pair;
use crate::report::Report;

const VOCAB: usize = 3072;
/// Tokens before: around the ends of the parts in which they are kept.
const LENGTHS: [usize; 12] = [0, 1, 2, 5, 700, 1000, 1022, 1023, 1024, 2040, 2047, 5000];

/// Steps queued one behind the other, whose last tokens only the device knows; now and then tokens that the host gives instead,
/// rows in another order, and a sequence that pauses.
pub fn check(report: &mut Report) {
    let count = LENGTHS.len();
    let limits = limits(count, 1, 8);
    let (mut cpu, _) = pair(&limits);
    let mut gpu = CudaBackend::new(limits, 0).unwrap();
    let random = &mut Random(4);
    cpu.upload_linear(&linear(&mut Random(1), VOCAB, 32, Kind::Bf16))
        .unwrap();
    let logits = random.values(count * VOCAB, 4.0);
    let (on_cpu, on_gpu) = (upload(cpu.as_mut(), &logits), upload(&mut gpu, &logits));
    let mut rows: Vec<Row> = (0..count).map(|i| sequence(random, i)).collect();
    let mut waiting: Vec<(Vec<Row>, Vec<Sampled>)> = Vec::new();
    let steps = if report.small { 6 } else { 40 };
    for step in 0..steps {
        let order: Vec<usize> = (0..count)
            .map(|i| (i + step) % count)
            .filter(|i| i % 5 != 4 || step % 6 != 5)
            .collect();
        let seen: Vec<Row> = order.iter().map(|&i| rows[i].clone()).collect();
        let mut sent = seen.clone();
        for (row, &i) in sent.iter_mut().zip(&order) {
            // What was drawn in the step before has not been fetched.
            if rows[i].drawn == Some(step) {
                row.hide_last();
            }
        }
        let how: Vec<SampleRow<'_>> = sent.iter().map(Row::how).collect();
        assert!(
            gpu.queue_sample(&on_gpu, VOCAB, &how).unwrap(),
            "step {step} was not queued"
        );
        let how: Vec<SampleRow<'_>> = seen.iter().map(Row::how).collect();
        let expected = cpu.sample(&on_cpu, VOCAB, 0, &how).unwrap();
        for (&i, sampled) in order.iter().zip(&expected) {
            rows[i].go_on(sampled.token, step + 1);
            if (i + step) % 7 == 3 {
                // The host gives others.
                rows[i].replace_last(&[5, 6, 7][..1 + step % 3]);
            }
        }
        waiting.push((seen, expected));
        if waiting.len() == 2 {
            fetch(report, &mut gpu, &mut waiting);
        }
    }
    while !waiting.is_empty() {
        fetch(report, &mut gpu, &mut waiting);
    }
    let mut unknown = sequence(random, 3);
    unknown.history = Some(99);
    unknown.hide_last();
    let taken = gpu.queue_sample(&on_gpu, VOCAB, &[unknown.how()]).unwrap();
    report.expect("a token that no device kept is not queued", !taken, "");
}

fn sequence(random: &mut Random, index: usize) -> Row {
    let mut row = Row::plain(
        SampleParams {
            temperature: if index.is_multiple_of(2) { 0.0 } else { 0.9 },
            repetition_penalty: if index.is_multiple_of(3) { 1.0 } else { 1.2 },
            presence_penalty: if index % 3 == 1 { 0.0 } else { 0.4 },
            frequency_penalty: 0.3,
            seed: index as u64,
            logprobs: (index % 4 == 1).then_some(3),
            ..SampleParams::default()
        },
        1,
    );
    let before = (0..LENGTHS[index]).map(|_| random.below(VOCAB) as u32).collect();
    row.begin(before, [0, LENGTHS[index], LENGTHS[index] / 2][index % 3]);
    row.history = Some(index as u64);
    row.what = format!("sequence {index}");
    row
}

fn fetch(report: &mut Report, gpu: &mut CudaBackend, waiting: &mut Vec<(Vec<Row>, Vec<Sampled>)>) {
    let (rows, expected) = waiting.remove(0);
    let found = gpu.sampled().unwrap();
    compare(report, "kept tokens", &rows, &found, &expected);
}
