"""The training corpus: shards of tokens and loss weights, made in parallel.

    python -m demo_recipe.corpus OUTDIR SHARDS TOKENS_PER_SHARD [--seed N]

Writes `tNNN.npy` (uint16 tokens) and `wNNN.npy` (uint8: hundred times the loss weight, 0 for what must
not be learnt), and the held-out shard 999. The standard library's share is for training only.
"""

import argparse
import multiprocessing
import os
import random
import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from demo_recipe import render
from demo_recipe.chat import conversation
from demo_recipe.chat.paragraphs import paragraphs
from demo_recipe.coding import answers, dialogue

END = "[e~[\n"
#: Loss weight of the standard library's text.
LIBRARY_WEIGHT = 0.5
#: Even text that is context only is learnt a little.
LEAST_WEIGHT = 6
HELD_OUT_SHARD, HELD_OUT_SEED, HELD_OUT_TOKENS = 999, 777, 2_000_000
#: A shard is filled beyond its size by at most so many tokens, then cut.
SLACK = 8192


def standard_library():
    """The texts of Python's own modules, without tests and giants."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(str(path) for path in root.rglob("*.py"))
    wanted = [
        path
        for path in paths
        if "site-packages" not in path
        and "/test" not in path
        and "idle_test" not in path
        and os.path.getsize(path) < 60_000
    ]
    return [Path(path).read_text(encoding="utf-8", errors="ignore") for path in wanted]


def draw(rng, library):
    """One drawing: a list of documents, each a list of (text, weight)."""
    x = rng.random()
    if x < 0.24:
        return list(render.documents(dialogue.agent(rng)))
    if x < 0.36:
        return list(render.documents(answers.code(rng)))
    if x < 0.37:
        return list(render.documents(answers.linked_list(rng)))
    if x < 0.42:
        return [[(answers.plain_code(rng) + END, render.LEARN)]]
    if x < 0.93:
        return list(render.documents(conversation.sample(rng)))
    if x < 0.965:
        return [[(paragraphs(rng) + END, render.LEARN)]]
    text = rng.choice(library)
    start = rng.randrange(max(1, len(text) - 4000))
    return [[(text[start : start + 6000], LIBRARY_WEIGHT)]]


def write_shard(job):
    """Fills one shard; gives the number of tokens made."""
    out, number, size, seed, held_out, tokenizer_path = job
    rng = random.Random(seed * 1000003 + number)
    tokenizer = Tokenizer.from_file(tokenizer_path)
    library = [text for i, text in enumerate(standard_library()) if (i % 40 == 0) == held_out]
    tokens = np.zeros(size + SLACK, np.uint16)
    weights = np.zeros(size + SLACK, np.uint8)
    made = 0
    while made < size:
        for document in draw(rng, library):
            encoded = tokenizer.encode_batch([text for text, _ in document], add_special_tokens=False)
            for (_, weight), encoding in zip(document, encoded, strict=True):
                end = made + len(encoding.ids)
                if end > size + SLACK:
                    break
                tokens[made:end] = encoding.ids
                weights[made:end] = 0 if weight < 0 else max(LEAST_WEIGHT, int(weight * 100))
                made = end
    np.save(f"{out}/t{number:03d}.npy", tokens[:size])
    np.save(f"{out}/w{number:03d}.npy", weights[:size])
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("shards", type=int)
    parser.add_argument("tokens", type=int, help="per shard")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokenizer", default="tokenizer.json")
    given = parser.parse_args()
    os.makedirs(given.out, exist_ok=True)
    jobs = [(given.out, n, given.tokens, given.seed, False, given.tokenizer) for n in range(given.shards)]
    with multiprocessing.Pool(os.cpu_count()) as pool:
        print("tokens", sum(pool.map(write_shard, jobs, chunksize=1)))
    held_out = HELD_OUT_TOKENS if given.shards > 4 else given.tokens
    write_shard((given.out, HELD_OUT_SHARD, held_out, HELD_OUT_SEED, True, given.tokenizer))


if __name__ == "__main__":
    main()
