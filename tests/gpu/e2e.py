"""End to end on a machine with a GPU: python3 tests/gpu/e2e.py BINARY [--root DIR] [--only PART,...]

Serves the bundled model on the GPU and compares every recorded answer token for token, on one worker and on two: over ipc, on
one GPU under MPS or on two, and over nccl where there are two; verifies every reference checkpoint; compares log-probabilities,
penalties and constrained answers with the CPU's; turns FP8 activations on and off; runs out of KV pages; kills a worker of two in mid-answer; injects a faulty kernel and a NaN; starts a model that does not fit.
Needs only Python's standard library. Prints one line a check, ends with status 1 if one fails.
"""
import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

parser = argparse.ArgumentParser()
parser.add_argument("binary")
parser.add_argument("--root", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "../.."))
parser.add_argument("--device", default="cuda")
parser.add_argument("--only", default="verify,serve_checks,sampling,fp8_activations,preemption,cluster,faults,out_of_memory")
arguments = parser.parse_args()
failures = 0


def check(name, good, detail=""):
    global failures
    failures += not good
    print(("ok    " if good else "FAIL  ") + name + (f": {detail}" if detail else ""), flush=True)


class Server:
    """`conclave serve`, ready. Its standard error goes to a file."""

    def __init__(self, *flags, model="models/demo", log="serve.log"):
        self.log = open(log, "w+")
        command = [arguments.binary, "serve", os.path.join(arguments.root, model), "--port=0", "--grpc-port=0"]
        # A later --device would be one too many.
        command += [*([] if any(flag.startswith("--device=") for flag in flags) else [f"--device={arguments.device}"]), *flags]
        started = time.time()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, stdin=subprocess.DEVNULL)
        self.http = None
        for line in self.process.stdout:
            if line.startswith("  HTTP  "):
                self.http = line.split()[1]
            if line.startswith("  try "):
                break
        self.seconds = time.time() - started
        if self.http is None:
            print(self.text())
            raise SystemExit("the server did not come up")

    def ask(self, body, path="/v1/chat/completions"):
        request = urllib.request.Request(
            self.http + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def get(self, path):
        with urllib.request.urlopen(self.http + path, timeout=30) as answer:
            return answer.read().decode()

    def text(self):
        self.log.flush()
        return open(self.log.name).read()

    def workers(self):
        """Process ids of the worker children."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                parent = re.search(r"PPid:\s+(\d+)", open(f"/proc/{entry}/status").read())
                line = open(f"/proc/{entry}/cmdline").read().split("\0")
            except (OSError, NotADirectoryError):
                continue
            if parent and int(parent.group(1)) == self.process.pid and "worker" in line[1:2]:
                found.append(int(entry))
        return sorted(found)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "killed"


def cases(kinds=("chat", "tool", "tool result")):
    lines = open(os.path.join(arguments.root, "tests/data/demo/prompts.jsonl"))
    return [case for case in map(json.loads, lines) if case["kind"] in kinds]


def body_of(case):
    body = {"messages": case["messages"], "temperature": 0, "max_tokens": 700, "return_token_ids": True}
    if case.get("tools"):
        body["tools"] = case["tools"]
    return body


def answers(server, name):
    wrong = []
    for case in cases():
        got = server.ask(body_of(case))["choices"][0]["token_ids"]
        want = case["completion_ids"]
        if got != want:
            at = next((i for i, pair in enumerate(zip(got, want)) if pair[0] != pair[1]), min(len(got), len(want)))
            wrong.append(f"{case['messages'][-1]['content'][:40]!r} at {at} of {len(want)}: "
                         f"{got[at:at + 3]} instead of {want[at:at + 3]}")
    check(f"{name}: {len(cases())} recorded answers", not wrong, f"{len(wrong)} differ: {wrong[:8]}" if wrong else "")


def together(server, name, ties=False):
    """All at once: batches of many sizes. `ties`: an answer may part from the recorded one at a close choice."""
    parted = []

    def one(case):
        got = server.ask(body_of(case))["choices"][0]["token_ids"]
        if got != case["completion_ids"]:
            parted.append((case, got))

    threads = [threading.Thread(target=one, args=(case,)) for case in cases() * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    apart = [margin(server, case, got) for case, got in parted]
    good = not parted or ties and len(parted) < 0.1 * len(threads) and all(gap is not None and gap < TIE for gap, _ in apart)
    check(f"{name}: {len(threads)} requests at once", good, f"{len(threads) - len(parted)} equal the recorded answers"
          + "".join(f"; {what}" for _, what in apart))


# How far apart two tokens' log-probabilities may be where an answer parts: rounding moves one by 0.03 in the mean, in this model.
TIE = 0.05


def margin(server, case, got):
    """Where an answer parts from the recorded one: how much likelier the recorded token is there than the one that was taken,
    by what the server says of both when it is asked for that answer alone."""
    want = case["completion_ids"]
    at = next((i for i, pair in enumerate(zip(got, want)) if pair[0] != pair[1]), min(len(got), len(want)))
    place = f"{case['messages'][-1]['content'][:24]!r} parts at {at} of {len(want)}"
    if at >= min(len(got), len(want)):
        return None, f"{place}, where one ends"
    body = body_of(case) | {"logprobs": True, "top_logprobs": 20, "return_tokens_as_token_ids": True}
    row = server.ask(body)["choices"][0]["logprobs"]["content"][at]
    said = {entry["token"]: entry["logprob"] for entry in row["top_logprobs"]}
    ours, theirs = (said.get(f"token_id:{tokens[at]}") for tokens in (want, got))
    if ours is None or theirs is None:
        return None, f"{place}: token {got[at]} is not among the 20 likeliest"
    return abs(ours - theirs), f"{place}: {theirs:.3f} taken, {ours:.3f} recorded"


def ended(server, name):
    status = server.stop()
    check(f"{name}: ends", status == 0, f"status {status}")
    lines = server.text().splitlines()
    print("\n".join(line[:400] for line in lines if "WARN" in line or "ERROR" in line)[:1500])


def serve_checks():
    for flags in ([], ["--deterministic=true"]):
        server = Server("--workers=1", *flags)
        name = " ".join(["serve", *flags])
        print(f"      {name}: ready after {server.seconds:.2f} s")
        answers(server, name)
        together(server, name)
        ended(server, name)


def sampling():
    """What a request may ask of its tokens: as the CPU says it, alone and beside others that ask for other things."""
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"},
                                               "kind": {"enum": ["a", "b"]}}, "required": ["name", "count", "kind"]}
    constrained = {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}}
    chats = cases(("chat",))[:4]
    kinds = [("log-probabilities", {"logprobs": True, "top_logprobs": 20}), ("a penalty on frequency", {"frequency_penalty": 0.7}),
             ("a penalty on repetition", {"repetition_penalty": 1.3, "presence_penalty": 0.2}), ("no log-probabilities", {}),
             ("biases", {"logit_bias": {str(token): -100 for token in range(100, 400)}, "logprobs": True, "top_logprobs": 5}),
             ("a schema", constrained), ("a schema, drawn", constrained | {"temperature": 1, "seed": 5, "top_p": 0.9})]
    bodies = [(name, body_of(case) | {"max_tokens": 48, "return_tokens_as_token_ids": True} | more)
              for case in chats for name, more in kinds]

    def all_at_once(server):
        found = [None] * len(bodies)

        def one(index):
            found[index] = server.ask(bodies[index][1])["choices"][0]

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(bodies))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    found = {}
    for device in ("cpu", arguments.device):
        server = Server("--workers=1", f"--device={device}")
        began = time.time()
        found[device] = all_at_once(server)
        print(f"      {len(bodies)} requests at once on {device}: {time.time() - began:.2f} s")
        if device == arguments.device:
            alone = [server.ask(body)["choices"][0] for _, body in bodies]
        ended(server, f"sampling on {device}")
    ours, cpu = found[arguments.device], found["cpu"]
    for name, _ in kinds:
        mine = [index for index, (other, _) in enumerate(bodies) if other == name]
        same = [ours[index]["token_ids"] == cpu[index]["token_ids"] for index in mine]
        as_alone = sum(ours[index]["token_ids"] == alone[index]["token_ids"] for index in mine)
        apart, most, wrong = [], 0.0, []
        for index in mine:
            said = [(choice["logprobs"] or {}).get("content") or [] for choice in (ours[index], cpu[index])]
            for own, other in zip(*said):
                if own["token"] != other["token"]:
                    break
                theirs = {entry["token"]: entry["logprob"] for entry in other["top_logprobs"]}
                apart.append(abs(own["logprob"] - other["logprob"]))
                values = [entry["logprob"] for entry in own["top_logprobs"]]
                listed = {entry["token"]: entry["logprob"] for entry in own["top_logprobs"]}
                if values != sorted(values, reverse=True) or listed.get(own["token"], own["logprob"]) != own["logprob"]:
                    wrong.append(own)
                most = max([most, *(abs(value - theirs[token]) for token, value in listed.items() if token in theirs)])
        detail = f"{sum(same)} of {len(mine)} as the CPU's, {as_alone} as alone"
        if apart:
            detail += f"; log-probabilities of {len(apart)} tokens {sum(apart) / len(apart):.1e} from the CPU's in the mean, {most:.1e} at most"
        # A close choice may turn by rounding, which differs between the devices and between batches.
        good = sum(same) >= len(mine) - 1 and as_alone >= len(mine) - 1 and not wrong and sum(apart) <= TIE * len(apart)
        if "schema" in name:
            good = all(fits(ours[index]) for index in mine)
            detail += f"; the first: {ours[mine[0]]['message']['content'][:60]!r}"
        check(f"sampling with {name}", good, detail + (f"; {wrong[0]}" if wrong else ""))
    plain, told = ([ours[index]["token_ids"] for index, (other, _) in enumerate(bodies) if other == name]
                   for name in ("no log-probabilities", "log-probabilities"))
    check("log-probabilities change no token", sum(a == b for a, b in zip(plain, told)) >= len(plain) - 1)


def fits(choice):
    """Whether a constrained answer is whole and what its schema says, or was cut off by its length."""
    if choice["finish_reason"] == "length":
        return choice["message"]["content"].lstrip().startswith("{")
    value = json.loads(choice["message"]["content"])
    return (set(value) >= {"name", "count", "kind"} and isinstance(value["name"], str) and isinstance(value["count"], int)
            and value["kind"] in ("a", "b"))


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


def logprobs(server, vocabulary=3000):
    """Of 700 prompt tokens: more than a pass of the head takes."""
    body = {"prompt": [(k * 31 + 5) % vocabulary for k in range(700)], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0,
            "ignore_eos": True}
    rows = server.ask(body, "/v1/completions")["choices"][0]["prompt_logprobs"]
    return [next(iter(row.values()))["logprob"] for row in rows[1:]]


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


def fp8_activations():
    """Log-probabilities of a prompt's tokens by FP8 weights, activations quantised or not: as the CPU's in the same mode."""
    for model in ("tests/data/minimax-m2/tiny-hd64/fp8", "tests/data/minimax-m2/tiny-hd128/fp8"):
        vocabulary = json.load(open(os.path.join(arguments.root, model, "config.json")))["vocab_size"]
        found = {}
        for device in ("cpu", arguments.device):
            for mode in ("off", "on"):
                server = Server("--workers=1", "--skip-tokenizer-init", f"--device={device}", f"--fp8-activations={mode}",
                                model=model)
                found[device, mode] = logprobs(server, vocabulary)
                server.stop()

        def apart(a, b):
            return sum(abs(x - y) for x, y in zip(found[a], found[b])) / len(found[a])

        quantised = apart(("cpu", "off"), ("cpu", "on"))
        for mode, least in (("off", 0.5), ("on", 0.75)):
            from_cpu = apart((arguments.device, mode), ("cpu", mode))
            check(f"{model} with FP8 activations {mode}", from_cpu < least * quantised,
                  f"log-probabilities are {from_cpu:.1e} from the CPU's in the mean, where quantising moves them by {quantised:.1e}")
        check(f"{model}: on and off differ", found[arguments.device, "on"] != found[arguments.device, "off"])


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
    command = [arguments.binary, "serve", os.path.join(arguments.root, "tests/data/minimax-m2/full-size/bf16"),
               "--load-format=dummy", "--skip-tokenizer-init", "--port=0", "--grpc-port=0", "--workers=1",
               f"--device={arguments.device}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    told = [line for line in run.stderr.splitlines() if "out of memory" in line]
    good = run.returncode != 0 and any("what would fit" in line and "--workers" in line for line in told)
    check("a model that does not fit is refused with what would", good, (told or [run.stderr[-500:]])[0])


def verify():
    data = os.path.join(arguments.root, "tests/data")
    pairs = [(os.path.join(arguments.root, "models/demo"), os.path.join(data, "demo/reference.safetensors"))]
    for folder, _, files in sorted(os.walk(data)):
        if "reference.safetensors" in files and "config.json" in files:
            pairs.append((folder, os.path.join(folder, "reference.safetensors")))
    for folder, reference in pairs:
        ways = [[], ["--deterministic=true"], ["--workers=2"], ["--kv-cache-dtype=fp8_e4m3"], ["--kv-cache-dtype=fp8_e5m2"]]
        for flags in ways:
            run = subprocess.run(
                [arguments.binary, "verify", folder, f"--reference={reference}",
                 f"--device={arguments.device}", *flags], capture_output=True, text=True, timeout=120)
            lines = run.stdout.splitlines()
            wanted = ("logits, relative", "router logits of", "choices of", "greedy tokens that", "layer", "token")
            brief = [re.sub(r"\s+", " ", line).strip() for line in lines]
            brief = ["|" + line.rsplit(",", 1)[-1] if " on " in line and "workers" in line else line for line in brief]
            name = "verify " + " ".join([os.path.relpath(folder, data), *flags])
            kept = [line for line in brief if line.startswith(("|", *wanted))]
            check(name, run.returncode == 0, "; ".join(kept) + (run.stderr[-300:] if run.returncode else ""))


for part in (verify, serve_checks, sampling, fp8_activations, preemption, cluster, faults, out_of_memory):
    if part.__name__ not in arguments.only.split(","):
        continue
    began = time.time()
    try:
        part()
    except Exception as error:  # noqa: BLE001
        check(part.__name__, False, repr(error))
    print(f"      {part.__name__}: {time.time() - began:.1f} s", flush=True)
print("all good" if failures == 0 else f"{failures} checks failed")
sys.exit(failures > 0)
