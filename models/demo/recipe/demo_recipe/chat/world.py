"""Questions about the world: (question, thought, answer)."""

from demo_recipe.chat.vocabulary import DAYS
from demo_recipe.chat.wording import capitalise, join_words, with_article
from demo_recipe.chat.world_facts import (
    CAPITALS,
    COLOURS_OF,
    GENERAL,
    MONTH_DAYS,
    MONTHS,
    OPPOSITES,
    ORDINALS,
    PLANETS,
    PLURALS,
    SOUNDS,
    YOUNG,
)


def capital(rng):
    c, t = rng.choice(CAPITALS)
    return (
        rng.choice(
            [
                "What is the capital of {}?",
                "capital of {}",
                "Which city is the capital of {}?",
                "what's the capital of {}",
                "Name the capital of {}.",
                "Tell me the capital city of {}.",
                "Do you know the capital of {}?",
            ]
        ).format(c),
        rng.choice([f"The capital of {c} is {t}.", f"The user asks for the capital of {c}. That is {t}."]),
        rng.choice([f"The capital of {c} is {t}.", f"The capital of {c} is {t}.", f"It is {t}.", f"{t}."]),
    )


def country_of_capital(rng):
    c, t = rng.choice(CAPITALS)
    return (
        rng.choice(
            [
                "{} is the capital of which country?",
                "Which country has {} as its capital?",
                "which country's capital is {}",
            ]
        ).format(t),
        f"{t} belongs to {c}.",
        f"{t} is the capital of {c}.",
    )


def day(rng):
    i, v = rng.randrange(7), rng.randint(0, 2)
    if v == 0:
        return (
            rng.choice(
                [
                    f"Which day comes after {DAYS[i]}?",
                    f"what day follows {DAYS[i]}",
                    f"What is the day after {DAYS[i]}?",
                ]
            ),
            f"After {DAYS[i]} comes {DAYS[(i + 1) % 7]}.",
            f"{DAYS[(i + 1) % 7]} comes after {DAYS[i]}.",
        )
    if v == 1:
        return (
            rng.choice([f"Which day comes before {DAYS[i]}?", f"What is the day before {DAYS[i]}?"]),
            f"Before {DAYS[i]} comes {DAYS[(i - 1) % 7]}.",
            f"{DAYS[(i - 1) % 7]} comes before {DAYS[i]}.",
        )
    n = rng.randint(2, 6)
    return (
        rng.choice(
            [
                f"Today is {DAYS[i]}. What day is it in {n} days?",
                f"What day is {n} days after {DAYS[i]}?",
                f"if today is {DAYS[i]}, which day is it in {n} days",
            ]
        ),
        "Count on: " + ", ".join(DAYS[(i + j) % 7] for j in range(1, n + 1)) + ".",
        f"It is {DAYS[(i + n) % 7]}.",
    )


def month(rng):
    i, v = rng.randrange(12), rng.randint(0, 3)
    m = MONTHS[i]
    if v == 0:
        return (
            f"Which month comes after {m}?",
            f"After {m} comes {MONTHS[(i + 1) % 12]}.",
            f"{MONTHS[(i + 1) % 12]} comes after {m}.",
        )
    if v == 1:
        return (
            f"Which month comes before {m}?",
            f"Before {m} comes {MONTHS[i - 1]}.",
            f"{MONTHS[i - 1]} comes before {m}.",
        )
    if v == 2:
        return (
            rng.choice([f"How many days does {m} have?", f"how many days are in {m}"]),
            f"{m} has {MONTH_DAYS[i]} days.",
            f"{m} has {MONTH_DAYS[i]} days." if i != 1 else "February has 28 days, or 29 in a leap year.",
        )
    return (
        f"What is the {ORDINALS[i]} month of the year?",
        f"Month number {i + 1} is {m}.",
        f"The {ORDINALS[i]} month is {m}.",
    )


def opposite(rng):
    a, b = rng.choice(OPPOSITES).split()
    if rng.random() < 0.4 and a not in ("old", "light") and b not in ("old", "light"):
        a, b = b, a
    return (
        rng.choice(
            [
                "What is the opposite of {}?",
                "opposite of {}",
                "Give me the opposite of {}.",
                "Which word is the opposite of {}?",
            ]
        ).format(a),
        f"The opposite of {a} is {b}.",
        f"The opposite of {a} is {b}.",
    )


def plural(rng):
    a, b = rng.choice(PLURALS).split()
    return (
        rng.choice(
            [
                "What is the plural of {}?",
                "plural of {}",
                "Give the plural form of {}.",
                "How do I write {} in the plural?",
            ]
        ).format(a),
        f"One {a}, two {b}.",
        f"The plural of {a} is {b}.",
    )


def colour(rng):
    a, b = rng.choice(COLOURS_OF).split("|")
    return (
        rng.choice(["What colour is {}?", "what color is {}", "Which colour does {} have?"]).format(a),
        f"{capitalise(a)} is {b}.",
        f"{capitalise(a)} is {b}.",
    )


def young_animal(rng):
    a, b = rng.choice(YOUNG).split()
    return (
        rng.choice([f"What is a baby {a} called?", f"What do you call a young {a}?", f"name of a young {a}"]),
        f"A young {a} is a {b}.",
        f"A young {a} is called {with_article(b)}.",
    )


def animal_sound(rng):
    a, b = rng.choice(SOUNDS).split()
    return (
        rng.choice([f"What sound does {with_article(a)} make?", f"which sound does {with_article(a)} make"]),
        f"{capitalise(with_article(a))} {b}.",
        f"{capitalise(with_article(a))} {b}.",
    )


def planet(rng):
    i, v = rng.randrange(8), rng.randint(0, 2)
    if v == 0:
        return (
            rng.choice(
                [
                    f"What is the {ORDINALS[i]} planet from the Sun?",
                    f"which planet is {ORDINALS[i]} from the sun",
                ]
            ),
            "In order: " + ", ".join(PLANETS[: i + 1]) + ".",
            f"The {ORDINALS[i]} planet from the Sun is {PLANETS[i]}.",
        )
    if v == 1:
        return rng.choice(
            [
                (
                    "What is the largest planet?",
                    "Jupiter is the largest.",
                    "The largest planet is Jupiter.",
                ),
                (
                    "What is the smallest planet?",
                    "Mercury is the smallest.",
                    "The smallest planet is Mercury.",
                ),
                ("Which planet has large rings?", "Saturn has bright rings.", "Saturn has large rings."),
                (
                    "Which planet is called the red planet?",
                    "Mars looks red.",
                    "Mars is called the red planet.",
                ),
                (
                    "How many planets are there?",
                    "Count: eight planets.",
                    "There are 8 planets in our solar system.",
                ),
            ]
        )
    return "List the planets in order.", "Start near the Sun and go outward.", join_words(PLANETS) + "."


def unit(rng):
    n = rng.randint(2, 20)
    v = rng.randint(0, 8)
    if v == 8:
        c = rng.randrange(-20, 105, 5)
        ff = c * 9 // 5 + 32
        return (
            rng.choice(
                [
                    f"What is {c} degrees Celsius in Fahrenheit?",
                    f"Convert {c} C to F.",
                    f"{c} celsius in fahrenheit",
                ]
            ),
            f"{c} * 9 / 5 = {c * 9 // 5}, plus 32 is {ff}.",
            f"{c} degrees Celsius is {ff} degrees Fahrenheit.",
        )
    u, t, m = [
        ("kilometres", "metres", 1000),
        ("hours", "minutes", 60),
        ("kilograms", "grams", 1000),
        ("minutes", "seconds", 60),
        ("days", "hours", 24),
        ("weeks", "days", 7),
        ("metres", "centimetres", 100),
        ("centimetres", "millimetres", 10),
    ][v]
    if rng.random() < 0.3:
        return f"How many {u} are {n * m} {t}?", f"{n * m} / {m} = {n}.", f"{n * m} {t} are {n} {u}."
    return (
        rng.choice([f"How many {t} are in {n} {u}?", f"Convert {n} {u} to {t}.", f"{n} {u} in {t}"]),
        f"{n} * {m} = {n * m}.",
        f"{n} {u} are {n * m} {t}.",
    )


def general(rng):
    a, b = rng.choice(GENERAL)
    return a, rng.choice(["I know this fact.", "A simple question on the world. I answer directly.", b]), b


TASKS = {
    "cap": capital,
    "capr": country_of_capital,
    "day": day,
    "month": month,
    "opp": opposite,
    "plu": plural,
    "col": colour,
    "young": young_animal,
    "sound": animal_sound,
    "planet": planet,
    "unit": unit,
    "misc": general,
}


KINDS = "cap cap cap cap capr day day month opp plu col young unit unit planet misc misc sound".split()


def world_question(rng):
    return TASKS[rng.choice(KINDS)](rng)
