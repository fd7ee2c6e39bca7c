"""What PyTorch's collectives reach where `gpu_exchange bench` runs: the peer beside its figures.

One process a GPU. Times a pair of all_to_all_single, there and back, of BF16 rows of 3072 values, recorded in a CUDA graph and
eager, and the copy bandwidth between two GPUs. `--tokens` are tokens a rank; each token sends one row to every rank (what a
token with eight experts does on few ranks), so a rank sends tokens x ranks rows there and gets as many back, its own included.

The pair alone moves rows that lie ready. The column "with its work" is a layer's exchange as one would write it with torch, in a
graph: rows gathered in the order of their destinations, the pair, before the way back each row's eight / ranks results of
experts summed by weight, and what came back added to the F32 hidden state. Which token goes where is known beforehand, no
weights and expert numbers travel, and rows that come are not grouped by expert: all that `gpu_exchange bench` times as well.

    python3 torch_all_to_all.py [--gpus N] [--tokens 1,8,32,128,512,4096] [--hidden 3072]
"""

import argparse
import os
import statistics

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GRAPH_PAIRS = 20
REPEATS = 30
TOP_K = 8


def timed(run, calls):
    """Microseconds of one call: the median over repeats of what events around `calls` of them say."""
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)


def slowest(value, device):
    """The largest of all ranks' values."""
    value = torch.tensor([value], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def pair_times(tokens, hidden, ranks, device):
    sent = torch.randn(ranks * tokens, hidden, device=device).bfloat16()
    there, back = torch.empty_like(sent), torch.empty_like(sent)

    def pair():
        dist.all_to_all_single(there, sent)
        dist.all_to_all_single(back, there)

    for _ in range(5):
        pair()
    torch.cuda.synchronize()
    assert torch.equal(back, sent), "what came back is not what was sent"

    def pairs():
        for _ in range(GRAPH_PAIRS):
            pair()

    eager = slowest(timed(pairs, GRAPH_PAIRS), device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        pairs()
    graph.replay()
    recorded = slowest(timed(graph.replay, GRAPH_PAIRS), device)
    del graph
    return recorded, eager


def worked_times(tokens, hidden, ranks, device):
    """A pair with what a layer does on either side of it."""
    rows, slots = ranks * tokens, max(1, TOP_K // ranks)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    order = torch.arange(tokens, device=device).repeat(ranks)
    there, back = (torch.empty(rows, hidden, device=device, dtype=torch.bfloat16) for _ in range(2))
    weights = torch.full((rows, 1, slots), 1 / slots / ranks, device=device, dtype=torch.bfloat16)
    results = torch.zeros(rows, slots, hidden, device=device, dtype=torch.bfloat16)
    state = torch.zeros(tokens, hidden, device=device)

    def layer():
        dist.all_to_all_single(there, x.index_select(0, order))
        dist.all_to_all_single(back, torch.bmm(weights, results).view(rows, hidden))
        state.add_(back.view(ranks, tokens, hidden).sum(0, dtype=torch.float32))

    for _ in range(3):
        layer()
    results.copy_(there[:, None, :].expand_as(results))
    state.zero_()
    layer()
    torch.cuda.synchronize()
    error = (state - x).norm() / x.norm()
    assert error < 1e-2, f"experts that do nothing give another state: {error}"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(GRAPH_PAIRS):
            layer()
    graph.replay()
    recorded = slowest(timed(graph.replay, GRAPH_PAIRS), device)
    del graph
    return recorded


def peer_copy(bytes_, both):
    """GB/s of copies from GPU 0 to GPU 1, or both ways at once (the sum)."""
    a, b = (torch.empty(bytes_, dtype=torch.uint8, device=f"cuda:{i}") for i in range(2))
    streams = [torch.cuda.Stream(device=f"cuda:{i}") for i in range(2)]
    times = []
    for _ in range(10):
        for i in range(2):
            torch.cuda.synchronize(i)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(2)]
        for i, (to, source) in enumerate([(b, a), (a, b)]):
            if i == 1 and not both:
                break
            half = bytes_ // 2
            with torch.cuda.device(i), torch.cuda.stream(streams[i]):
                events[i][0].record()
                for _ in range(4):
                    to[i * half : (i + 1) * half].copy_(source[i * half : (i + 1) * half], non_blocking=True)
                events[i][1].record()
        for i in range(2):
            torch.cuda.synchronize(i)
        times.append(max(begin.elapsed_time(end) for begin, end in events[: 2 if both else 1]))
    return 4 * (bytes_ // 2) * (2 if both else 1) / (min(times) / 1000) / 1e9


def rank_main(rank, ranks, args):
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = str(args.port)
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", rank=rank, world_size=ranks, device_id=device)
    if rank == 0:
        print(f"torch {torch.__version__}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, {ranks} x {torch.cuda.get_device_name()}")
        print("tokens a rank | bytes to each rank | pair in a graph us | GB/s | pair eager us | with its work, in a graph us")
    for tokens in args.tokens:
        recorded, eager = pair_times(tokens, args.hidden, ranks, device)
        worked = worked_times(tokens, args.hidden, ranks, device)
        if rank == 0:
            wire = tokens * args.hidden * 2
            rate = 2 * wire * (ranks - 1) / recorded / 1000
            print(f"{tokens:>13} | {wire:>18} | {recorded:>18.1f} | {rate:>4.0f} | {eager:>13.1f} | {worked:>28.1f}", flush=True)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--tokens", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32, 128, 512, 4096])
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--port", type=int, default=29431)
    args = parser.parse_args()
    if args.gpus < 2 or args.gpus > torch.cuda.device_count():
        parser.error(f"--gpus is {args.gpus}: 2 to the {torch.cuda.device_count()} of this machine")
    mp.spawn(rank_main, args=(args.gpus, args), nprocs=args.gpus)
    print(f"peer copy GPU 0 to 1: {peer_copy(1 << 29, False):.0f} GB/s one way, {peer_copy(1 << 29, True):.0f} GB/s both ways together")


if __name__ == "__main__":
    main()
