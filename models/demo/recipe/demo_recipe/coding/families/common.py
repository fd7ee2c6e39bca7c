"""What the families share: names of arguments, and random inputs for tests."""

from dataclasses import dataclass


def integers(rng, lo=2, hi=6, m=20):
    return [rng.randint(-5 if m < 50 else 0, m) for _ in range(rng.randint(lo, hi))]


def positive_integers(rng, lo=2, hi=6, m=20):
    return [rng.randint(1, m) for _ in range(rng.randint(lo, hi))]


WORDS = """
    apple stone river cloud tiger lemon piano window garden rocket silver basket monkey winter summer
    castle bridge candle pencil orange level noon radar civic kayak madam wow deed hello world green
    tree moon book letter paper
""".split()


def word(rng):
    return rng.choice(WORDS)


def words(rng, lo=2, hi=5):
    return [word(rng) for _ in range(rng.randint(lo, hi))]


LISTS, NUMBERS, TEXTS, FIRST, SECOND = (
    ["items", "values", "numbers", "data", "xs"],
    ["n", "number", "value", "x", "num"],
    ["text", "s", "word", "string", "phrase"],
    ["a", "x", "first", "left"],
    ["b", "y", "second", "right"],
)


@dataclass(frozen=True)
class Family:
    """A function to write or mend. `{a}`, `{b}`, `{c}` in bodies and bugs stand for the arguments' names."""

    name: str
    others: list
    #: For each argument, the names it may have.
    args: list
    body: str
    #: (right text, wrong text, what is wrong with it)
    bugs: list
    #: rng -> arguments of one test
    inputs: object
    #: "It should ..."
    what: str

    @property
    def names(self):
        return [self.name, *self.others]
