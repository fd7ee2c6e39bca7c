"""End to end on a machine with a GPU: python3 tests/gpu/e2e.py BINARY [--root DIR] [--only PART,...]

Serves the bundled model on the GPU and compares every recorded answer token for token, on one worker and on two: over ipc, on
one GPU under MPS or on two, and over nccl where there are two; verifies every reference checkpoint; compares log-probabilities,
penalties and constrained answers with the CPU's; turns FP8 activations on and off; runs out of KV pages; kills a worker of two
in mid-answer; injects a faulty kernel and a NaN; starts a model that does not fit.
Needs only Python's standard library. Prints one line a check, ends with status 1 if one fails.
"""
import argparse
import os
import sys
import time

import adjusted
import recorded
import shortage
import workers
from harness import check, failed, settings

PARTS = (recorded.verify, recorded.serve_checks, adjusted.sampling, adjusted.fp8_activations, shortage.preemption,
         workers.cluster, shortage.faults, shortage.out_of_memory)

parser = argparse.ArgumentParser()
parser.add_argument("binary")
parser.add_argument("--root", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "../.."))
parser.add_argument("--device", default="cuda")
parser.add_argument("--only", default=",".join(part.__name__ for part in PARTS))
parser.parse_args(namespace=settings)
for part in PARTS:
    if part.__name__ not in settings.only.split(","):
        continue
    began = time.time()
    try:
        part()
    except Exception as error:  # noqa: BLE001
        check(part.__name__, False, repr(error))
    print(f"      {part.__name__}: {time.time() - began:.1f} s", flush=True)
print(f"{len(failed)} checks failed: {failed}" if failed else "all good")
sys.exit(bool(failed))
