"""A tool with a random name and random parameters, so that names are read and not remembered."""

from demo_recipe.chat.tools.schema import array, boolean, city, integer, name, noun, number, schema, string
from demo_recipe.chat.vocabulary import ADJECTIVES, NOUNS
from demo_recipe.chat.wording import capitalise, join_words, with_article

VERBS = "get find check count start stop create delete update lock open reset list sync move".split()


PARAMETERS = "code label target owner zone level mode key group tag title source".split()


def invented(rng):
    """A tool with a random name and random parameters; the request spells every value."""
    v, n = rng.choice(VERBS), noun(rng)
    nm = rng.choice([f"{v}_{n}", f"{v}_{n}", f"{n}_{v}", f"{v}{capitalise(n)}", f"{n}.{v}"]).replace(".", "_")
    ks = rng.sample(PARAMETERS, rng.randint(1, 3))
    props, args, parts = {}, {}, []
    for k in ks:
        t = rng.choice(["s", "s", "i", "n", "b", "a"])
        if t == "s":
            x = rng.choice(
                [
                    noun(rng),
                    name(rng),
                    city(rng),
                    f"{rng.choice(ADJECTIVES)} {noun(rng)}",
                    f"{noun(rng)[:3]}-{rng.randint(1, 99)}",
                ]
            )
            props[k], txt = string(), x
        elif t == "i":
            x = rng.randint(0, 999)
            props[k], txt = integer(), str(x)
        elif t == "n":
            x = rng.randint(0, 99) + rng.choice([0.5, 0.25])
            props[k], txt = number(), str(x)
        elif t == "b":
            x = rng.random() < 0.5
            props[k], txt = boolean(), "true" if x else "false"
        else:
            x = rng.sample(NOUNS, rng.randint(1, 3))
            props[k], txt = array(string()), join_words(x)
        args[k] = x
        parts.append(rng.choice([f"{k} {txt}", f"{k} {txt}", f"{k} = {txt}", f"{k}: {txt}"]))
    how = rng.random()
    if how < 0.35:
        qq = f"Call {nm} with {join_words(parts)}."
    elif how < 0.75:
        qq = f"{capitalise(v)} the {n} with {join_words(parts)}."
    else:
        qq = rng.choice(
            [
                f"Use {nm}, {', '.join(parts)}.",
                f"I need you to {v} the {n}: {', '.join(parts)}",
                f"Can you {v} the {n} with {join_words(parts)}?",
            ]
        )
    res = rng.choice(
        [
            ("status", rng.choice(["ok", "done", "ready", "busy"])),
            ("count", rng.randint(0, 99)),
            ("id", rng.randint(100, 999)),
            ("value", rng.randint(1, 500)),
        ]
    )
    ans = {
        "status": f"The {n} reports the status {res[1]}.",
        "count": f"The count for the {n} is {res[1]}.",
        "id": f"Done. The {n} has the id {res[1]}.",
        "value": f"The {n} has the value {res[1]}.",
    }[res[0]]
    return (
        schema(
            nm,
            rng.choice([f"{capitalise(v)} the {n}.", f"{capitalise(v)} {with_article(n)}.", ""])
            or f"{capitalise(v)} a {n} in the system.",
            props,
        ),
        qq,
        args,
        {res[0]: res[1]},
        ans,
    )
