//! Steps that are queued before the tokens of the one before are known.

use conclave_kernels::backend::*;
use conclave_kernels::cuda::CudaBackend;

use super::{Small, TOKENS, shapes};
use crate::host::*;
use crate::report::Report;

/// Decode without waiting: the tokens of a pipelined run equal those of one that waits, and graphs equal first runs.
pub fn pipeline(report: &mut Report) {
    let shape = &shapes()[1];
    let run = |pipelined: bool| {
        let gpu = CudaBackend::new(limits(TOKENS, 40, 70), 0).unwrap();
        let mut model = Small::new(Box::new(gpu), shape, Kind::Int4(128, true), KvDtype::Bf16);
        model.set_forward();
        let random = &mut Random(5);
        let mut step = batch(random, &[(0, 30), (0, 10), (0, 25)], 128, shape.vocab);
        let pages = batch(random, &[(0, 80), (0, 80), (0, 80)], 128, shape.vocab);
        step.runs
            .iter_mut()
            .zip(&pages.runs)
            .for_each(|(run, table)| run.pages = table.pages.clone());
        step.logit_rows = step.runs.iter().map(|run| run.first + run.len - 1).collect();
        let params = |i: usize| SampleParams {
            temperature: if i == 0 { 0.0 } else { 0.8 },
            top_k: if i == 1 { 0 } else { 20 },
            top_p: 0.95,
            seed: 7 + i as u64,
            // Nobody waits for these either.
            logprobs: (i == 2).then_some(3),
            ..SampleParams::default()
        };
        let params = [params(0), params(1), params(2)];
        let mut ends: Vec<u32> = step.runs.iter().map(|run| run.len).collect();
        let mut tokens: Vec<Vec<u32>> = Vec::new();
        for n in 0..24 {
            let rows: Vec<SampleRow<'_>> = params
                .iter()
                .zip(&ends)
                .map(|(params, end)| SampleRow {
                    params,
                    position: *end,
                    tokens: &[],
                    output_start: 0,
                    history: None,
                    mask: None,
                    forbidden: &[],
                })
                .collect();
            model.queue(&step, &rows);
            if !pipelined || n > 0 {
                tokens.push(model.backend.sampled().unwrap().iter().map(|s| s.token).collect());
            }
            let known = if pipelined { None } else { tokens.last() };
            let ids = (0..3)
                .map(|i| known.map_or(SAMPLED | i as u32, |known| known[i]))
                .collect();
            let runs = step.runs.iter().zip(&ends).enumerate();
            let runs = runs
                .map(|(i, (run, end))| BatchRun {
                    first: i as u32,
                    len: 1,
                    position: *end,
                    pages: run.pages.clone(),
                })
                .collect();
            step = Batch {
                ids,
                positions: ends.clone(),
                runs,
                logit_rows: vec![0, 1, 2],
            };
            ends.iter_mut().for_each(|end| *end += 1);
        }
        if pipelined {
            tokens.push(model.backend.sampled().unwrap().iter().map(|s| s.token).collect());
        }
        tokens
    };
    let (waiting, pipelined) = (run(false), run(true));
    report.expect(
        "pipelined decode",
        waiting == pipelined,
        &format!("{} steps", pipelined.len()),
    );
}
