"""Which tools there are, and which of them a conversation offers."""

from dataclasses import dataclass

from demo_recipe.chat.tools.everyday import (
    add_numbers,
    calculator,
    convert,
    currency,
    forecast,
    lights,
    timer,
    translate,
    weather,
    web_search,
)
from demo_recipe.chat.tools.invented import invented
from demo_recipe.chat.tools.machines import (
    clock,
    cluster,
    database,
    dice,
    fetch,
    list_dir,
    read_file,
    run_tests,
    shell,
    stats,
    stock,
    thermostat,
    write_file,
)
from demo_recipe.chat.tools.office import (
    calendar,
    create_user,
    email,
    list_events,
    message,
    play,
    playlist,
    table,
    todo,
    train,
)

TOOLS = [
    weather,
    forecast,
    calculator,
    add_numbers,
    web_search,
    calendar,
    list_events,
    convert,
    translate,
    currency,
    lights,
    timer,
    email,
    message,
    playlist,
    play,
    todo,
    database,
    read_file,
    write_file,
    list_dir,
    fetch,
    clock,
    stock,
    train,
    table,
    thermostat,
    stats,
    create_user,
    dice,
    cluster,
    run_tests,
    shell,
]


@dataclass(frozen=True)
class Use:
    """A tool, a request that needs it, the call, its result and the answer."""

    schema: dict
    request: str
    arguments: dict
    result: dict
    answer: str

    @property
    def name(self):
        return self.schema["function"]["name"]


def use_of(tool, rng):
    return Use(*tool(rng))


def draw_use(rng):
    return use_of(invented if rng.random() < 0.3 else rng.choice(TOOLS), rng)


#: Tools that could serve one request have a group in common, told by words of their descriptions.
GROUPS = [
    ("weather", "forecast"),
    ("arithmetic", "two numbers", "statistic", "Convert a value"),
    ("shell", "text file", "files in a folder", "tests", "Write text"),
    ("calendar", "events of a day"),
    ("email", "short message"),
    ("to-do", "shopping list"),
    ("Search the web", "Fetch a web"),
    ("SQL", "rows in a table"),
    ("light", "lamp"),
    ("playlist", "Play music"),
]


#: Positions in GROUPS.
ARITHMETIC, MACHINES, SEARCH = 1, 2, 6


def group_of(schema):
    """A position in GROUPS, or the description of a tool that stands alone."""
    description = schema["function"]["description"]
    for index, words in enumerate(GROUPS):
        if any(word in description for word in words):
            return index
    return description


def offer(rng, needed):
    """The needed schemas and some others, shuffled: no two of one name, no other of a group that is there."""
    tools, names = [], set()
    for schema in needed:
        if schema["function"]["name"] not in names:
            names.add(schema["function"]["name"])
            tools.append(schema)
    wanted = max(len(tools), rng.choice([1, 1, 2, 2, 3, 4]))
    while len(tools) < wanted:
        schema = draw_use(rng).schema
        name = schema["function"]["name"]
        if name not in names and group_of(schema) not in [group_of(tool) for tool in tools]:
            names.add(name)
            tools.append(schema)
    rng.shuffle(tools)
    return tools
