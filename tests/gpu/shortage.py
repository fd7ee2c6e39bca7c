"""What goes wrong: KV pages run out, a kernel fails, a logit is no number, a model does not fit."""
import os
import subprocess
import threading

from harness import Server, body_of, cases, check, settings


def preemption():
    """Few pages: sequences must give way to each other, and every answer is whole all the same."""
    server = Server("--workers=1", "--deterministic=true", "--kv-cache-memory-bytes=6MB", "--no-enable-prefix-caching")

    def ids(index):
        prompt = [(k * 31 + index * 97 + 5) % 3000 for k in range(40)]
        body = {"prompt": prompt, "max_tokens": 300, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
        return server.ask(body, "/v1/completions")["choices"][0]["token_ids"]

    alone = [ids(index) for index in range(24)]
    crowd = {}

    def one(index):
        crowd[index] = ids(index)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    good = sum(crowd.get(index) == alone[index] for index in range(24))
    text = server.get("/metrics")
    count = sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_preemptions"))
    check("few KV pages: sequences give way to each other", count > 0 and good == 24,
          f"{count:.0f} preemptions, {good} of 24 answers as alone")
    server.stop()


def faults():
    server = Server("--workers=1", "--inject-fault=kernel@20")
    case = cases(("chat",))[0]
    results = []
    for _ in range(6):
        try:
            results.append(server.ask(body_of(case))["choices"][0]["token_ids"] == case["completion_ids"])
        except Exception as error:  # noqa: BLE001
            results.append(str(error))
    text = server.text()
    reason = next((line for line in text.splitlines() if "failed" in line and ("CUDA" in line or "provoked" in line)), "")
    check("a faulty kernel ends the worker, and the cluster comes back", all(r is True for r in results) and reason != "",
          f"{results} {reason[:200]}")
    server.stop()
    server = Server("--workers=1", "--inject-fault=nan@12")
    outcomes = []

    def one():
        try:
            outcomes.append(server.ask(body_of(case))["choices"][0]["token_ids"] == case["completion_ids"])
        except Exception as error:  # noqa: BLE001
            outcomes.append(getattr(error, "code", None) or str(error))

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [outcome for outcome in outcomes if outcome is not True]
    check("a NaN in one row fails that request alone", len(failed) == 1, f"{outcomes}")
    server.stop()


def out_of_memory():
    """A model that one GPU cannot hold: the start says what does not fit, and what would."""
    command = [settings.binary, "serve", os.path.join(settings.root, "tests/data/minimax-m2/full-size/bf16"),
               "--load-format=dummy", "--skip-tokenizer-init", "--port=0", "--grpc-port=0", "--workers=1",
               f"--device={settings.device}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    told = [line for line in run.stderr.splitlines() if "out of memory" in line]
    good = run.returncode != 0 and any("what would fit" in line and "--workers" in line for line in told)
    check("a model that does not fit is refused with what would", good, (told or [run.stderr[-500:]])[0])
