"""Greetings, thanks and questions about the model itself; the texts are in small_talk.jsonl."""

from demo_recipe.chat.data import read_lines
from demo_recipe.chat.wording import capitalise, vary_case

ENTRIES = read_lines("small_talk.jsonl")


def small_talk(rng):
    """(question, thought, answer)"""
    entry = rng.choice(ENTRIES)
    question = rng.choice(entry["questions"])
    if rng.random() < 0.3:
        question = vary_case(rng, capitalise(question))
    return question, rng.choice(entry["thoughts"]), rng.choice(entry["answers"])
