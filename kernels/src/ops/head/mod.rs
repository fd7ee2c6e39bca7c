//! Head: `logits[i] = rmsnorm(hidden[rows[i]]) W`; see `ops::rmsnorm` and `ops::linear`.

mod cpu;
