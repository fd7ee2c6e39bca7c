"""Tools of machines: files, databases, clusters, shells.

Each builder gives (schema, request, arguments, result, answer): see `offer.Use`.
"""

from demo_recipe.chat.tools.schema import (
    CHORES,
    EXTENSIONS,
    FOLDERS,
    ROOMS,
    array,
    boolean,
    city,
    integer,
    noun,
    number,
    path,
    schema,
    string,
)
from demo_recipe.chat.wording import join_words, phrase


def database(rng):
    t, n = (
        rng.choice("users orders products books tickets customers workers invoices".split()),
        rng.randint(0, 5000),
    )
    if rng.random() < 0.5:
        return (
            schema(
                rng.choice(["db_query", "run_sql", "query_database"]),
                "Run a SQL query.",
                {"sql": string("The query")},
            ),
            rng.choice(
                [
                    f"How many rows are in the table {t}?",
                    f"Count the rows of {t} in the database.",
                    f"How many {t} are in the database?",
                ]
            ),
            {"sql": f"SELECT COUNT(*) FROM {t}"},
            {"rows": [[n]]},
            f"The table {t} has {n} rows.",
        )
    k = rng.choice(["id", "age", "price", "count"])
    v = rng.randint(1, 500)
    return (
        schema(
            "find_rows",
            "Find rows in a table by a filter.",
            {"table": string(), "filter": {"type": "object", "description": "Column and value"}},
        ),
        rng.choice([f"Find the rows in {t} where {k} is {v}.", f"Look in {t} for {k} = {v}."]),
        {"table": t, "filter": {k: v}},
        {"matches": n % 50},
        f"I found {n % 50} rows in {t} where {k} is {v}.",
    )


def read_file(rng):
    p = path(rng)
    t = rng.choice(
        [
            "version = " + str(rng.randint(1, 9)),
            phrase(rng),
            f"port = {rng.randint(1000, 9999)}",
            f"TODO: {rng.choice(CHORES)}",
        ]
    )
    k = rng.choice(["path", "path", "file", "filename"])
    return (
        schema(
            rng.choice(["read_file", "open_file", "file_read"]),
            "Read a text file.",
            {k: string("Path of the file")},
        ),
        rng.choice(
            [f"Read {p}.", f"What is in {p}?", f"Show me the file {p}.", f"Open {p} please.", f"cat {p}"]
        ),
        {k: p},
        {"content": t},
        f"The file {p} contains: {t}",
    )


def write_file(rng):
    p, t = path(rng), phrase(rng)
    return (
        schema("write_file", "Write text to a file.", {"path": string(), "content": string()}),
        rng.choice([f'Write "{t}" to {p}.', f"Create {p} with the text: {t}", f"Save '{t}' in {p}."]),
        {"path": p, "content": t},
        {"ok": True, "bytes": len(t)},
        f"I wrote {len(t)} bytes to {p}.",
    )


def list_dir(rng):
    d = rng.choice(FOLDERS)
    xs = [f"{noun(rng)}.{rng.choice(EXTENSIONS)}" for _ in range(rng.randint(1, 4))]
    return (
        schema(
            rng.choice(["list_dir", "list_directory", "ls"]),
            "List the files in a folder.",
            {"path": string()},
        ),
        rng.choice(
            [f"Which files are in {d}?", f"List the folder {d}.", f"ls {d}", f"Show me what is in {d}."]
        ),
        {"path": d},
        {"files": xs},
        f"The folder {d} holds {join_words(xs)}.",
    )


def fetch(rng):
    host = f"{rng.choice(['api', 'www', 'data'])}.example.{rng.choice(['com', 'org', 'net'])}"
    u = f"https://{host}/{noun(rng)}"
    c = rng.choice([200, 200, 200, 404, 500, 301])
    return (
        schema(rng.choice(["http_get", "fetch_url"]), "Fetch a web address.", {"url": string()}),
        rng.choice(
            [f"Fetch {u}", f"What does {u} return?", f"Is {u} up?", f"Get {u} and tell me the status."]
        ),
        {"url": u},
        {"status": c},
        rng.choice([f"The server answered with status {c}.", f"{u} returned the status {c}."]),
    )


def clock(rng):
    c, h = city(rng), f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    return (
        schema(rng.choice(["get_time", "current_time"]), "Get the local time in a city.", {"city": string()}),
        rng.choice([f"What time is it in {c}?", f"time in {c}", f"Tell me the local time in {c}."]),
        {"city": c},
        {"time": h},
        f"It is {h} in {c}.",
    )


def stock(rng):
    s = "".join(rng.choice("ABCDEFGHKLMNPRSTX") for _ in range(rng.randint(3, 4)))
    p = round(rng.uniform(5, 900), 2)
    return (
        schema("get_stock_price", "Get the price of a stock.", {"symbol": string()}),
        rng.choice([f"What is the stock price of {s}?", f"price of {s}", f"How much is a share of {s}?"]),
        {"symbol": s},
        {"price": p, "currency": "USD"},
        f"{s} trades at {p} USD.",
    )


def thermostat(rng):
    rm, t = rng.choice(ROOMS), rng.choice([x / 2 for x in range(32, 52)])
    return (
        schema("set_temperature", "Set the heating of a room.", {"room": string(), "degrees": number()}),
        rng.choice([f"Set the {rm} to {t} degrees.", f"Heat the {rm} to {t} degrees."]),
        {"room": rm, "degrees": t},
        {"ok": True, "degrees": t},
        f"The {rm} is set to {t} degrees.",
    )


def stats(rng):
    xs = [rng.randint(1, 50) for _ in range(rng.randint(3, 6))]
    op = rng.choice(["sum", "max", "min"])
    v = {"sum": sum, "max": max, "min": min}[op](xs)
    return (
        schema(
            "list_stats",
            "Compute a statistic of a list of numbers.",
            {"numbers": array(number()), "operation": string(enum=["sum", "max", "min"])},
        ),
        f"Find the {op} of {', '.join(map(str, xs))}.",
        {"numbers": xs, "operation": op},
        {"result": v},
        f"The {op} is {v}.",
    )


def dice(rng):
    s, n = rng.choice([4, 6, 8, 10, 12, 20]), rng.randint(1, 4)
    xs = [rng.randint(1, s) for _ in range(n)]
    return (
        schema("roll_dice", "Roll dice.", {"count": integer(), "sides": integer()}),
        rng.choice([f"Roll {n} dice with {s} sides.", f"Throw {n} {s}-sided dice."]),
        {"count": n, "sides": s},
        {"rolls": xs},
        f"You rolled {join_words(xs)}.",
    )


def cluster(rng):
    w, e = rng.randint(0, 31), rng.randint(1, 90)
    s = rng.choice(["healthy", "draining", "lost", "starting"])
    return (
        schema(
            rng.choice(["worker_status", "get_worker"]),
            "Get the state of a worker.",
            {"rank": integer("Rank of the worker")},
        ),
        rng.choice(
            [
                f"What is the state of worker {w}?",
                f"Is worker {w} healthy?",
                f"Check worker {w}.",
                f"status of rank {w}",
            ]
        ),
        {"rank": w},
        {"state": s, "epoch": e},
        rng.choice([f"Worker {w} is {s}.", f"Worker {w} is {s} in epoch {e}."]),
    )


def run_tests(rng):
    d, p, f = rng.choice(FOLDERS), rng.randint(1, 200), rng.choice([0, 0, 0, 1, 2, 5])
    return (
        schema("run_tests", "Run the tests in a folder.", {"path": string(), "verbose": boolean()}, ["path"]),
        rng.choice([f"Run the tests in {d}.", f"Do the tests in {d} pass?", f"test {d}"]),
        {"path": d},
        {"passed": p, "failed": f},
        f"{p} tests passed and {f} failed in {d}.",
    )


def shell(rng):
    c = rng.choice(
        [
            "ls",
            "pwd",
            "date",
            "whoami",
            "cargo test",
            "cargo build",
            "pytest",
            "git status",
            "git log",
            "df -h",
            f"cat {path(rng)}",
            f"wc -l {path(rng)}",
            "nvidia-smi",
            "uname -a",
        ]
    )
    o = rng.choice(
        ["ok", "done", f"{rng.randint(1, 99)} files", f"{rng.randint(1, 40)} passed", "nothing to do"]
    )
    k = rng.choice(["command", "cmd"])
    return (
        schema(rng.choice(["run_command", "shell", "bash"]), "Run a shell command.", {k: string()}),
        rng.choice([f"Run {c}.", f"Execute the command {c}", f"Please run `{c}`.", f"run {c}"]),
        {k: c},
        {"output": o},
        f"The command printed: {o}",
    )
