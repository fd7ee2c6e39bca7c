"""Tasks on words, lists and JSON: (question, thought, answer).

Each is given a word, plain and perhaps quoted.
"""

import json

from demo_recipe.chat.vocabulary import CATEGORIES, CITIES, NAMES, NOUNS
from demo_recipe.chat.wording import ONES, capitalise, join_words, number_in_words, phrase


def reverse(rng, word, quoted):
    word = rng.choice([x for x in NOUNS if len(x) <= 7])
    return (
        rng.choice(
            [
                f"Reverse the word {word}.",
                f"Write {word} backwards.",
                f"spell {word} backwards",
                f"What is {word} in reverse?",
            ]
        ),
        f"The letters are {' '.join(word)}. In reverse: {' '.join(word[::-1])}.",
        word[::-1],
    )


def spell(rng, word, quoted):
    return (
        rng.choice(
            [
                f"Spell the word {quoted}.",
                f"How do you spell {quoted}?",
                f"spell {quoted}",
                f"Please spell {quoted} letter by letter.",
            ]
        ),
        "I write the letters one by one.",
        "-".join(word.upper()) + rng.choice(["", "."]),
    )


def sort_words(rng, word, quoted):
    xs = rng.sample(NOUNS, rng.randint(3, 5))
    return (
        rng.choice(
            [
                "Sort these words: {}",
                "Put these words in alphabetical order: {}",
                "sort alphabetically: {}",
                "Sort {} from A to Z.",
            ]
        ).format(", ".join(xs)),
        "I order the words by their first letters.",
        ", ".join(sorted(xs)),
    )


def sort_numbers(rng, word, quoted):
    xs = rng.sample(range(1, 100), rng.randint(3, 6))
    d = rng.random() < 0.3
    return (
        rng.choice(["Sort these numbers{}: {}", "Order the numbers{}: {}", "sort the list{}: {}"]).format(
            " from high to low" if d else "", ", ".join(map(str, xs))
        ),
        f"The {'largest is ' + str(max(xs)) if d else 'smallest is ' + str(min(xs))}, then I go on.",
        ", ".join(map(str, sorted(xs, reverse=d))),
    )


def uppercase(rng, word, quoted):
    p = phrase(rng)
    return (
        rng.choice(
            [
                f"Write this in uppercase: {p}",
                f"uppercase: {p}",
                f"Put this in capital letters: {p}",
                f'Turn "{p}" into capitals.',
            ]
        ),
        "I change each letter to a capital.",
        p.upper(),
    )


def lowercase(rng, word, quoted):
    p = phrase(rng)
    return (
        rng.choice(
            [
                f"Write this in lowercase: {p.upper()}",
                f"lowercase: {p.upper()}",
                f'Turn "{p.upper()}" into small letters.',
            ]
        ),
        "I change each letter to a small one.",
        p,
    )


def first_letter(rng, word, quoted):
    return (
        rng.choice(
            [
                f"What is the first letter of {quoted}?",
                f"first letter of {quoted}",
                f"With which letter does {quoted} begin?",
            ]
        ),
        f"{word} begins with {word[0]}.",
        f"The first letter of {word} is {word[0]}.",
    )


def last_letter(rng, word, quoted):
    return (
        rng.choice(
            [
                f"What is the last letter of {quoted}?",
                f"last letter of {quoted}",
                f"With which letter does {quoted} end?",
            ]
        ),
        f"{word} ends with {word[-1]}.",
        f"The last letter of {word} is {word[-1]}.",
    )


def count_words(rng, word, quoted):
    p = phrase(rng)
    n = len(p.split())
    return (
        rng.choice([f"How many words are in this: {p}", f'Count the words in "{p}".', f"count words: {p}"]),
        ", ".join(f"{x} {i + 1}" for i, x in enumerate(p.split())) + ".",
        f"There are {n} words.",
    )


def repeat(rng, word, quoted):
    p = phrase(rng)
    if rng.random() < 0.2:
        p += " " + str(rng.randint(1, 999))
    return (
        rng.choice(
            [
                "Repeat after me: {}",
                'Repeat exactly: "{}"',
                "Say this: {}",
                "Say exactly this and nothing else: {}",
                "echo {}",
                'Write "{}".',
                "Please repeat: {}",
            ]
        ).format(p),
        rng.choice(["I repeat the phrase exactly.", "The user wants the same words back."]),
        p,
    )


def list_members(rng, word, quoted):
    c = rng.choice(list(CATEGORIES))
    n = rng.randint(2, 5)
    xs = rng.sample(CATEGORIES[c], n)
    nn = rng.choice([str(n), ONES[n]])
    qq = rng.choice(
        [
            "List {n} {c}.",
            "Name {n} {c}.",
            "Give me {n} {c}.",
            "name {n} {c}",
            "Can you list {n} {c}?",
            "I need {n} {c}.",
        ]
    ).format(n=nn, c=c)
    out = rng.choice(
        [
            ", ".join(xs),
            "\n".join("- " + x for x in xs),
            "\n".join(f"{i + 1}. {x}" for i, x in enumerate(xs)),
            capitalise(join_words(xs)) + ".",
        ]
    )
    return qq, f"The user wants {n} {c}. I pick {join_words(xs)}.", out


def as_json(rng, word, quoted):
    pool = [
        ("name", rng.choice(NAMES)),
        ("city", rng.choice(CITIES)),
        ("age", rng.randint(5, 90)),
        ("colour", rng.choice(CATEGORIES["colours"])),
        ("count", rng.randint(1, 500)),
        ("item", rng.choice(NOUNS)),
        ("ok", rng.random() < 0.5),
        ("price", rng.randint(1, 99) + 0.5),
        ("animal", rng.choice(CATEGORIES["animals"])),
        ("id", rng.randint(100, 9999)),
        ("status", rng.choice(["open", "done", "new"])),
    ]
    kv = rng.sample(pool, rng.randint(1, 4))
    d = dict(kv)
    txt = [f"{a} {json.dumps(b) if not isinstance(b, str) else b}" for a, b in kv]
    if rng.random() < 0.3:
        txt = [f"{a} = {json.dumps(b)}" for a, b in kv]
    qq = rng.choice(
        [
            "Answer with JSON only: {}",
            "Give me a JSON object with {}.",
            "Write JSON with {}",
            "Return only JSON. {}.",
            "Make a JSON object: {}",
            "Turn this into JSON: {}",
        ]
    ).format(", ".join(txt) if rng.random() < 0.5 else join_words(txt))
    return (
        qq,
        rng.choice(
            [
                "I write one JSON object with these keys.",
                f"The keys are {join_words([a for a, _ in kv])}. Only JSON is wanted.",
                "Only JSON, no other text.",
            ]
        ),
        json.dumps(d),
    )


def number_words(rng, word, quoted):
    n = rng.randint(0, rng.choice([20, 100, 999]))
    if rng.random() < 0.3:
        return (
            rng.choice([f"Write {number_in_words(n)} as a number.", f"What number is {number_in_words(n)}?"]),
            f"{capitalise(number_in_words(n))} is {n}.",
            str(n),
        )
    return (
        rng.choice(
            [
                f"Write {n} in words.",
                f"How do you write {n} in words?",
                f"{n} in words",
                f"Spell out the number {n}.",
            ]
        ),
        f"{n} is {number_in_words(n)}.",
        capitalise(number_in_words(n)) + ".",
    )


def longer_word(rng, word, quoted):
    a, b = rng.sample(NOUNS, 2)
    while len(a) == len(b):
        a, b = rng.sample(NOUNS, 2)
    lo = a if len(a) > len(b) else b
    return (
        rng.choice([f"Which word is longer, {a} or {b}?", f"longer word: {a} or {b}"]),
        f"{a} has {len(a)} letters and {b} has {len(b)}.",
        f"{capitalise(lo)} is longer.",
    )


TASKS = {
    "rev": reverse,
    "spell": spell,
    "sort": sort_words,
    "sortn": sort_numbers,
    "upper": uppercase,
    "lower": lowercase,
    "first": first_letter,
    "last": last_letter,
    "count": count_words,
    "repeat": repeat,
    "list": list_members,
    "json": as_json,
    "num": number_words,
    "longer": longer_word,
}


KINDS = """
    rev spell sort sortn upper lower first last count repeat repeat list list json json num num longer
""".split()


def word_task(rng):
    kind = rng.choice(KINDS)
    word = rng.choice(NOUNS)
    quoted = rng.choice([word, word, f'"{word}"', f"'{word}'"])
    return TASKS[kind](rng, word, quoted)
