"""What torch's own kernels take for the same shapes: the peers that docs/benchmarks/gpu.md puts beside ours.

    python3 kernels/examples/gpu_bench/torch_peers.py [--ours FOLDER[,FOLDER..]]

Every line: name, microseconds (median of graph replays over rotating weights larger than the L2), and the rate.
A peer that this torch lacks is named with its error, not left out.

With `--ours` only products, of ours beside torch's: all in graphs, in turn, each as long as the others, so that heat is shared; the folders
are those where builds left their fatbins (target/release/build/conclave-kernels-*/out), to compare two of them.
"""

import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphs import captured, replayed, timed

HIDDEN, HEADS, KV_HEADS, DIM, EXPERTS, TOP_K, INTER = 3072, 48, 8, 128, 256, 8, 1536
QKV, OUT = (HEADS + 2 * KV_HEADS) * DIM, HEADS * DIM
device = "cuda"


def line(name, make, flop=0.0, byte=0.0):
    try:
        us, _ = timed(make())
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
    """Each backend of SDPA alone; keys and values rotate among sets that together are larger than the L2."""
    size = 4.0 * batch * KV_HEADS * DIM * context
    sets = 1 if queries > 1 else min(16, max(2, round(160e6 / size)))
    causal = queries > 1

    def make(backend):
        q = [bf16(batch, HEADS, queries, DIM) for _ in range(sets)]
        k, v = ([bf16(batch, KV_HEADS, context, DIM) for _ in range(sets)] for _ in range(2))

        def call(i):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q[i], k[i], v[i], is_causal=causal, enable_gqa=True)

        return [lambda i=i: call(i) for i in range(sets)]

    work = 4.0 * batch * HEADS * DIM * queries * context / (2 if causal else 1)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        name = f"sdpa {backend.name.split('_')[0].lower():5} bf16 gqa {batch} x {context}, {queries} queries each"
        line(name, lambda: make(backend), work, size)


def in_turn(title, flop, entries, rounds=6):
    """Each entry: name, calls, what they leave. Of every round the median of three replays, then the median of rounds."""
    graphs = [(name, captured(calls), len(calls)) for name, calls, _ in entries]
    times = {name: [] for name, _, _ in graphs}
    for turn in range(rounds):
        for name, graph, count in graphs if turn % 2 else reversed(graphs):
            graph.replay()
            times[name].append(statistics.median(replayed(graph, count) for _ in range(3)))
    for name, all_of in times.items():
        us = statistics.median(all_of)
        print(f"{title:22} {name:24} {us:8.1f} us {flop / us / 1e6:7.1f} TFLOP/s   {min(all_of):.1f} to {max(all_of):.1f}", flush=True)


def added(x, weights):
    """The output projection's work: products added to an F32 residual where it lies."""
    y = torch.randn(x.shape[0], weights[0].shape[0], device=device)
    return [lambda w=w: torch.addmm(y, x, w.t(), out_dtype=torch.float32, out=y) for w in weights]


def int4(x, rows, copies):
    """torch's product of weights of four bits, a scale and a zero point for 128 inputs, with BF16 activations."""
    calls = []
    for _ in range(copies):
        bytes_ = torch.randint(0, 256, (rows, x.shape[1] // 2), device=device, dtype=torch.uint8)
        packed, scales = torch.ops.aten._convert_weight_to_int4pack(bytes_, 8), bf16(x.shape[1] // 128, rows, 2)
        calls.append(lambda packed=packed, scales=scales: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales))
    return calls


def peer(entries, name, make):
    try:
        calls = make()
        calls[0]()
        torch.cuda.synchronize()
    except Exception as error:  # the report names what is missing
        print(f"{name}: not there: {str(error).splitlines()[0][:120]}")
        return
    entries.append((name, calls, None))


def beside_ours(folders):
    import our_products as ours

    def ours_of(kind, make):
        for folder in folders:
            label = kind if len(folders) == 1 else f"{kind} {folders.index(folder)}"
            try:
                yield label, *make(folder)
            except Exception as error:  # the report names what is missing
                print(f"{label}: {str(error)[:120]}")

    for name, rows, inputs in (("qkv", QKV, HIDDEN), ("output", HIDDEN, OUT)):
        for tokens in (16, 32, 64, 96, 128, 4096):
            copies = 4 if tokens > 1024 else 8
            entries = []
            for kind in ("int4_g128", "fp8", "bf16", "fp8_act"):
                if kind != "fp8_act" or tokens > 16:
                    entries += ours_of(kind, lambda f, k=kind: ours.dense(f, k, rows, inputs, tokens, name == "output", copies))
            x, w = bf16(tokens, inputs), [bf16(rows, inputs) for _ in range(copies)]
            entries.append(("torch bf16", [lambda w=w: F.linear(x, w) for w in w], None))
            entries.append(("torch bf16, f32 out", [lambda w=w: torch.mm(x, w.t(), out_dtype=torch.float32) for w in w], None))
            if name == "output" and tokens > 128:
                peer(entries, "torch bf16, added to f32", lambda: added(x, w))
            peer(entries, "torch int4", lambda: int4(x, rows, copies))
            x8, w8, a, b = fp8(tokens, inputs), [w.to(torch.float8_e4m3fn) for w in w], torch.ones(tokens, 1, device=device), torch.ones(1, rows, device=device)
            entries.append(
                ("torch fp8", [lambda w=w: torch._scaled_mm(x8, w.t(), scale_a=a, scale_b=b, out_dtype=torch.bfloat16) for w in w8], None)
            )
            # The scales that ours have: of 128 inputs of a token, and of 128 x 128 weights.
            s, t = torch.ones(inputs // 128, tokens, device=device).t(), torch.ones(rows // 128, inputs // 128, device=device).t()
            entries.append(
                ("torch fp8, blocks", [lambda w=w: torch._scaled_mm(x8, w.t(), scale_a=s, scale_b=t, out_dtype=torch.bfloat16) for w in w8], None)
            )
            in_turn(f"{name} {tokens}", 2.0 * rows * inputs * tokens, entries)
            del entries
            torch.cuda.empty_cache()
    tokens = 8192
    counts = torch.bincount(torch.rand(tokens, EXPERTS, device=device).topk(TOP_K, 1).indices.flatten(), minlength=EXPERTS).tolist()
    sizes = [-(-rows // 16) * 16 for rows in counts]
    ends, total = torch.tensor(sizes, device=device).cumsum(0).to(torch.int32), sum(sizes)
    for name, out, inputs in (("gate+up", 2 * INTER, HIDDEN), ("down", HIDDEN, INTER)):
        entries = []
        for kind in ("int4_g128", "fp8", "bf16", "fp8_act"):
            entries += ours_of(kind, lambda f, k=kind: ours.experts(f, k, counts, HIDDEN, INTER, name != "down"))
        x, w = bf16(total, inputs), bf16(EXPERTS, inputs, out)
        entries.append(("torch bf16", [lambda: torch._grouped_mm(x, w, offs=ends)], None))
        w8, x8 = w.transpose(-2, -1).contiguous().to(torch.float8_e4m3fn), x.to(torch.float8_e4m3fn)
        a, b = torch.ones(total, device=device), torch.ones(EXPERTS, out, device=device)
        scaled = lambda: torch._scaled_grouped_mm(x8, w8.transpose(-2, -1), a, b, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True)
        entries.append(("torch fp8", [scaled], None))
        in_turn(f"{name} {tokens}", 2.0 * sum(counts) * out * inputs, entries)
        del entries
        torch.cuda.empty_cache()


torch.manual_seed(1)
print(torch.cuda.get_device_name(0), "torch", torch.__version__)
if "--ours" in sys.argv:
    beside_ours(sys.argv[sys.argv.index("--ours") + 1].split(","))
    sys.exit()
for tokens in (1, 32, 96, 4096):
    dense("qkv", QKV, HIDDEN, tokens)
    dense("output", HIDDEN, OUT, tokens)
for tokens in (1, 32, 96, 8192):
    grouped(tokens)
DECODE = ((1, 1024, 1), (16, 256, 1), (32, 2048, 1), (96, 1024, 1))
for batch, context, queries in (*DECODE, (1, 4096, 4096), (1, 8192, 8192)):
    attention(batch, context, queries)
