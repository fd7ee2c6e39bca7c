//! QKV: `x = rmsnorm(hidden); q, k, v = x Wq, x Wk, x Wv; q, k = rope(norm(q)), rope(norm(k))`.
//!
//! The q/k norm is an RMSNorm over the whole projection or over each head. Rope rotates the first `rotary_dim`
//! values of a head in pairs (i, i + rotary_dim / 2) by the angle `position * theta^(-2 i / rotary_dim)`; cosine
//! and sine are computed in F64 (by the same code on every machine) and rounded to F32. k and v are rounded to the
//! cache's type, to nearest even, saturating, and written to the pages of the token's position.

use conclave_plan::model::{AttentionSpec, QkNorm};

use crate::ops::rmsnorm::rmsnorm_in_place;
use crate::simd::Isa;

/// Normalises the q or k projection of one token in place.
pub(crate) fn qk_norm(isa: Isa, kind: QkNorm, head_dim: usize, w: Option<&[f32]>, eps: f32, x: &mut [f32]) {
    match (kind, w) {
        (QkNorm::None, _) | (_, None) => {}
        (QkNorm::WholeProjection, Some(w)) => rmsnorm_in_place(isa, x, w, eps),
        (QkNorm::PerHead, Some(w)) => {
            x.chunks_exact_mut(head_dim)
                .for_each(|head| rmsnorm_in_place(isa, head, w, eps));
        }
    }
}

/// Writes `[cos, sin]` of each pair for one position.
pub(crate) fn rope_angles(spec: &AttentionSpec, position: u32, table: &mut [f32]) {
    let (cosines, sines) = table.split_at_mut(spec.rotary_dim / 2);
    for (i, (cosine, sine)) in cosines.iter_mut().zip(sines).enumerate() {
        let angle =
            f64::from(position) * libm::pow(spec.rope_theta, -2.0 * i as f64 / spec.rotary_dim as f64);
        *cosine = libm::cos(angle) as f32;
        *sine = libm::sin(angle) as f32;
    }
}

/// Rotates each head of one token in place.
pub(crate) fn rope(spec: &AttentionSpec, table: &[f32], x: &mut [f32]) {
    let half = spec.rotary_dim / 2;
    let (cosines, sines) = table.split_at(half);
    for head in x.chunks_exact_mut(spec.head_dim) {
        let (low, high) = head.split_at_mut(half);
        for i in 0..half {
            let (a, b) = (low[i], high[i]);
            low[i] = (-b).mul_add(sines[i], a * cosines[i]);
            high[i] = a.mul_add(sines[i], b * cosines[i]);
        }
    }
}
