//! Combine against its formula, in bits: the order of the sum is part of it.

use crate::backend::{Backend, LinearId, VectorId};
use crate::cpu::CpuBackend;
use crate::dummy::{self, DummyFormat};
use crate::testing::*;
use conclave_plan::model::{MoeSpec, Scoring};

/// Makes the backend know the width: `combine` takes it from the last `route`.
fn route_once(backend: &mut CpuBackend, width: usize, tokens: usize) {
    let moe = MoeSpec {
        experts: 2,
        top_k: 1,
        intermediate: 1,
        scoring: Scoring::Softmax,
        selection_bias: false,
        renormalize: false,
    };
    let norm: VectorId = backend.upload_vector(&vec![1.0; width]).unwrap();
    let gate: LinearId = backend
        .upload_linear(&dummy::linear(DummyFormat::F32, 2, width, 1, 1).unwrap())
        .unwrap();
    let [hidden, normed] = [(); 2].map(|()| upload(backend, &vec![0.0; tokens * width]));
    let [ids, weights] = [(); 2].map(|()| upload(backend, &vec![0.0; tokens]));
    backend
        .route(
            &moe, 1e-6, norm, gate, None, &hidden, &normed, &ids, &weights, None,
        )
        .unwrap();
}

#[test]
fn adds_the_slots_in_order_to_the_bit() {
    let mut random = Random::new(1);
    for (tokens, k, width) in [(1, 1, 1), (2, 3, 15), (3, 8, 16), (40, 4, 130)] {
        let (y, weights) = (random.vec(tokens * k * width), random.vec(tokens * k));
        let before = random.vec(tokens * width);
        let mut expected = before.clone();
        for t in 0..tokens {
            for i in 0..width {
                let slots = (0..k).map(|j| (weights[t * k + j], y[(t * k + j) * width + i]));
                expected[t * width + i] += slots.fold(0.0, |sum: f32, (w, y)| w.mul_add(y, sum));
            }
        }
        for mut backend in backends(&limits()) {
            begin_tokens(&mut backend, tokens);
            route_once(&mut backend, width, tokens);
            let [y, weights, hidden] = [&y, &weights, &before].map(|values| upload(&mut backend, values));
            backend.combine(k, &y, &weights, &hidden).unwrap();
            let found = download(&mut backend, &hidden, tokens * width);
            assert_eq!(
                bits(&found),
                bits(&expected),
                "{backend:?} {tokens} x {k} x {width}"
            );
        }
    }
}
