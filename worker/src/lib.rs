//! A rank: weights, experts, KV pages; executes the steps it is told to.
