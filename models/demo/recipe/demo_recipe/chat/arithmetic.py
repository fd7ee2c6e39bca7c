"""Sums, products, comparisons and word problems: (question, thought, answer)."""

from demo_recipe.chat.vocabulary import NAMES, NOUNS


def sum_or_difference(rng, k):
    hi = rng.choice([20, 100, 100, 999])
    a, b = rng.randint(1, hi), rng.randint(1, hi)
    if k == "sub" and a < b and rng.random() < 0.9:
        a, b = b, a
    s = "+" if k == "add" else "-"
    r = a + b if k == "add" else a - b
    w = {"+": "plus", "-": "minus"}[s]
    qq = rng.choice(
        [
            "What is {a} {s} {b}?",
            "{a} {s} {b}",
            "{a}{s}{b}=?",
            "Calculate {a} {s} {b}.",
            "How much is {a} {w} {b}?",
            "what is {a} {w} {b}",
            "Compute {a} {s} {b}.",
            "{a} {w} {b}?",
            "Can you work out {a} {s} {b}?",
            "I need {a} {s} {b}.",
        ]
    ).format(a=a, b=b, s=s, w=w)
    tens, ones = b - b % 10, b % 10
    if tens and ones:
        m = a + tens if k == "add" else a - tens
        th = f"{a} {s} {tens} = {m}, then {m} {s} {ones} = {r}."
    else:
        th = f"{a} {s} {b} = {r}."
    return (
        qq,
        th,
        rng.choice([f"{a} {s} {b} = {r}.", f"{a} {s} {b} = {r}.", f"The answer is {r}.", f"{r}"]),
    )


def product(rng):
    a, b = rng.randint(2, 12), rng.randint(2, rng.choice([12, 99]))
    if rng.random() < 0.3:
        a, b = b, a
    r = a * b
    x, y = (a, b) if b > a else (b, a)
    t, o = y - y % 10, y % 10
    th = (
        f"{x} * {t} = {x * t}, {x} * {o} = {x * o}, and {x * t} + {x * o} = {r}."
        if t and o
        else f"{a} * {b} = {r}."
    )
    s = rng.choice(["*", "x", "times"])
    qq = rng.choice(
        [
            "What is {a} {s} {b}?",
            "{a} {s} {b}",
            "Calculate {a} {s} {b}.",
            "How much is {a} {s} {b}?",
            "Multiply {a} by {b}.",
            "Compute {a} {s} {b}",
            "what does {a} {s} {b} make",
        ]
    ).format(a=a, b=b, s=s)
    return qq, th, rng.choice([f"{a} * {b} = {r}.", f"{a} * {b} = {r}.", f"The answer is {r}.", f"{r}"])


def comparison(rng):
    a, b = rng.randint(1, 999), rng.randint(1, 999)
    while a == b:
        b = rng.randint(1, 999)
    big = rng.random() < 0.6
    qq = rng.choice(
        [
            "Which is {w}, {a} or {b}?",
            "which number is {w}: {a} or {b}",
            "Is {a} or {b} {w}?",
            "Tell me the {w} of {a} and {b}.",
        ]
    ).format(w="larger" if big else "smaller", a=a, b=b)
    r = max(a, b) if big else min(a, b)
    return qq, f"{max(a, b)} is more than {min(a, b)}.", f"{r} is {'larger' if big else 'smaller'}."


def word_problem(rng):
    n, m = rng.choice(NAMES), rng.choice(NAMES)
    obj = rng.choice("apples books coins pencils cards eggs stones cookies tickets stamps".split())
    a, b = rng.randint(2, 60), rng.randint(2, 30)
    v = rng.randint(0, 4)
    if v == 0:
        return (
            rng.choice(
                [
                    f"{n} has {a} {obj} and buys {b} more. How many {obj} does {n} have?",
                    f"{n} had {a} {obj}. {m} gave {n} {b} more. How many {obj} are there now?",
                ]
            ),
            f"Start with {a}, add {b}: {a} + {b} = {a + b}.",
            f"{n} has {a + b} {obj}.",
        )
    if v == 1:
        a += b
        return (
            rng.choice(
                [
                    f"{n} has {a} {obj} and gives {b} to {m}. How many are left?",
                    f"There were {a} {obj} and {n} lost {b}. How many {obj} does {n} have left?",
                ]
            ),
            f"Take {b} from {a}: {a} - {b} = {a - b}.",
            f"{n} has {a - b} {obj} left.",
        )
    if v == 2:
        a = rng.randint(2, 12)
        return (
            f"There are {a} boxes with {b} {obj} each. How many {obj} are there?",
            f"{a} boxes of {b}: {a} * {b} = {a * b}.",
            f"There are {a * b} {obj}.",
        )
    if v == 3:
        a = rng.randint(2, 10)
        return (
            f"{n} shares {a * b} {obj} equally among {a} friends. How many does each get?",
            f"{a * b} / {a} = {b}.",
            f"Each friend gets {b} {obj}.",
        )
    c = rng.randint(2, 12)
    return (
        f"One ticket costs {c} euros. How much do {b} tickets cost?",
        f"{b} tickets at {c} each: {b} * {c} = {b * c}.",
        f"They cost {b * c} euros.",
    )


def letters(rng):
    w = rng.choice(NOUNS)
    if rng.random() < 0.5:
        return (
            rng.choice(
                [
                    f"How many letters are in the word {w}?",
                    f"how many letters does {w} have",
                    f'Count the letters in "{w}".',
                ]
            ),
            ", ".join(f"{c} {i + 1}" for i, c in enumerate(w)) + ".",
            f"The word {w} has {len(w)} letters.",
        )
    c = rng.choice(w)
    n = w.count(c)
    return (
        rng.choice(
            [
                f"How many times does the letter {c} appear in {w}?",
                f"how many {c}'s are in {w}",
                f'Count the letter {c} in "{w}".',
            ]
        ),
        f"Spelled out: {'-'.join(w)}. The letter {c} is there {n} time{'s' * (n != 1)}.",
        f"The letter {c} appears {n} time{'s' * (n != 1)} in {w}.",
    )


def several_numbers(rng):
    xs = [rng.randint(1, 30) for _ in range(rng.randint(3, 5))]
    t, steps = xs[0], []
    for x in xs[1:]:
        steps.append(f"{t} + {x} = {t + x}")
        t += x
    v = rng.random()
    if v < 0.7:
        return (
            rng.choice(["Add up {}.", "What is the sum of {}?", "Sum these numbers: {}", "sum of {}"]).format(
                ", ".join(map(str, xs))
            ),
            ", ".join(steps) + ".",
            f"The sum is {t}.",
        )
    big = rng.random() < 0.5
    return (
        f"What is the {'largest' if big else 'smallest'} of {', '.join(map(str, xs))}?",
        "I compare the numbers one by one.",
        f"The {'largest' if big else 'smallest'} is {max(xs) if big else min(xs)}.",
    )


TASKS = {
    "add": sum_or_difference,
    "sub": sum_or_difference,
    "mul": product,
    "cmp": comparison,
    "word": word_problem,
    "letters": letters,
    "sum": several_numbers,
}


KINDS = "add add sub sub mul mul cmp word word letters sum".split()


def arithmetic(rng):
    kind = rng.choice(KINDS)
    task = TASKS[kind]
    return task(rng, kind) if task is sum_or_difference else task(rng)
