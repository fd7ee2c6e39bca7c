"""How long the clients wait when a rank is killed in mid-decode: kill_a_rank.py BINARY MODEL --workers N [--transport nccl] [--layers 4]

Serves random weights, streams eight answers, kills one worker with SIGKILL while they run, and prints the longest gap between
two tokens that any client saw. Every answer must come to its end with all of its tokens.
"""
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request

CLIENTS = 8

parser = argparse.ArgumentParser()
parser.add_argument("binary")
parser.add_argument("model")
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--transport", default="auto")
parser.add_argument("--tokens", type=int, default=400)
parser.add_argument("--layers", type=int, help="of the model: with few, the survivors hold all experts and go on alone")
arguments = parser.parse_args()


def children(parent):
    """Process ids of the worker processes."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            above = re.search(r"PPid:\s+(\d+)", open(f"/proc/{entry}/status").read())
            words = open(f"/proc/{entry}/cmdline").read().split("\0")
        except OSError:
            continue
        if above and int(above.group(1)) == parent and "worker" in words[1:2]:
            found.append(int(entry))
    return sorted(found)


class Client(threading.Thread):
    def __init__(self, http, number):
        super().__init__()
        self.body = {"model": "m", "prompt": [1000 + number] * 64, "max_tokens": arguments.tokens, "stream": True, "ignore_eos": True,
                     "return_token_ids": True, "temperature": 0}
        self.http, self.times, self.tokens, self.problem = http, [], 0, None

    def run(self):
        request = urllib.request.Request(
            self.http + "/v1/completions", json.dumps(self.body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=80) as answer:
                for line in answer:
                    if line.startswith(b"data: {"):
                        for choice in json.loads(line[6:]).get("choices", []):
                            self.tokens += len(choice.get("token_ids") or [])
                            self.times.append(time.time())
        except OSError as problem:
            self.problem = problem


server = subprocess.Popen(
    [arguments.binary, "serve", arguments.model, "--load-format=dummy", "--skip-tokenizer-init", "--port=0", "--grpc-port=0",
     "--device=cuda", f"--workers={arguments.workers}", "--served-model-name=m", "--max-model-len=4096",
     f"--transport={arguments.transport}"]
    + ([f'--hf-overrides={{"num_hidden_layers":{arguments.layers}}}'] if arguments.layers else []),
    stdout=subprocess.PIPE, stderr=open("survival.log", "w"), text=True)
http = None
for line in server.stdout:
    if line.startswith("  HTTP  "):
        http = line.split()[1]
    if line.startswith("  try "):
        break
if http is None:
    sys.exit("the server did not come up: " + open("survival.log").read()[-2000:])
clients = [Client(http, number) for number in range(CLIENTS)]
for client in clients:
    client.start()
while not all(len(client.times) > 20 or client.problem for client in clients):
    time.sleep(0.05)
killed = time.time()
os.kill(children(server.pid)[-1], signal.SIGKILL)
for client in clients:
    client.join()
server.send_signal(signal.SIGINT)
server.wait(timeout=20)
gaps = [max((b - a, a) for a, b in zip(client.times, client.times[1:])) for client in clients if len(client.times) > 1]
short = [client for client in clients if client.tokens != arguments.tokens or client.problem]
print(f"{arguments.workers} workers over {arguments.transport}, one killed: longest gap between tokens {max(gap for gap, _ in gaps):.2f} s, "
      f"{len(clients) - len(short)} of {len(clients)} answers whole")
for client in short:
    print(f"{client.tokens} of {arguments.tokens} tokens, {client.problem}")
sys.exit(bool(short))
