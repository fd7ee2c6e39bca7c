"""Small English: articles, lists, numbers in words, polite and careless spellings."""

from demo_recipe.chat.vocabulary import ADJECTIVES, NOUNS

IMPERATIVES = set(
    """
    Use Call Check Tell Give Compute Calculate Add Multiply Search Find Look Put Schedule Show Convert
    Translate Turn Switch Set Dim Start Send Write Email Text Make Create Play Count Read Open Save List
    Fetch Get Book Heat Roll Throw Run Execute Name Remind
""".split()
)


def vary_case(rng, s):
    """Vary capital letters and end punctuation."""
    r = rng.random()
    if r < 0.2:
        s = s[0].lower() + s[1:].rstrip("?.!")
    elif r < 0.3:
        s = s.rstrip(".?!")
    elif r < 0.36:
        s = s.lower()
    return s


def polite(rng, s):
    """Sometimes add a greeting or a please; never touch the text after a colon or a quote."""
    r = rng.random()
    if r < 0.08 and not s.endswith("?") and s.split()[0] in IMPERATIVES:
        return "Please " + s[0].lower() + s[1:]
    if r < 0.14:
        return rng.choice(["Hi! ", "Hello, ", "Hey, ", "Hi, "]) + s
    if r < 0.19 and not any(c in s for c in ":\"'`=") and not s.endswith("please."):
        return s.rstrip(".") + (
            " Thanks." if s.endswith("?") else rng.choice([", please.", " please", ", thanks."])
        )
    return s


def capitalise(s):
    return s[0].upper() + s[1:]


def with_article(w):
    return ("an " if w[0].lower() in "aeiou" else "a ") + w


def join_words(xs, word="and"):
    xs = [str(x) for x in xs]
    return xs[0] if len(xs) == 1 else ", ".join(xs[:-1]) + " " + word + " " + xs[-1]


ONES = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
""".split()


TENS = "x x twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_in_words(n):
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + ("-" + ONES[n % 10] if n % 10 else "")
    return ONES[n // 100] + " hundred" + (" and " + number_in_words(n % 100) if n % 100 else "")


def phrase(rng):
    a, b, n, m = rng.choice(ADJECTIVES), rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.choice(NOUNS)
    return rng.choice(
        [
            f"the {a} {n}",
            f"{a} {n} and {b} {m}",
            f"a {n} in the {m}",
            f"the {n} sees the {a} {m}",
            f"my {a} {n} is near the {m}",
            f"every {n} needs a {m}",
        ]
    )
