// What a rank says in an exchange of up to 128 tokens a rank over NCCL: rows, experts and weights of its tokens, which the choice of
// experts makes on the way where it has not been made. Rows travel as F32 or BF16. To ranks whose memory is mapped here all but heads
// may be written straight: see messages.cuh.
// Bytes: every row is read once, and written once and once more for each of those ranks.
#include "../../../ops/rmsnorm/rows.cuh"
#include "../../../ops/route/route.cuh"
#include "messages.cuh"
#include "values.cuh"

constexpr int FEW_THREADS = 512;

struct PackFew {
    ExchangeParams exchange;
    Messages messages;
    ExchangeTokens tokens;
    const float *normed;  // [count, hidden]
    const int *rows;      // this rank's expert rows of the exchange before: the load that the others see
};

struct ChooseFew {
    ExchangeParams exchange;
    Messages messages;
    RouteParams route;  // the gate's logits, for sigmoid
    uint32_t *ids;      // where the choice goes, beside the message
    float *weights;
    NormInput norm;     // of the rows, at most INLINE_WIDTH values
    const int *rows;    // as in PackFew
};

// This rank's message, where the choice of experts has not written it beside its own work: a block a token.
template <bool EXACT> DEVICE void pack_few(const PackFew &d) {
    const ExchangeParams &p = d.exchange;
    const int token = blockIdx.x;
    const bool mine = token < d.tokens.count;
    PackedRow<EXACT> row;
    if (mine) row.read(d.normed + static_cast<size_t>(token) * p.hidden, p.hidden);
    wait_for_inputs();
    allow_next_kernel();
    const Message own = message_of(d.messages, p.rank, 0, p.k);
    if (token == 0 && threadIdx.x == PACK_THREADS - 1) write_own_head(p, own, d.tokens.count, d.rows);
    const bool slot = mine && threadIdx.x < p.k;
    const int at = token * p.k + threadIdx.x;
    const uint32_t id = slot ? d.tokens.ids[at] : 0;
    const float weight = slot ? d.tokens.weights[at] : 0.f;
    for_each_copy(p, d.messages, own, 0, [&](const Message &to) {
        if (slot) to.ids[at] = id, to.weights[at] = weight;
        if (mine) row.write(to.rows + static_cast<size_t>(token) * d.messages.row_bytes, d.normed + static_cast<size_t>(token) * p.hidden, p.hidden);
    });
    finish_straight(d.messages);
}

// The same of tokens whose experts are still to be chosen, from rows whose norm is still to be made: a block a token, one warp
// more than make the row chooses.
template <bool EXACT> DEVICE void choose_few(const ChooseFew &d) {
    using V = Values<EXACT>;
    constexpr int AHEAD = 2;
    static_assert(AHEAD * V::COUNT * FEW_THREADS >= INLINE_WIDTH);
    const ExchangeParams &p = d.exchange;
    __shared__ float score[MAX_EXPERTS], choice[MAX_EXPERTS], squares[FEW_THREADS / WARP];
    const int token = blockIdx.x, lane = threadIdx.x & 31, expert = threadIdx.x;
    const bool chooses = threadIdx.x >= FEW_THREADS;
    const auto first = [&](int a) { return static_cast<int>(threadIdx.x + a * FEW_THREADS) * V::COUNT; };
    const auto mine = [&](int a) { return !chooses && first(a) < p.hidden; };
    float4 v[AHEAD] = {}, more[AHEAD] = {}, weight[AHEAD];
    const float bias = d.route.bias && expert < d.route.experts ? d.route.bias[expert] : 0.f;
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
        if (mine(a)) weight[a] = V::read(d.norm.weight + first(a));
    wait_for_inputs();
    allow_next_kernel();
    const Message own = message_of(d.messages, p.rank, 0, p.k);
    if (token == 0 && threadIdx.x == FEW_THREADS) write_head(own.at, header(d.route.tokens, *d.rows, p.state->begun + 1));
    const size_t row = static_cast<size_t>(token) * p.hidden;
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
        if (!mine(a)) continue;
        v[a] = V::read(d.norm.x0 + row + first(a));
        if (d.norm.x1) more[a] = V::read(d.norm.x1 + row + first(a));
    }
    if (expert < d.route.experts) {
        const float *from = d.route.logits + static_cast<size_t>(token) * d.route.experts + expert;
        const size_t stride = static_cast<size_t>(d.route.tokens) * d.route.experts;
        float z = 0.f;
#pragma unroll 8
        for (int part = 0; part < d.route.parts; part++) z += __ldcg(from + part * stride);
        const float s = 1.f / (1.f + expf(-z));
        score[expert] = s, choice[expert] = s + bias;
    }
    float sum = 0.f;
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
        v[a].x += more[a].x, v[a].y += more[a].y, v[a].z += more[a].z, v[a].w += more[a].w;
        sum += v[a].x * v[a].x, sum += v[a].y * v[a].y, sum += v[a].z * v[a].z, sum += v[a].w * v[a].w;
    }
    sum = warp_sum(sum);
    if (!chooses && lane == 0) squares[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (chooses) {
        int id;
        float share;
        choose_experts(d.route, score, choice, lane, id, share);
        const int slot = token * p.k + lane;
        if (lane < p.k) {
            d.ids[slot] = id, d.weights[slot] = share;
            for_each_copy(p, d.messages, own, 0, [&](const Message &to) { to.ids[slot] = id, to.weights[slot] = share; });
        }
    } else {
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < FEW_THREADS / WARP; w++) total += squares[w];
        const float inverse = rsqrtf(total / d.norm.k + d.norm.eps);
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            v[a].x = v[a].x * inverse * weight[a].x, v[a].y = v[a].y * inverse * weight[a].y;
            v[a].z = v[a].z * inverse * weight[a].z, v[a].w = v[a].w * inverse * weight[a].w;
        }
        for_each_copy(p, d.messages, own, 0, [&](const Message &to) {
            auto *units = reinterpret_cast<typename V::Packed *>(to.rows + static_cast<size_t>(token) * d.messages.row_bytes);
#pragma unroll
            for (int a = 0; a < AHEAD; a++)
                if (mine(a)) units[first(a) / V::COUNT] = V::pack(v[a]);
        });
    }
    finish_straight(d.messages);
}

#define FEW(NAME, EXACT)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(PACK_THREADS) nccl_pack_##NAME(const __grid_constant__ PackFew d) { pack_few<EXACT>(d); } \
    extern "C" __global__ void __launch_bounds__(FEW_THREADS + WARP) nccl_choose_##NAME(const __grid_constant__ ChooseFew d) {             \
        choose_few<EXACT>(d);                                                                                                          \
    }
FEW(exact, true)
FEW(bf16, false)
