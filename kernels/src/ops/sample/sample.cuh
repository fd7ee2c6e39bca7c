// What the host tells the sampling kernels, and what they tell it; `cuda.rs` mirrors the structs.
#pragma once
#include "../../cuda/ptx.cuh"

constexpr uint32_t NO_EXTRA = 0xffffffffu, NOT_KEPT = 0xffffffffu;
constexpr int MAX_TOP = 20;  // best log-probabilities of a row

struct SampleSpec {
    float temperature, top_p, min_p;
    uint32_t top_k;
    uint64_t seed;
    uint32_t position;  // of the sampled token
    uint32_t token;     // results go to tokens[token] and logprobs[token]
    uint32_t extra;     // the row's SampleExtra, or NO_EXTRA
    uint32_t logprobs;  // 0: none; n + 1: the sampled token's and the n best
};

// Steps 1 to 3 of a row. Lists begin at so many words behind the first SampleExtra, each at a multiple of four; 0: none.
struct SampleExtra {
    uint32_t mask;              // one bit a token
    uint32_t bias, biases;      // SampleBias, by token; those of one token in the order of their addition
    uint32_t forbidden, forbids;
    // All tokens so far, or, where no repetition counts, those of the output: those that the device kept, then the list. All of
    // them, and the drawn one behind, are to lie at `kept_to` after this step, or NOT_KEPT.
    uint32_t tokens, token_count;
    uint32_t kept_from, kept_count, kept_to;
    uint32_t output_start;  // index among them
    float repetition, presence, frequency;
    uint32_t unused[2];
};

struct SampleBias {
    uint32_t token;
    float bias;
};

struct SampleLogprobs {
    float logprob;  // of the sampled token
    uint32_t rank;
    uint32_t count;  // of the best ones
    uint32_t unused;
    uint32_t tokens[MAX_TOP];
    float logprobs[MAX_TOP];
};

struct SampleTokens {
    const float *logits;      // [rows, vocab]
    const SampleSpec *specs;  // [rows]
    const int *positions;     // of the step's tokens: position = positions[token_of[row]] + 1; null: the spec's
    const uint32_t *token_of;
    SampleExtra *extras;      // and the lists behind them
    uint32_t *histories;      // tokens that are kept between steps
    unsigned long long *tops; // [rows], of `sample_greedy`, zero between kernels
    unsigned *arrived;        // [rows], zero between kernels
    uint32_t *tokens;         // results: a token, or why there is none
    SampleLogprobs *logprobs;
    int rows, vocab, each;    // each: logits of one block of a row's cluster
    int mixed;                // some rows are `sample_greedy`'s and some are not
};

// Why a row has no token: in the upper four bits; below them a token's index.
constexpr uint32_t LOGIT_IS_NAN = 1u << 28, LOGIT_IS_INFINITE = 2u << 28, ADJUSTED_IS_BAD = 3u << 28, NONE_ALLOWED = 4u << 28,
                   NONE_LIKELY = 5u << 28;

// Rows with temperature 0 and nothing else belong to `sample_greedy`, all others to `sample_row`.
DEVICE bool is_plain(const SampleSpec &spec) { return spec.temperature == 0.f && spec.extra == NO_EXTRA && spec.logprobs == 0; }

DEVICE uint32_t bad_logit(const float *logits, int index) {
    return (isnan(logits[index]) ? LOGIT_IS_NAN : LOGIT_IS_INFINITE) | static_cast<uint32_t>(index);
}
