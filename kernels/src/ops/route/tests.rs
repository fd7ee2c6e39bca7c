//! Route against F64 and a plain sort; ties; bit-equality over tokens, threads and instruction sets.

use std::sync::Arc;

use conclave_plan::model::{MoeSpec, Scoring};
use proptest::prelude::*;

use super::choose::choose;
use crate::backend::Backend;
use crate::cpu::{CpuBackend, Isa};
use crate::testing::*;
use crate::weight::{HostLinear, HostWeight};

fn spec(experts: usize, top_k: usize, scoring: Scoring, renormalize: bool) -> MoeSpec {
    MoeSpec {
        experts,
        top_k,
        intermediate: 1,
        scoring,
        selection_bias: true,
        renormalize,
    }
}

fn scores(scoring: Scoring, z: &[f64]) -> Vec<f64> {
    match scoring {
        Scoring::Sigmoid => z.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect(),
        Scoring::Softmax => {
            let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let p: Vec<f64> = z.iter().map(|z| (z - largest).exp()).collect();
            let sum: f64 = p.iter().sum();
            p.into_iter().map(|p| p / sum).collect()
        }
    }
}

/// The `k` first indices by descending key, the lower index first among equals.
fn best(keys: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..keys.len()).collect();
    order.sort_by(|a, b| keys[*b].total_cmp(&keys[*a]).then(a.cmp(b)));
    order.truncate(k);
    order
}

/// Normed, ids, weights and logits of a backend.
fn route(
    backend: &mut CpuBackend,
    spec: &MoeSpec,
    gate: &[f32],
    norm: &[f32],
    bias: &[f32],
    hidden: &[f32],
) -> [Vec<f32>; 4] {
    let width = norm.len();
    let tokens = hidden.len() / width;
    let bytes: Vec<u8> = gate.iter().flat_map(|w| w.to_le_bytes()).collect();
    let data = HostWeight::F32(Arc::new(bytes));
    let gate = HostLinear {
        out_features: spec.experts,
        in_features: width,
        data,
    };
    let gate = backend.upload_linear(&gate).unwrap();
    let [norm, bias] = [norm, bias].map(|values| backend.upload_vector(values).unwrap());
    begin_tokens(backend, tokens);
    let hidden = upload(backend, hidden);
    let sizes = [width, spec.top_k, spec.top_k, spec.experts].map(|columns| tokens * columns);
    let out = sizes.map(|size| poisoned(backend, size));
    backend
        .route(
            spec,
            1e-6,
            norm,
            gate,
            Some(bias),
            &hidden,
            &out[0],
            &out[1],
            &out[2],
            Some(&out[3]),
        )
        .unwrap();
    std::array::from_fn(|i| download(backend, &out[i], sizes[i]))
}

#[test]
fn equals_f64_and_is_the_same_for_all_instruction_sets_threads_and_batches() {
    let mut random = Random::new(1);
    for (experts, k, width, tokens) in [
        (1, 1, 3, 1),
        (6, 4, 128, 5),
        (33, 8, 100, 70),
        (256, 8, 96, 3),
        (64, 64, 16, 2),
    ] {
        for scoring in [Scoring::Sigmoid, Scoring::Softmax] {
            for renormalize in [false, true] {
                let spec = spec(experts, k, scoring, renormalize);
                let (gate, norm) = (random.vec(experts * width), random.vec(width));
                let (bias, hidden) = (random.vec(experts), random.vec(tokens * width));
                let mut first = CpuBackend::new(limits(), 1, None).unwrap();
                let found = route(&mut first, &spec, &gate, &norm, &bias, &hidden);
                let [normed, ids, weights, logits] = &found;
                for t in 0..tokens {
                    let x = &normed[t * width..][..width];
                    let z = &logits[t * experts..][..experts];
                    for (e, z) in z.iter().enumerate() {
                        let exact: f64 = gate[e * width..]
                            .iter()
                            .zip(x)
                            .map(|(w, x)| f64::from(*w) * f64::from(*x))
                            .sum();
                        assert!((f64::from(*z) - exact).abs() < 1e-4);
                    }
                    let scores = scores(scoring, &z.iter().map(|z| f64::from(*z)).collect::<Vec<_>>());
                    let keys: Vec<f64> = scores.iter().zip(&bias).map(|(s, b)| s + f64::from(*b)).collect();
                    let chosen: Vec<usize> =
                        ids[t * k..][..k].iter().map(|id| id.to_bits() as usize).collect();
                    let expected = best(&keys, k);
                    for (found, expected) in chosen.iter().zip(&expected) {
                        // Keys that differ by rounding only may come in either order.
                        assert!(
                            (keys[*found] - keys[*expected]).abs() < 1e-6,
                            "{chosen:?} {expected:?}"
                        );
                    }
                    let sum: f64 = if renormalize {
                        chosen.iter().map(|e| scores[*e]).sum()
                    } else {
                        1.0
                    };
                    let exact: Vec<f64> = chosen.iter().map(|e| scores[*e] / sum).collect();
                    let bounds: Vec<f64> = exact.iter().map(|w| w * 2e-6).collect();
                    assert_close("weights", &weights[t * k..][..k], &exact, &bounds);
                }
                for mut backend in backends(&limits()) {
                    let other = route(&mut backend, &spec, &gate, &norm, &bias, &hidden);
                    assert_eq!(
                        other.map(|v| bits(&v)),
                        found.clone().map(|v| bits(&v)),
                        "{backend:?}"
                    );
                }
                let mut one = CpuBackend::new(limits(), 1, None).unwrap();
                let last = route(
                    &mut one,
                    &spec,
                    &gate,
                    &norm,
                    &bias,
                    &hidden[(tokens - 1) * width..],
                );
                for (alone, all) in last.iter().zip(&found) {
                    assert_eq!(bits(alone), bits(&all[all.len() - alone.len()..]));
                }
            }
        }
    }
}

#[test]
fn equal_keys_go_to_the_lower_expert() {
    for (k, expected) in [
        (1, vec![2]),
        (2, vec![2, 4]),
        (4, vec![2, 4, 0, 1]),
        (5, vec![2, 4, 0, 1, 3]),
    ] {
        let mut z = [0.5, 0.5, 0.75, 0.5, 0.75];
        let (mut ids, mut weights) = (vec![f32::NAN; k], vec![f32::NAN; k]);
        choose(
            Isa::detect(),
            &spec(5, k, Scoring::Sigmoid, true),
            None,
            &mut z,
            &mut ids,
            &mut weights,
        );
        let ids: Vec<u32> = ids.iter().map(|id| id.to_bits()).collect();
        assert_eq!(ids, expected);
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }
}

/// A NaN must not make an index run out of bounds or an expert come twice.
#[test]
fn a_nan_chooses_k_different_experts_all_the_same() {
    for bad in [0, 3, 6] {
        let mut z = [0.1; 7];
        z[bad] = f32::NAN;
        let (mut ids, mut weights) = ([0.0; 4], [0.0; 4]);
        choose(
            Isa::detect(),
            &spec(7, 4, Scoring::Softmax, true),
            None,
            &mut z,
            &mut ids,
            &mut weights,
        );
        let mut ids = ids.map(f32::to_bits);
        ids.sort_unstable();
        assert!(
            ids.windows(2).all(|pair| pair[0] < pair[1]) && ids[3] < 7,
            "{ids:?}"
        );
    }
}

#[test]
fn specs_that_do_not_fit_are_refused() {
    let mut backend = CpuBackend::new(limits(), 1, None).unwrap();
    let norm = backend.upload_vector(&[1.0; 8]).unwrap();
    let data = HostWeight::F32(Arc::new(vec![0; 4 * 8 * 4]));
    let gate = backend
        .upload_linear(&HostLinear {
            out_features: 4,
            in_features: 8,
            data,
        })
        .unwrap();
    let bias = backend.upload_vector(&[0.0; 3]).unwrap();
    begin_tokens(&mut backend, 2);
    let buffers: Vec<_> = [16, 16, 16, 16]
        .map(|size| upload(&mut backend, &vec![0.0; size]))
        .into();
    let mut error = |spec: &MoeSpec, bias| {
        let [hidden, normed, ids, weights] = [0, 1, 2, 3].map(|i| &buffers[i]);
        let result = backend.route(spec, 1e-6, norm, gate, bias, hidden, normed, ids, weights, None);
        result.map_err(|error| error.to_string())
    };
    assert_eq!(error(&spec(4, 2, Scoring::Sigmoid, true), None), Ok(()));
    for (spec, bias, what) in [
        (
            spec(5, 2, Scoring::Sigmoid, true),
            None,
            "gate is [4, 8], expected [5, 8]",
        ),
        (
            spec(4, 0, Scoring::Sigmoid, true),
            None,
            "top_k is 0, expected 1 to 4",
        ),
        (
            spec(4, 5, Scoring::Sigmoid, true),
            None,
            "top_k is 5, expected 1 to 4",
        ),
        (
            spec(4, 2, Scoring::Sigmoid, true),
            Some(bias),
            "bias is 3, expected 4",
        ),
    ] {
        let error = error(&spec, bias).unwrap_err();
        assert!(error.contains(what), "{error}");
    }
}

proptest! {
    /// Few different scores, so that most are equal: the choice is that of a stable sort.
    #[test]
    fn the_choice_is_that_of_a_stable_sort(
        z in prop::collection::vec(0..4u8, 1..40),
        bias in prop::collection::vec(0..3u8, 40),
        k in 1..41usize,
    ) {
        let k = k.min(z.len());
        let mut scores: Vec<f32> = z.iter().map(|z| f32::from(*z)).collect();
        let bias: Vec<f32> = bias[..z.len()].iter().map(|b| f32::from(*b) * 0.25).collect();
        let (mut ids, mut weights) = (vec![0.0; k], vec![0.0; k]);
        let spec = spec(z.len(), k, Scoring::Sigmoid, false);
        choose(Isa::detect(), &spec, Some(&bias), &mut scores, &mut ids, &mut weights);
        let keys: Vec<f64> = scores.iter().zip(&bias).map(|(s, b)| f64::from(s + b)).collect();
        let ids: Vec<usize> = ids.iter().map(|id| id.to_bits() as usize).collect();
        prop_assert_eq!(&ids, &best(&keys, k));
        let expected: Vec<f32> = ids.iter().map(|id| scores[*id]).collect();
        prop_assert_eq!(weights, expected);
    }
}
