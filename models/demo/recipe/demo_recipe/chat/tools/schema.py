"""Function schemas in the OpenAI form, and the values that arguments are drawn from."""

from demo_recipe.chat.vocabulary import CITIES, NAMES, NOUNS, listed


def typed(kind, description="", **more):
    """A JSON schema of one type; the description only if there is one."""
    return {"type": kind} | ({"description": description} if description else {}) | more


def string(description="", **more):
    return typed("string", description, **more)


def integer(description=""):
    return typed("integer", description)


def number(description=""):
    return typed("number", description)


def boolean(description=""):
    return typed("boolean", description)


def array(items, description=""):
    return {"type": "array", "items": items} | ({"description": description} if description else {})


def object_of(properties, required=None):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
    }


def schema(name, desc, props, req=None):
    return {
        "type": "function",
        "function": {"name": name, "description": desc, "parameters": object_of(props, req)},
    }


def city(rng):
    return rng.choice(CITIES)


def name(rng):
    return rng.choice(NAMES)


def noun(rng):
    return rng.choice(NOUNS)


def path(rng):
    return f"{rng.choice(FOLDERS)}/{noun(rng)}.{rng.choice(EXTENSIONS)}"


LANGUAGES = "French German Spanish Italian Dutch Polish Greek Japanese Korean Swedish Finnish Turkish".split()


FOREIGN_WORDS = "lano mira toku belo sanda riva pelo noki duma fenri kala vesto".split()


CURRENCIES = "EUR USD GBP JPY CHF SEK NOK PLN CAD AUD".split()


ROOMS = "kitchen|bedroom|living room|bathroom|office|hall|garage|garden".split("|")


SKY = "sunny|cloudy|rainy|windy|foggy|snowy|clear".split("|")


EXTENSIONS = "txt md json csv py rs toml yaml log".split()


FOLDERS = "src docs tests data logs config home/demo tmp/build notes models".split()


CHORES = listed(
    """
    buy milk | call the bank | water the plants | send the report | fix the door | clean the kitchen |
    book a table | pay the rent | read the paper | feed the cat | run the tests | write the summary
    """
)


GENRES = "jazz rock pop folk blues soul classical techno".split()
