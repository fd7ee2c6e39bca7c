"""What comes out: every reference checkpoint through `verify`, and the bundled model's recorded answers, alone and at once."""
import os
import re
import subprocess
import threading

from harness import Server, body_of, cases, check, ended, settings


def verify():
    data = os.path.join(settings.root, "tests/data")
    pairs = [(os.path.join(settings.root, "models/demo"), os.path.join(data, "demo/reference.safetensors"))]
    for folder, _, files in sorted(os.walk(data)):
        if "reference.safetensors" in files and "config.json" in files:
            pairs.append((folder, os.path.join(folder, "reference.safetensors")))
    for folder, reference in pairs:
        ways = [[], ["--deterministic=true"], ["--workers=2"], ["--kv-cache-dtype=fp8_e4m3"], ["--kv-cache-dtype=fp8_e5m2"]]
        for flags in ways:
            run = subprocess.run(
                [settings.binary, "verify", folder, f"--reference={reference}",
                 f"--device={settings.device}", *flags], capture_output=True, text=True, timeout=120)
            lines = run.stdout.splitlines()
            wanted = ("logits, relative", "router logits of", "choices of", "greedy tokens that", "layer", "token")
            brief = [re.sub(r"\s+", " ", line).strip() for line in lines]
            brief = ["|" + line.rsplit(",", 1)[-1] if " on " in line and "workers" in line else line for line in brief]
            name = "verify " + " ".join([os.path.relpath(folder, data), *flags])
            kept = [line for line in brief if line.startswith(("|", *wanted))]
            check(name, run.returncode == 0, "; ".join(kept) + (run.stderr[-300:] if run.returncode else ""))


def serve_checks():
    for flags in ([], ["--deterministic=true"]):
        server = Server("--workers=1", *flags)
        name = " ".join(["serve", *flags])
        print(f"      {name}: ready after {server.seconds:.2f} s")
        answers(server, name)
        together(server, name)
        ended(server, name)


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
