"""A layer's kernels in order, from a trace of inject.c: medians over all layers of the same kernels, on each device.

    layers.py TRACE MARK      a layer goes from one kernel whose name has MARK to the next

"after" is from the end of the kernel before to the end of this one: what the kernel adds to the layer. A kernel begins before
that one ends (dependent launch), so what it runs says little.
"""

import array
import statistics
import sys
from collections import defaultdict

LEAST_LAYERS = 200


def kernels(path):
    rows = array.array("q")
    with open(path, "rb") as trace:
        rows.frombytes(trace.read())
    with open(path + ".names") as lines:
        names = lines.read().split("\n")
    devices = defaultdict(list)
    for at in range(0, len(rows), 4):
        begin, end, place, what = rows[at : at + 4]
        devices[place >> 32].append((begin, end, names[what >> 32], what & 0xFFFFFFFF))
    return {device: sorted(found) for device, found in sorted(devices.items())}


def part(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main(path, mark):
    for device, found in kernels(path).items():
        print(f"== device {device}")
        at = [i for i, kernel in enumerate(found) if mark in kernel[2]]
        layers = defaultdict(list)
        for first, end in zip(at, at[1:]):
            layers[tuple(kernel[2:] for kernel in found[first:end])].append((first, end))
        for names, spans in layers.items():
            if len(spans) < LEAST_LAYERS:
                continue
            spans = spans[len(spans) // 3 :]
            whole = [(found[end][1] - found[first][1]) / 1e3 for first, end in spans]
            print(f"  {len(spans)} layers of {len(names)} kernels, {statistics.median(whole):.1f} us a layer")
            for i, (name, grid) in enumerate(names):
                after = [(found[first + i][1] - found[first + i - 1][1]) / 1e3 for first, _ in spans if first + i]
                runs = [(found[first + i][1] - found[first + i][0]) / 1e3 for first, _ in spans]
                low, high = part(after, 0.1), part(after, 0.9)
                print(f"    {name:36} grid {grid:4}  after {statistics.median(after):7.2f} ({low:.2f} to {high:.2f})  runs {statistics.median(runs):7.2f}")


main(sys.argv[1], sys.argv[2])
