//! Tokens and log-probabilities made on the device.

pub mod kept;
mod rows;

use conclave_kernels::backend::*;
use conclave_kernels::cuda::CudaBackend;

use crate::host::*;
use crate::pair;
use crate::report::Report;
use rows::Row;

/// Log-probabilities may be so far from the CPU's: what F32 and two exponentials differ by.
const CLOSE: f32 = 2e-6;

/// Rows sampled on the device equal those of the CPU, whatever they ask for.
pub fn drawn(report: &mut Report) {
    for &(vocab, count) in report.some(
        &[
            (50, 80),
            (100, 128),
            (1023, 128),
            (3072, 128),
            (32_001, 64),
            (200_064, 128),
            (262_144, 64),
        ],
        3,
    ) {
        table(report, vocab, few(report, vocab, count));
    }
}

/// Under compute-sanitizer, which takes a thousand times as long: every kind of row once, and a few of larger vocabularies.
fn few(report: &Report, vocab: usize, count: usize) -> usize {
    match report.small {
        true => count.min(if vocab < 100 { 80 } else { 12 }),
        false => count,
    }
}

fn table(report: &mut Report, vocab: usize, count: usize) {
    let (mut cpu, mut gpu) = pair(&limits(count, 1, 8));
    let random = &mut Random(vocab as u64);
    let mut rows: Vec<Row> = (0..count)
        .map(|i| Row::numbered(random, i, vocab, 100 + i as u32))
        .collect();
    for (i, row) in rows::odd(vocab).into_iter().enumerate() {
        if let Some(place) = rows.get_mut(4 * i + 2) {
            *place = row;
        }
    }
    let how: Vec<SampleRow<'_>> = rows.iter().map(Row::how).collect();
    let logits: Vec<f32> = (0..count).flat_map(|i| rows::logits(random, i, vocab)).collect();
    let mut sampled = Vec::new();
    for backend in [&mut cpu, &mut gpu] {
        // The CPU's scratch is as wide as the widest weight.
        let widest = linear(&mut Random(1), vocab, 32, Kind::Bf16);
        backend.upload_linear(&widest).unwrap();
        let buffer = upload(backend.as_mut(), &logits);
        let all = backend.sample(&buffer, vocab, 0, &how).unwrap();
        let after = download(backend.as_mut(), &buffer, logits.len());
        sampled.push((buffer, all, after));
    }
    let (expected, found) = (&sampled[0].1, &sampled[1].1);
    compare(
        report,
        &format!("sample vocabulary {vocab}"),
        &rows,
        found,
        expected,
    );
    let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
    report.expect(
        &format!("sample vocabulary {vocab}: the logits stay"),
        same(&sampled[1].2, &logits),
        "",
    );
    // Each of some rows alone, and from another row of a shorter list.
    let mut equal = true;
    let apart = match (report.small, vocab > 10_000) {
        (true, _) => 11,
        (false, true) => 13,
        (false, false) => 3,
    };
    for i in (0..count).step_by(apart) {
        let alone = gpu.sample(&sampled[1].0, vocab, i, &how[i..i + 1]).unwrap();
        let end = count.min(i + 7);
        let few = gpu.sample(&sampled[1].0, vocab, i, &how[i..end]).unwrap();
        equal &= same_bits(&alone[0], &found[i]);
        equal &= few.iter().zip(&found[i..end]).all(|(a, b)| same_bits(a, b));
    }
    report.expect(&format!("sample vocabulary {vocab}: rows alone"), equal, "");
}

fn same_bits(a: &Sampled, b: &Sampled) -> bool {
    let bits = |s: &Sampled| {
        let top = s.top.iter().map(|(token, x)| (*token, x.to_bits()));
        (
            s.token,
            s.logprob.to_bits(),
            s.rank,
            top.collect::<Vec<_>>(),
            s.error.clone(),
        )
    };
    bits(a) == bits(b)
}

/// Everything equal but for the rounding of log-probabilities.
fn compare(report: &mut Report, name: &str, rows: &[Row], found: &[Sampled], expected: &[Sampled]) {
    let mut farthest = 0f32;
    let mut shown = 0;
    let mut equal = 0;
    for (i, (row, (found, expected))) in rows.iter().zip(found.iter().zip(expected)).enumerate() {
        let tokens = |s: &Sampled| s.top.iter().map(|(token, _)| *token).collect::<Vec<_>>();
        let values = |s: &Sampled| {
            s.top
                .iter()
                .map(|(_, x)| *x)
                .chain([s.logprob])
                .collect::<Vec<_>>()
        };
        // In units of what F32 holds of the value.
        let apart = values(found)
            .into_iter()
            .zip(values(expected))
            .map(|(a, b)| (a - b).abs() / b.abs().max(1.0))
            .fold(0f32, |most, x| if x > most || x.is_nan() { x } else { most });
        let same = found.token == expected.token
            && found.rank == expected.rank
            && tokens(found) == tokens(expected)
            && found.error == expected.error
            && apart <= CLOSE;
        farthest = farthest.max(apart);
        equal += usize::from(same);
        if !same && shown < 12 {
            shown += 1;
            println!("         row {i} ({}): {found:?}", row.what);
            println!("         instead of {expected:?}");
            let params = SampleParams {
                logit_bias: Vec::new(),
                ..row.params.clone()
            };
            println!("         {params:?}");
        }
    }
    let errors = expected.iter().filter(|s| s.error.is_some()).count();
    report.expect(
        &format!("{name}, {errors} of them errors, log-probabilities within {farthest:.1e}"),
        equal == rows.len(),
        &format!("{equal} of {}", rows.len()),
    );
}

/// Rows that take their largest logit, more and fewer of them, each by more or fewer blocks.
pub fn greedy(report: &mut Report) {
    for &(vocab, count) in report.some(
        &[
            (3072, 80),
            (50, 9),
            (1023, 66),
            (200_064, 1),
            (32_001, 3),
            (200_064, 20),
            (200_064, 128),
            (12, 1100),
        ],
        3,
    ) {
        let (mut cpu, mut gpu) = pair(&limits(count, 1, 8));
        cpu.upload_linear(&linear(&mut Random(1), vocab, 32, Kind::Bf16))
            .unwrap();
        let random = &mut Random(vocab as u64);
        // Rows that are bad in one place or two, and rows without any choice, are among them.
        let logits: Vec<f32> = (0..count)
            .flat_map(|i| rows::logits(random, if count < 64 { 7 * i + 5 } else { i }, vocab))
            .collect();
        let rows: Vec<Row> = (0..count)
            .map(|_| Row::plain(SampleParams::default(), 1))
            .collect();
        let how: Vec<SampleRow<'_>> = rows.iter().map(Row::how).collect();
        let (on_cpu, on_gpu) = (upload(cpu.as_mut(), &logits), upload(gpu.as_mut(), &logits));
        let expected = cpu.sample(&on_cpu, vocab, 0, &how).unwrap();
        for again in 0..2 {
            let found = gpu.sample(&on_gpu, vocab, 0, &how).unwrap();
            let name = format!("greedy, {count} rows of {vocab}, time {again}");
            compare(report, &name, &rows, &found, &expected);
        }
    }
}

/// Three steps on their way at a time, each with other lists: none gets another one's. Lists that do not fit are not queued.
pub fn queued(report: &mut Report) {
    too_long(report);
    let (vocab, count, steps) = if report.small { (200, 8, 4) } else { (3072, 40, 9) };
    let (mut cpu, mut gpu) = pair(&limits(count, 1, 8));
    let random = &mut Random(3);
    let logits: Vec<f32> = (0..count).flat_map(|i| rows::logits(random, i, vocab)).collect();
    for backend in [&mut cpu, &mut gpu] {
        let widest = linear(&mut Random(1), vocab, 32, Kind::Bf16);
        backend.upload_linear(&widest).unwrap();
    }
    let (on_cpu, on_gpu) = (upload(cpu.as_mut(), &logits), upload(gpu.as_mut(), &logits));
    // Nothing was begun: the device takes every row for one behind position 0.
    let steps: Vec<Vec<Row>> = (0..steps)
        .map(|step| {
            (0..count)
                .map(|i| Row::numbered(random, 7 * i + step, vocab, 1))
                .collect()
        })
        .collect();
    let mut found = Vec::new();
    for (i, step) in steps.iter().enumerate() {
        let how: Vec<SampleRow<'_>> = step.iter().map(Row::how).collect();
        assert!(gpu.queue_sample(&on_gpu, vocab, &how).unwrap());
        if i >= 2 {
            found.push(gpu.sampled().unwrap());
        }
    }
    found.push(gpu.sampled().unwrap());
    found.push(gpu.sampled().unwrap());
    for (i, (step, found)) in steps.iter().zip(&found).enumerate() {
        let how: Vec<SampleRow<'_>> = step.iter().map(Row::how).collect();
        let expected = cpu.sample(&on_cpu, vocab, 0, &how).unwrap();
        compare(
            report,
            &format!("queued samples, step {i}"),
            step,
            found,
            &expected,
        );
    }
}

/// Lists that do not fit are the host's: no queue takes them, and the result is the same.
fn too_long(report: &mut Report) {
    let vocab = 1000;
    let limits = limits(4, 1, 8);
    let (mut cpu, _) = pair(&limits);
    let mut gpu = CudaBackend::new(limits, 0).unwrap();
    let random = &mut Random(8);
    let logits: Vec<f32> = random.values(3 * vocab, 4.0);
    let mut rows: Vec<Row> = (0..3)
        .map(|i| Row::plain(SampleParams::default(), 1 + i))
        .collect();
    rows[1].repeat_past(1 << 20, 0.001);
    rows[2].repeat_past(1 << 10, 0.001);
    let how: Vec<SampleRow<'_>> = rows.iter().map(Row::how).collect();
    cpu.upload_linear(&linear(&mut Random(1), vocab, 32, Kind::Bf16))
        .unwrap();
    let on_cpu = upload(cpu.as_mut(), &logits);
    let expected = cpu.sample(&on_cpu, vocab, 0, &how).unwrap();
    let on_gpu = upload(&mut gpu, &logits);
    let taken = gpu.queue_sample(&on_gpu, vocab, &how).unwrap();
    report.expect("a list that does not fit is not queued", !taken, "");
    let found = gpu.sample(&on_gpu, vocab, 0, &how).unwrap();
    compare(report, "a list that does not fit", &rows, &found, &expected);
}
