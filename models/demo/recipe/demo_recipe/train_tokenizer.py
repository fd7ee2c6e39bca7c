"""Trains the byte-level BPE tokenizer; digits stand one by one.

    python -m demo_recipe.train_tokenizer VOCABULARY [--out DIR]

Writes tokenizer.json and tokenizer_config.json.
"""

import argparse
import json
import random
import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo_recipe import corpus

#: Not shown in decoded text, and shown.
SPECIAL = ["]!p~[", "]!d~[", "]~!b[", "]~b]", "[e~["]
SHOWN = ["<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"]
DRAWS = 14_000
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "]~!b[",
    "eos_token": "[e~[",
    "unk_token": "]!d~[",
    "pad_token": "]!p~[",
    "model_max_length": 32768,
    "clean_up_tokenization_spaces": False,
    "add_bos_token": False,
    "add_prefix_space": False,
}


def texts(rng, draws):
    """All that is learnt, and a quarter of the context, cut at the added tokens."""
    library = corpus.standard_library()
    added = re.compile("|".join(map(re.escape, SPECIAL + SHOWN)))
    for _ in range(draws):
        for document in corpus.draw(rng, library):
            for text, weight in document:
                if weight > 0 or rng.random() < 0.25:
                    yield from filter(None, added.split(text))


def train(vocabulary, draws=DRAWS):
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL + SHOWN),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(random.Random(11), draws), trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in SHOWN])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vocabulary", type=int)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--draws", type=int, default=DRAWS, help="fewer for a quick try")
    given = parser.parse_args()
    tokenizer = train(given.vocabulary, given.draws)
    given.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(given.out / "tokenizer.json"))
    (given.out / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=1))
    print(tokenizer.get_vocab_size(), {token: tokenizer.token_to_id(token) for token in SPECIAL + SHOWN})


if __name__ == "__main__":
    main()
