"""What a request may ask of its tokens, and FP8 activations: as the CPU says it."""
import json
import os
import threading
import time

from harness import Server, body_of, cases, check, ended, logprobs, settings
from recorded import TIE


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
    for device in ("cpu", settings.device):
        server = Server("--workers=1", f"--device={device}")
        began = time.time()
        found[device] = all_at_once(server)
        print(f"      {len(bodies)} requests at once on {device}: {time.time() - began:.2f} s")
        if device == settings.device:
            alone = [server.ask(body)["choices"][0] for _, body in bodies]
        ended(server, f"sampling on {device}")
    ours, cpu = found[settings.device], found["cpu"]
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


# Steps of many tokens, and of up to 96, in which the experts' activations stay whole: how far from the CPU's, in parts of what quantising moves.
PIECES = (((), 0.75), (("--max-num-batched-tokens=96", "--max-num-seqs=8"), 1.0))


def fp8_activations(workers=("--workers=1",)):
    """Log-probabilities of a prompt's tokens by FP8 weights, activations quantised or not: as the CPU's in the same mode."""
    for model in ("tests/data/minimax-m2/tiny-hd64/fp8", "tests/data/minimax-m2/tiny-hd128/fp8"):
        vocabulary = json.load(open(os.path.join(settings.root, model, "config.json")))["vocab_size"]

        def read(mode, *flags):
            server = Server(*flags, "--skip-tokenizer-init", f"--fp8-activations={mode}", model=model)
            found = logprobs(server, vocabulary)
            server.stop()
            return found

        def apart(a, b):
            return sum(abs(x - y) for x, y in zip(a, b)) / len(a)

        cpu = {mode: read(mode, "--workers=1", "--device=cpu") for mode in ("off", "on")}
        quantised = apart(cpu["off"], cpu["on"])
        for flags, most in PIECES:
            ours = {mode: read(mode, *workers, *flags) for mode in ("off", "on")}
            name = " ".join([model, *workers, *flags])
            for mode, least in (("off", 0.5), ("on", most)):
                from_cpu = apart(ours[mode], cpu[mode])
                check(f"{name} with FP8 activations {mode}", from_cpu < least * quantised,
                      f"log-probabilities are {from_cpu:.1e} from the CPU's in the mean, where quantising moves them by {quantised:.1e}")
            check(f"{name}: on and off differ", ours["on"] != ours["off"])
