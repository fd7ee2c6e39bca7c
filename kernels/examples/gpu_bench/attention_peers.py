"""Our attention kernels beside torch's SDPA, both in CUDA graphs, over keys and values larger than the second-level cache.

    python3 kernels/examples/gpu_bench/attention_peers.py [--nvcc nvcc | --cubins DIR] [--decode 32:2048,..] [--prompts 0:4096,..]

`--prompts`: position:tokens. Compiles the kernels with nvcc, or takes what MODULES names from DIR, as .cubin.
Prints microseconds (median, least), the rate, and the error of ours against F32. Needs torch and a GPU.
"""

import argparse
import ctypes
import math
import pathlib
import subprocess
import tempfile

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphs import timed

HEADS, KV_HEADS, DIM, PAGE = 48, 8, 128, 16
GROUP = HEADS // KV_HEADS
SCALE = math.log2(math.e) / math.sqrt(DIM)
SOURCES = pathlib.Path(__file__).resolve().parents[2] / "src/ops/attention"
device = "cuda"
KINDS = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Config(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")]
    _fields_ += [("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)]


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


def struct(*parts):
    """A structure of pointers (p), integers (i) and floats (f): as decode.cuh, plan.cu and prefill.cuh have it."""
    kinds = {"p": ctypes.c_uint64, "i": ctypes.c_int32, "f": ctypes.c_float}
    fields = [(name, kinds[kind]) for kind, names in parts for name in names.split()]
    return type("Parameters", (ctypes.Structure,), {"_fields_": fields})


PAGES = (("p", "k v tables"), ("i", "stride page_tokens kv_heads pad"))
DecodeParams = struct(
    *PAGES,
    ("p", "items item_count q qkv squares q_norm k_norm turns"),
    ("f", "eps scale"),
    ("i", "heads rotary"),
    ("p", "partial partial_sums arrived plane out"),
    ("i", "plane_blocks leave_splits"),
)
PlanParams = struct(("p", "positions token_run items item_count splits_of"), ("i", "tokens head_blocks blocks fixed"))
PrefillParams = struct(*PAGES, ("p", "blocks q q16 out plane"), ("i", "plane_blocks heads block_count"), ("f", "scale"))


MODULES = ("decode", "decode_fp8", "plan", "prefill_wide")


class Driver:
    def __init__(self, cubins):
        torch.zeros(1, device=device)
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.functions, self.modules = {}, {}
        for name in MODULES:
            self.modules[name] = ctypes.c_void_p()
            self.check(self.cuda.cuModuleLoadData(ctypes.byref(self.modules[name]), (cubins / f"{name}.cubin").read_bytes()))

    def check(self, status):
        if status:
            raise RuntimeError(f"the driver says {status}")

    def launch(self, module, name, grid, threads, shared, params, overlap):
        """Onto torch's stream; `overlap`: dependent launch."""
        if name not in self.functions:
            self.functions[name] = ctypes.c_void_p()
            self.check(self.cuda.cuModuleGetFunction(ctypes.byref(self.functions[name]), self.modules[module], name.encode()))
            self.check(self.cuda.cuFuncSetAttribute(self.functions[name], 8, shared))
        attribute = Attribute(id=6)
        attribute.value[0] = 1
        stream = torch.cuda.current_stream().cuda_stream
        config = Config(grid, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(attribute), int(overlap))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        self.check(self.cuda.cuLaunchKernelEx(ctypes.byref(config), self.functions[name], pointers, None))


def unit_order(kind):
    """Where a tile has the 16-byte unit u of its row r: `swizzled` of pages.cuh."""
    row, unit = torch.arange(16).view(16, 1), torch.arange(16 if kind == "bf16" else 8).view(1, -1)
    turned = (unit % 8) ^ (row % 8)
    place = row // 8 * 128 + unit // 8 * 64 + row % 8 * 8 + turned if kind == "bf16" else row * 8 + turned
    return place.to(device)


class Cache:
    """Keys and values of `sets` x `runs` sequences in pages in random order."""

    def __init__(self, kind, sets, runs, length):
        self.kind, self.length, self.per = kind, length, -(-length // PAGE)
        pages = sets * runs * self.per
        self.k, self.v = (torch.randn(pages, KV_HEADS, PAGE * DIM, device=device).to(KINDS[kind]) for _ in range(2))
        self.tables = torch.randperm(pages, device=device).view(sets, runs, self.per).to(torch.int32).contiguous()

    def pages(self, which):
        pointers = {"k": self.k.data_ptr(), "v": self.v.data_ptr(), "tables": self.tables[which].data_ptr()}
        return {**pointers, "stride": self.per, "page_tokens": PAGE, "kv_heads": KV_HEADS, "heads": HEADS, "scale": SCALE}

    def rows(self, pool, which, run):
        pages = self.tables[which, run].long()
        order = unit_order(self.kind)
        units = pool[pages].view(torch.uint8).view(len(pages), KV_HEADS, order.numel(), 16)[:, :, order]
        values = units.contiguous().view(KINDS[self.kind]).float().view(len(pages), KV_HEADS, PAGE, DIM)
        return values.permute(1, 0, 2, 3).reshape(KV_HEADS, -1, DIM)[:, : self.length]


def attend(q, k, v, first):
    """F32: q [tokens, kv head, group, dim] at positions from `first` on."""
    out = torch.empty_like(q)
    for head in range(KV_HEADS):
        for at in range(0, q.shape[0], 512):
            part = q[at : at + 512, head]
            scores = torch.einsum("tgd,sd->tgs", part, k[head]) / math.sqrt(DIM)
            reach = first + at + torch.arange(part.shape[0], device=device)
            scores.masked_fill_((torch.arange(k.shape[1], device=device) > reach[:, None])[:, None], float("-inf"))
            out[at : at + 512, head] = torch.softmax(scores, -1) @ v[head]
    return out


def report(name, times, work, unit, error=""):
    print(f"{name:44} {times[0]:9.1f} us (least {times[1]:.1f})  {work / times[0] / 1e6:7.3f} {unit}  {error}", flush=True)


def peers(name, runs, length, queries, sets, causal, work, unit):
    q = [torch.randn(runs, HEADS, queries, DIM, device=device, dtype=torch.bfloat16) for _ in range(sets)]
    k, v = ([torch.randn(runs, KV_HEADS, length, DIM, device=device, dtype=torch.bfloat16) for _ in range(sets)] for _ in range(2))
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def call(i, backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q[i], k[i], v[i], is_causal=causal, enable_gqa=True)

        try:
            report(f"{name} torch {backend.name.split('_')[0].lower()}", timed([lambda i=i: call(i) for i in range(sets)]), work, unit)
        except RuntimeError as error:
            print(f"{name} torch {backend.name}: not there: {str(error).splitlines()[0][:80]}")


def decode(driver, kind, batch, context):
    size = 2.0 * batch * KV_HEADS * DIM * context * torch.empty(0, dtype=KINDS[kind]).element_size()
    sets = min(16, max(2, math.ceil(160e6 / size)))
    cache = Cache(kind, sets, batch, context)
    q, out = (torch.randn(batch, HEADS * DIM, device=device) for _ in range(2))
    small = kind != "bf16"
    warps, ring, module = (4, 16384, "decode_fp8") if small else (8, 24576, "decode")
    blocks = (1 + small) * torch.cuda.get_device_properties(0).multi_processor_count
    words = lambda count: torch.zeros(count, dtype=torch.int32, device=device)
    positions, run, items, count = words(batch) + context - 1, words(batch), words(8 * 16384), words(1)
    run[:] = torch.arange(batch)
    splits, partial, sums, arrived = words(512), words(2048 * 64 * DIM), words(2048 * 64 * 2), words(128 * KV_HEADS)
    address = lambda **tensors: {name: tensor.data_ptr() for name, tensor in tensors.items()}
    plan = PlanParams(**address(positions=positions, token_run=run, items=items, item_count=count, splits_of=splits))
    plan.tokens, plan.head_blocks, plan.blocks = batch, KV_HEADS, blocks
    driver.launch("plan", "attention_plan", 1, 1024, 0, plan, False)
    lists = address(items=items, item_count=count, q=q, partial=partial, partial_sums=sums, arrived=arrived, out=out)
    depth = ring // (32 * DIM * torch.empty(0, dtype=KINDS[kind]).element_size())
    shared = warps * ring + 32 * 132 * 4 + 10 * DIM * 4 + 512 + 32 * 48 + warps * depth * 8 + warps * 64 + 256

    def call(which, overlap=False):
        params = DecodeParams(**cache.pages(which), **lists)
        return lambda: driver.launch(module, f"attention_decode_{kind}_{DIM}", blocks, 32 * warps, shared, params, overlap)

    out.fill_(float("nan"))
    call(0)()
    want = [
        attend(q[t].view(1, KV_HEADS, GROUP, DIM), cache.rows(cache.k, 0, t), cache.rows(cache.v, 0, t), context - 1)
        for t in range(batch)
    ]
    want = torch.cat(want).view(batch, -1)
    error = f"error {float((out - want).norm() / want.norm()):.1e}, {count.item()} splits"
    name = f"decode {kind} {batch} x {context}"
    turns = [i % sets for i in range(max(sets, 12))]
    report(f"{name} ours", timed([call(i) for i in turns]), size, "TB/s", error)
    report(f"{name} ours, dependent launch", timed([call(i, True) for i in turns]), size, "TB/s")
    if kind == "bf16":
        peers(name, batch, context, 1, sets, False, size, "TB/s")


def prompt(driver, kind, position, tokens):
    length = position + tokens
    cache = Cache(kind, 1, 1, length)
    q = torch.randn(tokens, HEADS * DIM, device=device)
    scaled, out = (q * SCALE).to(torch.bfloat16 if kind == "bf16" else torch.float16), torch.empty_like(q)
    cluster = 2 if kind == "bf16" else 1
    rows, last = tokens * GROUP, lambda row: min(row + 128 * cluster, tokens * GROUP) - 1
    units = [[0, row, last(row), 0, position, 0, 0, 0] for row in range(0, rows, 128 * cluster)][::-1]
    units = torch.tensor(units, dtype=torch.int32, device=device)
    plane_blocks = -(-tokens // 8)
    plane = torch.empty(HEADS * 2 * plane_blocks * 1024, dtype=torch.uint8, device=device)
    places = {"blocks": units.data_ptr(), "q16": scaled.data_ptr(), "plane_blocks": plane_blocks, "block_count": len(units)}
    most = torch.cuda.get_device_properties(0).multi_processor_count // cluster
    grid, threads = min(most, len(units) * KV_HEADS) * cluster, 384 if kind == "bf16" else 512

    def call(**result):
        params = PrefillParams(**cache.pages(0), **places, **result)
        return lambda: driver.launch("prefill_wide", f"attention_prefill_wide_{kind}", grid, threads, 230656, params, False)

    out.fill_(float("nan"))
    call(out=out.data_ptr())()
    want = attend(q.view(tokens, KV_HEADS, GROUP, DIM), cache.rows(cache.k, 0, 0), cache.rows(cache.v, 0, 0), position)
    error = f"error {float((out - want.view(tokens, -1)).norm() / want.norm()):.1e}"
    work = 4.0 * HEADS * DIM * tokens * (position + (tokens + 1) / 2)
    name = f"prompt {kind} {tokens} at {position}"
    report(f"{name} ours", timed([call(plane=plane.data_ptr())] * 4), work, "TFLOP/s", error)
    if kind == "bf16" and position == 0:
        peers(name, 1, tokens, tokens, 1, True, work, "TFLOP/s")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--cubins", type=pathlib.Path)
    parser.add_argument("--decode", default="16:256,32:2048,96:1024")
    parser.add_argument("--prompts", default="0:4096,4096:4096,0:8192")
    parser.add_argument("--kinds", default="bf16,e4m3")
    arguments = parser.parse_args()
    pairs = lambda text: [tuple(map(int, item.split(":"))) for item in text.split(",") if item]
    print(torch.cuda.get_device_name(0), "torch", torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        cubins = arguments.cubins or pathlib.Path(folder)
        for name in () if arguments.cubins else MODULES:
            options = ["-std=c++17", "-O3", "-cubin", "-gencode=arch=compute_90a,code=sm_90a"]
            subprocess.run([arguments.nvcc, *options, "-o", cubins / f"{name}.cubin", SOURCES / f"{name}.cu"], check=True)
        driver = Driver(cubins)
        torch.manual_seed(1)
        for kind in arguments.kinds.split(","):
            for batch, context in pairs(arguments.decode):
                decode(driver, kind, batch, context)
            for position, tokens in pairs(arguments.prompts):
                prompt(driver, kind, position, tokens)
            torch.cuda.empty_cache()


main()
