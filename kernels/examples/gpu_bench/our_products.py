"""Our products for torch_peers.py: the fatbins that a build left, launched through the driver with random streams.

Parameters mirror GemmParams (linear/linear_params.cuh) and ManyParams (experts/many.cuh), shared memory wide_shared_bytes, staged_shared_bytes,
rows_shared_bytes and quantised_launch of cuda/plane.rs, launch and quantised_launch of linear/few.rs, cuts best_cut of cuda/wide_cut.rs.
"""

import ctypes
import glob
import os

import torch

# Also makes the context that the driver's calls need.
torch.zeros(1, device="cuda")
MULTIPROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count
driver = ctypes.CDLL("libcuda.so.1")
device = "cuda"
# Inputs and bytes of a stage of 16 rows, depth of the two rings of wide.cuh.
STAGES = {"int4_g128": (128, 1072, 4, 5), "fp8": (128, 2064, 3, 4), "fp8_act": (128, 2064, 0, 0), "bf16": (64, 2048, 2, 4)}
# Of experts in FP8: bytes of a stage and of a scale block, and of three stages behind their line.
EXPERT_STAGE, SCALE_BLOCK, TRIO = 2048, 16, 128 + 3 * 2048


def check(result, what):
    if result:
        raise RuntimeError(f"{what}: CUDA error {result}")


class Weight(ctypes.Structure):
    _fields_ = [("stream", ctypes.c_uint64)] + [(n, ctypes.c_int) for n in ("tiles", "stages", "rows", "bf16_scales")]


class Gemm(ctypes.Structure):
    _fields_ = (
        [("segments", Weight * 3)]
        + [(n, ctypes.c_uint64) for n in ("plane", "y", "residual")]
        + [(n, ctypes.c_int) for n in ("tokens", "blocks", "width", "tiles", "steps", "parts", "band", "cut_pairs", "whole", "cuts")]
    )


class Many(ctypes.Structure):
    _fields_ = (
        [(n, ctypes.c_uint64) for n in ("base", "expert_bytes", "up_offset", "down_offset")]
        + [(n, ctypes.c_int) for n in ("hidden_padded", "inter_padded", "hidden", "bf16_scales")]
        + [(n, ctypes.c_uint64) for n in ("tiles", "tile_count", "plane", "acted", "y")]
        + [("blocks", ctypes.c_int)]
    )


class Kernel:
    def __init__(self, folder, file, name, shared, threads=384):
        found = glob.glob(os.path.join(folder, file + ".*bin"))
        if not found:
            raise RuntimeError(f"no {file}.fatbin in {folder}")
        module, self.function, self.shared, self.threads = ctypes.c_void_p(), ctypes.c_void_p(), shared, threads
        check(driver.cuModuleLoad(ctypes.byref(module), found[0].encode()), found[0])
        check(driver.cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()), name)
        check(driver.cuFuncSetAttribute(self.function, 8, shared), f"{name}: {shared} bytes of shared memory")

    def launch(self, blocks, params):
        stream, list_of_one = torch.cuda.current_stream().cuda_stream, ctypes.c_void_p(ctypes.addressof(params))
        check(
            driver.cuLaunchKernel(
                self.function, blocks, 1, 1, self.threads, 1, 1, self.shared, ctypes.c_void_p(stream), ctypes.byref(list_of_one), None
            ),
            "launch",
        )


def stages(count, kind):
    size = STAGES[kind][1]
    if kind == "bf16":
        return (torch.randn(count, size // 2, device=device) * 0.02).bfloat16().view(torch.uint8)
    if kind == "int4_g128":
        out = torch.randint(0, 256, (count, size), device=device, dtype=torch.uint8)
        out[:, 1024:1056] = (torch.rand(count, 16, device=device) * 0.01 + 0.002).half().view(torch.uint8)
        out[:, 1056:] = torch.randint(0, 16, (count, 16), device=device, dtype=torch.uint8)
        return out
    out = torch.empty(count, size, device=device, dtype=torch.uint8)
    out[:, :2048] = torch.randn(count, 2048, device=device).to(torch.float8_e4m3fn).view(torch.uint8)
    out[:, 2048:] = (torch.rand(count, 4, device=device) * 0.02 + 0.01).view(torch.uint8)
    return out


def trios(count):
    """The same of experts in FP8: three stages behind a line whose end has their scales."""
    out = torch.randn(count, TRIO, device=device).to(torch.float8_e4m3fn).view(torch.uint8)
    out[:, :128] = (torch.rand(count, 32, device=device) * 0.02 + 0.01).view(torch.uint8)
    return out


def plane(inputs, blocks, quantised=False):
    if not quantised:
        return torch.randn(inputs // 64 * blocks * 512, device=device, dtype=torch.bfloat16)
    values = torch.randn(inputs // 128 * blocks * 1024, device=device).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.rand(inputs // 128 * blocks * 8, device=device) * 0.02 + 0.01
    return torch.cat([values, scales.view(torch.uint8)])


def wide_shared(kind, rest, experts=False):
    inputs, size, weights, planes = STAGES[kind]
    step = 8 * EXPERT_STAGE + 128 if experts and kind == "fp8" else 8 * (128 // inputs) * size
    return 1024 + planes * 256 * 128 + weights * step + 16 * (planes + weights) + rest


LEAVING, ROOMS = 32 + 256 * 272, 64 + 256 * 256


def staged_shared(kind):
    if kind == "bf16":  # wide_rows.cu
        return 1024 + 3 * (384 * 128 + 16) + ROOMS
    inputs, size = STAGES[kind][:2]
    weights, planes = 3, 4 if kind == "int4_g128" else 3
    return 1024 + planes * 256 * 128 + weights * 8 * (128 // inputs) * size + 16 * (planes + weights) + ROOMS


def cut_of(pairs, tokens, blocks):
    """Pairs of 128 rows that are cut, whole tiles of those, shares behind them; and all shares."""
    tiles = -(-tokens // 256)
    left, best = pairs * tiles % blocks, (240, (0, 0, 1))
    for cut in range(1, pairs + 1):
        of_pair, more = -(-left // cut), (blocks - left) // cut
        cuts = of_pair + more
        width = -(-(of_pair * 256) // (cuts * 8)) * 8
        fits = left and tokens % 256 == 0 and more and of_pair <= tiles and (cuts - 1) * width < of_pair * 256
        if fits and (width < best[0] or width == 240 and best[1][0] == 0):
            best = width, (cut, tiles - of_pair, cuts)
    cut, whole, cuts = best[1]
    return best[1], pairs * tiles + cut * (whole + cuts - tiles)


def quantised_shared(rest, depth=3):
    return 1024 + depth * (256 * 132 + 128 * 128 + 48) + rest


FEW_QUANTISED_TILES = 4


def few_tiles(kind, columns):
    """Of a block."""
    return FEW_QUANTISED_TILES if kind == "fp8_act" else 12 if columns <= (64 if kind == "bf16" else 96) else 8


def few_shared(kind, columns):
    if kind == "fp8_act":
        return max(118 * 1024, 1024 + 6 * (columns * 132 + 4 * 2048 + 32) + 2 * columns * 68 * 4)
    inputs, size = STAGES[kind][:2]
    tiles, plane = few_tiles(kind, columns), inputs * columns * 2
    slots = tiles * (3 if tiles == 8 or kind == "bf16" else 2)
    rest = slots * (2 if kind == "int4_g128" else 1) * size + columns * (tiles * 16 + 4) * 4
    planes = min((226 * 1024 - 2048 - rest) // plane, 8 * 128 // inputs)
    return 1024 + planes * plane + rest + 1024


def few(folder, kind, tiles, tokens):
    """The kernel of up to 128 tokens, and blocks for all rows."""
    columns = next(n for n in (32, 64, 96, 128) if tokens <= n)
    own, file = few_tiles(kind, columns), "linear_few_quantised" if kind == "fp8_act" else "linear_few"
    # Results of more than 64 tokens leave as BF16.
    name = file + ("16" if tokens > 64 else "") + ("" if kind == "fp8_act" else f"_{kind}")
    threads = 320 if kind == "fp8_act" else (own + 1) * 32
    return Kernel(folder, file, f"{name}_{columns}", few_shared(kind, columns), threads), -(-tiles // own)


def dense(folder, kind, rows, inputs, tokens, output, copies):
    """A list of calls (over `copies` weights) and the result that they leave, of q k v or the output projection."""
    residual = output and tokens > 128
    stage_inputs = STAGES[kind][0]
    tiles, blocks = rows // 16, -(-tokens // 128) * 16
    parts = 1
    if tokens > 128:
        # As in a step: q, k and v leave as BF16, the output projection's results are added to the residual.
        if kind == "fp8_act":
            kernel = Kernel(folder, "linear_quantised", f"linear_quantised_{'f32' if residual else 'bf16'}", quantised_shared(LEAVING))
        elif kind == "bf16":
            kernel = Kernel(folder, "linear_wide_rows", f"linear_rows_{'add_' if residual else ''}{kind}", staged_shared(kind))
        else:
            kernel = Kernel(folder, "linear_wide_staged", f"linear_wide{'_add' if residual else '16'}_{kind}", staged_shared(kind))
        pairs = -(-tiles // 16)
        cut, work = cut_of(pairs, tokens, MULTIPROCESSORS // 2)
        if kind == "fp8_act":
            work = pairs * -(-tokens // 256)
        grid = 2 * min(MULTIPROCESSORS // 2, work)
    else:
        kernel, m_tiles = few(folder, kind, tiles, tokens)
        each = -(-inputs // 128 // max(1, min(12, MULTIPROCESSORS // m_tiles)))
        parts = -(-(inputs // 128) // each)
        grid = min(MULTIPROCESSORS, m_tiles * parts)
    x, y = plane(inputs, blocks, kind == "fp8_act"), torch.randn(parts, tokens, rows, device=device)
    calls = []
    for _ in range(copies):
        stream, params = stages(tiles * (inputs // stage_inputs), kind), Gemm()
        params.segments[0] = Weight(stream.data_ptr(), tiles, inputs // stage_inputs, rows, 0)
        params.plane, params.y, params.residual = x.data_ptr(), y.data_ptr(), y.data_ptr() if residual else 0
        params.tokens, params.blocks, params.width, params.tiles = tokens, blocks, rows, tiles
        params.steps, params.parts = inputs // 128, parts
        if tokens > 128:
            params.band, params.cut_pairs, params.whole, params.cuts = 8 if kind == "bf16" else pairs, *cut
        calls.append(lambda params=params, keep=(stream, x): kernel.launch(grid, params))
    return calls, y


def tile_list(counts, unit, most):
    """What sort_scan makes of the numbers of rows of each expert."""
    tiles, start = [], 0
    for expert, rows in enumerate(counts):
        padded = -(-rows // 8) * 8
        pieces = -(-padded // most)
        each = min(most, -(-(-(-padded // pieces)) // unit) * unit) if pieces else 0
        tiles += [(expert, start + i * each, min(each, rows - i * each), 0) for i in range(pieces)]
        start += padded
    return tiles, start


def experts(folder, kind, counts, hidden, inter, up):
    """The same for one of the two products of all experts."""
    size, stage_inputs, count = STAGES[kind][1], STAGES[kind][0], len(counts)
    fp8 = kind.startswith("fp8")
    if fp8:  # inputs are multiples of 384
        size, stage_inputs = TRIO, 384
    up_bytes, down_bytes = inter // 16 * (hidden // stage_inputs) * size, hidden // 16 * (inter // stage_inputs) * size
    made = (2 * up_bytes + down_bytes) // size
    weights = torch.cat([(trios(made) if fp8 else stages(made, kind)).flatten() for _ in range(count)])
    quantised = kind == "fp8_act"
    tiles, rows = tile_list(counts, 32, 256)
    blocks = -(-(rows + 256) // 8)
    x, acted = plane(hidden if up else inter, blocks, quantised), plane(inter, blocks, quantised)
    y = torch.zeros(rows, hidden, device=device, dtype=torch.bfloat16)
    list_of_tiles = torch.tensor(tiles, dtype=torch.int32, device=device)
    tile_count = torch.tensor([len(tiles)], dtype=torch.int32, device=device)
    params = Many()
    params.base, params.expert_bytes = weights.data_ptr(), 2 * up_bytes + down_bytes
    params.up_offset, params.down_offset = up_bytes, 2 * up_bytes
    params.hidden_padded, params.inter_padded, params.hidden = hidden, inter, hidden
    params.tiles, params.tile_count = list_of_tiles.data_ptr(), tile_count.data_ptr()
    params.plane, params.acted, params.y, params.blocks = x.data_ptr(), acted.data_ptr(), y.data_ptr(), blocks
    name = "gate_up" if up else "down"
    if quantised:
        kernel = Kernel(folder, "experts_quantised", f"quantised_{name}", quantised_shared(5 * 8 * 136, 4) if up else quantised_shared(LEAVING))
    else:
        kernel = Kernel(folder, "experts_wide", f"wide_{name}_{kind}", wide_shared(kind, 32768 if up else 0, True))
    grid = MULTIPROCESSORS // 2 * 2
    keep = (weights, x, acted, list_of_tiles, tile_count)
    return [lambda keep=keep: kernel.launch(grid, params)], acted if up else y
