"""What torch's own kernels take for the same shapes: the peers that docs/benchmarks/gpu.md puts beside ours.

    python3 kernels/examples/gpu_bench/torch_peers.py

Every line: name, microseconds (median of graph replays over rotating weights larger than the L2), and the rate.
A peer that this torch lacks is named with its error, not left out.
"""

import statistics

import torch
import torch.nn.functional as F

HIDDEN, HEADS, KV_HEADS, DIM, EXPERTS, TOP_K, INTER = 3072, 48, 8, 128, 256, 8, 1536
QKV, OUT = (HEADS + 2 * KV_HEADS) * DIM, HEADS * DIM
device = "cuda"


def timed(calls, repeat=12):
    """Median microseconds of one call; `calls` are run one after the other inside a graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def line(name, make, flop=0.0, byte=0.0):
    try:
        us = timed(make())
    except Exception as error:  # the report names what is missing
        print(f"{name:58} not there: {str(error).splitlines()[0][:90]}")
        return
    finally:
        torch.cuda.empty_cache()
    print(f"{name:58} {us:10.2f} us  {byte / us / 1e6:6.3f} TB/s  {flop / us / 1e6:7.1f} TFLOP/s", flush=True)


def bf16(*shape):
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def fp8(*shape):
    return bf16(*shape).to(torch.float8_e4m3fn)


def dense(name, rows, inputs, tokens):
    copies = 1 if tokens > 1024 else 8
    work = 2.0 * rows * inputs * tokens

    def plain():
        x, weights = bf16(tokens, inputs), [bf16(rows, inputs) for _ in range(copies)]
        return [lambda w=w: F.linear(x, w) for w in weights]

    def scaled():
        padded = max(16, tokens)
        x, weights = fp8(padded, inputs), [fp8(rows, inputs) for _ in range(copies)]
        a, b = torch.ones(padded, 1, device=device), torch.ones(1, rows, device=device)
        return [
            lambda w=w: torch._scaled_mm(x, w.t(), scale_a=a, scale_b=b, out_dtype=torch.bfloat16) for w in weights
        ]

    line(f"mm bf16            {name} {tokens} tokens", plain, work, 2.0 * rows * inputs)
    line(f"scaled_mm fp8 rows {name} {tokens} tokens", scaled, work, 1.0 * rows * inputs)


def grouped(tokens):
    pairs = tokens * TOP_K
    used = min(EXPERTS, round(EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** tokens)))
    sizes = [pairs // used + (1 if i < pairs % used else 0) for i in range(used)]
    # A multiple of 16 rows each, as the FP8 one asks for.
    sizes = [-(-size // 16) * 16 for size in sizes]
    rows = sum(sizes)
    ends = torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)
    for name, out, inputs in (("gate+up", 2 * INTER, HIDDEN), ("down", HIDDEN, INTER)):
        work, weights = 2.0 * pairs * out * inputs, out * inputs * used

        def plain():
            x, w = bf16(rows, inputs), bf16(used, inputs, out)
            return [lambda: torch._grouped_mm(x, w, offs=ends)]

        def scaled():
            x, w = fp8(rows, inputs), fp8(used, out, inputs)
            a, b = torch.ones(rows, device=device), torch.ones(used, out, device=device)
            return [
                lambda: torch._scaled_grouped_mm(
                    x, w.transpose(-2, -1), a, b, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
                )
            ]

        what = f"{name} {used} experts {tokens} tokens"
        line(f"grouped_mm bf16    {what}", plain, work, 2.0 * weights)
        line(f"scaled_grouped fp8 {what}", scaled, work, 1.0 * weights)


def attention(batch, context, queries):
    def make():
        q = bf16(batch, HEADS, queries, DIM)
        k, v = bf16(batch, KV_HEADS, context, DIM), bf16(batch, KV_HEADS, context, DIM)
        causal = queries > 1
        return [lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)]

    work = 4.0 * batch * HEADS * DIM * queries * context / (2 if queries > 1 else 1)
    name = f"sdpa bf16 gqa      {batch} x {context}, {queries} queries each"
    line(name, make, work, 4.0 * batch * KV_HEADS * DIM * context)


torch.manual_seed(1)
print(torch.cuda.get_device_name(0), "torch", torch.__version__)
for tokens in (1, 32, 96, 4096):
    dense("qkv", QKV, HIDDEN, tokens)
    dense("output", HIDDEN, OUT, tokens)
for tokens in (1, 32, 96, 8192):
    grouped(tokens)
for batch, context, queries in ((1, 1024, 1), (32, 2048, 1), (96, 1024, 1), (1, 4096, 4096), (1, 8192, 8192)):
    attention(batch, context, queries)
