"""A served model under test: the process, the bundled model's recorded cases, and the lines that checks print."""
import argparse
import json
import os
import re
import signal
import subprocess
import time
import urllib.request

# What e2e.py was called with: binary, root, device.
settings = argparse.Namespace()
# Names of the checks that failed.
failed = []


def check(name, good, detail=""):
    if not good:
        failed.append(name)
    print(("ok    " if good else "FAIL  ") + name + (f": {detail}" if detail else ""), flush=True)


class Server:
    """`conclave serve`, ready. Its standard error goes to a file."""

    def __init__(self, *flags, model="models/demo", log="serve.log"):
        self.log = open(log, "w+")
        command = [settings.binary, "serve", os.path.join(settings.root, model), "--port=0", "--grpc-port=0"]
        # A later --device would be one too many.
        command += [*([] if any(flag.startswith("--device=") for flag in flags) else [f"--device={settings.device}"]), *flags]
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
    lines = open(os.path.join(settings.root, "tests/data/demo/prompts.jsonl"))
    return [case for case in map(json.loads, lines) if case["kind"] in kinds]


def body_of(case):
    body = {"messages": case["messages"], "temperature": 0, "max_tokens": 700, "return_token_ids": True}
    if case.get("tools"):
        body["tools"] = case["tools"]
    return body


def ended(server, name):
    status = server.stop()
    check(f"{name}: ends", status == 0, f"status {status}")
    lines = server.text().splitlines()
    print("\n".join(line[:400] for line in lines if "WARN" in line or "ERROR" in line)[:1500])


def logprobs(server, vocabulary=3000):
    """Of 700 prompt tokens: more than a pass of the head takes."""
    body = {"prompt": [(k * 31 + 5) % vocabulary for k in range(700)], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0,
            "ignore_eos": True}
    rows = server.ask(body, "/v1/completions")["choices"][0]["prompt_logprobs"]
    return [next(iter(row.values()))["logprob"] for row in rows[1:]]
