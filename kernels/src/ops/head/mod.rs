//! Head: `logits[i] = rmsnorm(hidden[rows[i]]) W`. Made of `rmsnorm` and `linear`; see there.
