"""Two workers: on one GPU under MPS, on two, over every transport, and one of them killed in mid-answer."""
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time

from adjusted import fp8_activations
from harness import Server, body_of, cases, check, ended, logprobs
from recorded import answers, together


def gpus():
    """How many this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return len(named.split(","))
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")


@contextlib.contextmanager
def shared_gpu():
    """Processes that share a GPU inside this run beside each other, not in turns. The server of MPS numbers the GPUs that it
    was given from 0 on, and its clients count among those."""
    folder = tempfile.mkdtemp()
    before = dict(os.environ)
    os.environ.update(dict.fromkeys(("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"), folder))
    try:
        subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True)
        if "CUDA_VISIBLE_DEVICES" in before:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(gpus())))
        yield
    finally:
        subprocess.run(["nvidia-cuda-mps-control"], input="quit\n", text=True, timeout=30)
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


def cluster():
    """Two workers, on every set of GPUs and over every transport that there is."""
    alone = {}
    for mode in ("", "--deterministic=true"):
        server = Server("--workers=1", *filter(None, [mode]))
        alone[mode] = logprobs(server)
        server.stop()
    with shared_gpu():
        two_workers(["--device=cuda:0", "--transport=ipc"], "one GPU under MPS", alone)
    if gpus() < 2:
        print("      one GPU: two workers on two GPUs are not checked")
        return
    for transport in ("ipc", "nccl"):
        two_workers([f"--transport={transport}"], "two GPUs", alone)
        fp8_activations(("--workers=2", f"--transport={transport}"))
    server = Server("--workers=2")
    text = server.text()
    check("auto takes ipc between two GPUs", "transport=ipc" in text, next_epoch(text))
    server.stop()


def next_epoch(text):
    return next((line[-250:] for line in text.splitlines() if "epoch ready" in line), "no epoch")


def two_workers(flags, where, alone):
    for mode in ("", "--deterministic=true"):
        server = Server("--workers=2", *flags, *filter(None, [mode]))
        name = " ".join(["2 workers,", where, *flags[-1:], *filter(None, [mode])])
        print(f"      {name}: ready after {server.seconds:.2f} s; {next_epoch(server.text())}")
        answers(server, name)
        # Rows between workers are BF16 and batches change.
        together(server, name, ties=not mode)
        # Rounding apart as many as one worker's; in deterministic mode those very ones.
        apart = [abs(a - b) for a, b in zip(logprobs(server), alone[mode])]
        mean, most = sum(apart) / len(apart), max(apart)
        check(f"{name}: log-probabilities of 700 prompt tokens", len(apart) == 699 and mean < 0.1 and (most == 0 or not mode),
              f"from one worker's {mean:.1e} in the mean, {most:.1e} at most")
        ended(server, name)
    kill_and_recover(flags, " ".join([where, *flags[-1:]]))


def kill_and_recover(flags, where):
    server = Server("--workers=2", *flags)
    case = max(cases(("chat",)), key=lambda case: len(case["completion_ids"]))
    good, slowest = [], 0

    def one():
        try:
            got = server.ask(body_of(case))["choices"][0]["token_ids"]
            good.append(got == case["completion_ids"])
        except Exception as error:  # noqa: BLE001
            good.append(str(error))

    for round_ in range(3):
        began = time.time()
        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.1 + 0.1 * round_)
        workers = server.workers()
        if workers:
            os.kill(workers[round_ % len(workers)], signal.SIGKILL)
        for thread in threads:
            thread.join()
        slowest = max(slowest, time.time() - began)
        deadline = time.time() + 10
        while len(server.workers()) < 2 and time.time() < deadline:
            time.sleep(0.1)
        time.sleep(1)
    whole = sum(one is True for one in good)
    check(f"kill -9 of one of two workers, three times, {where}", len(good) == 24 and whole == 24,
          f"{whole} of 24 answers are whole and as recorded, the slowest round took {slowest:.1f} s")
    if whole < 24:
        print(good, server.text()[-4000:])
    server.stop()
