//! Combine: `hidden[t] += sum over j = 0..k of weights[t, j] * y[t k + j]`.
//!
//! The sum starts at 0 and takes the slots in order by fused multiply-add; then it is added to `hidden`. So a
//! token's result does not depend on where its experts are.

/// `y` is `[tokens * k, hidden]`, `weights` `[tokens, k]`.
pub(crate) fn combine(k: usize, width: usize, y: &[f32], weights: &[f32], hidden: &mut [f32]) {
    let tokens = hidden.chunks_exact_mut(width).zip(weights.chunks_exact(k));
    for ((hidden, weights), y) in tokens.zip(y.chunks_exact(k * width)) {
        for (i, hidden) in hidden.iter_mut().enumerate() {
            let sum = (0..k).fold(0.0, |sum: f32, j| weights[j].mul_add(y[j * width + i], sum));
            *hidden += sum;
        }
    }
}
