"""Calls in CUDA graphs, and what they take: for torch_peers.py and attention_peers.py."""

import statistics

import torch


def captured(calls):
    """One graph of all calls, one after the other, each called once before."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replayed(graph, count):
    """Microseconds of one of a graph's `count` calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / count


def timed(calls, repeat=12):
    """Median and least microseconds of one call inside a graph of all."""
    graph = captured(calls)
    graph.replay()
    times = [replayed(graph, len(calls)) for _ in range(repeat)]
    return statistics.median(times), min(times)
