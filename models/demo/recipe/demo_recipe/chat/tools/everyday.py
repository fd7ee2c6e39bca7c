"""Tools of everyday life: weather, sums, money, lights.

Each builder gives (schema, request, arguments, result, answer): see `offer.Use`.
"""

from demo_recipe.chat.tools.schema import (
    CURRENCIES,
    FOREIGN_WORDS,
    LANGUAGES,
    ROOMS,
    SKY,
    boolean,
    city,
    integer,
    noun,
    number,
    schema,
    string,
)
from demo_recipe.chat.vocabulary import ADJECTIVES
from demo_recipe.chat.wording import capitalise, phrase, with_article


def weather(rng):
    c, t, s = city(rng), rng.randint(-10, 38), rng.choice(SKY)
    nm = rng.choice(["get_weather", "get_weather", "weather", "current_weather", "weather_lookup"])
    k = rng.choice(["city", "city", "location", "place"])
    args, props, req = {k: c}, {k: string("Name of the city")}, [k]
    qq = rng.choice(
        [
            f"What is the weather in {c}?",
            f"How is the weather in {c} today?",
            f"Is it warm in {c}?",
            f"Tell me the temperature in {c}.",
            f"weather in {c}",
            f"Check the weather in {c}.",
            f"Do I need a coat in {c}?",
            f"I am going to {c}. What is the weather like?",
        ]
    )
    if rng.random() < 0.35:
        props["unit"] = string("Temperature unit", enum=["celsius", "fahrenheit"])
        if rng.random() < 0.5:
            u = rng.choice(["celsius", "fahrenheit"])
            qq = f"What is the temperature in {c} in {u}?"
            args["unit"] = u
            if u == "fahrenheit":
                t = t * 9 // 5 + 32
    return (
        schema(nm, "Get the current weather for a city.", props, req),
        qq,
        args,
        {"temperature": t, "sky": s},
        rng.choice(
            [
                f"It is {t} degrees and {s} in {c}.",
                f"In {c} it is {s} with {t} degrees.",
                f"The weather in {c} is {s}, {t} degrees.",
            ]
        ),
    )


def forecast(rng):
    c, d, t = city(rng), rng.randint(2, 7), rng.randint(-5, 35)
    return (
        schema(
            "get_forecast",
            "Get the forecast for the next days.",
            {"city": string(), "days": integer("Number of days")},
        ),
        rng.choice(
            [
                f"Give me the forecast for {c} for {d} days.",
                f"What will the weather be in {c} in the next {d} days?",
                f"Forecast for {c}, {d} days.",
            ]
        ),
        {"city": c, "days": d},
        {"average": t, "sky": rng.choice(SKY)},
        f"The average over {d} days in {c} is {t} degrees.",
    )


def calculator(rng):
    a, b, o = rng.randint(2, 9999), rng.randint(2, 999), rng.choice("+-*")
    e = f"{a} {o} {b}"
    v = a + b if o == "+" else a - b if o == "-" else a * b
    return (
        schema(
            rng.choice(["calculator", "calculate", "eval_math"]),
            "Evaluate an arithmetic expression.",
            {"expression": string("The expression")},
        ),
        rng.choice(
            [
                f"Use the calculator for {e}.",
                f"What is {e}?",
                f"Calculate {e} with the tool.",
                f"Compute {e}.",
            ]
        ),
        {"expression": e},
        {"result": v},
        rng.choice([f"{e} = {v}.", f"The result is {v}."]),
    )


def add_numbers(rng):
    a, b = rng.randint(1, 999), rng.randint(1, 999)
    op = rng.choice(["add", "multiply"])
    v = a + b if op == "add" else a * b
    return (
        schema(f"{op}_numbers", f"{capitalise(op)} two numbers.", {"a": integer(), "b": integer()}),
        f"{capitalise(op)} {a} {'and' if op == 'add' else 'by'} {b}.",
        {"a": a, "b": b},
        {"result": v},
        f"The result is {v}.",
    )


def web_search(rng):
    w = rng.choice(
        [
            f"{rng.choice(ADJECTIVES)} {noun(rng)}",
            f"{noun(rng)} in {city(rng)}",
            f"history of the {noun(rng)}",
            f"how to paint {with_article(noun(rng))}",
            f"{noun(rng)} and {noun(rng)}",
        ]
    )
    n = rng.randint(2, 10)
    t = f"All about the {w.split()[-1]}"
    args, props, req = {"query": w}, {"query": string("What to search for")}, ["query"]
    qq = rng.choice([f"Search the web for {w}.", f"Look up {w}.", f"search {w}", f"Find pages about {w}."])
    if rng.random() < 0.4:
        props["limit"] = integer("Number of results")
        if rng.random() < 0.7:
            args["limit"] = n
            qq = f"Search for {w} and give me {n} results."
    return (
        schema(rng.choice(["web_search", "search", "search_web"]), "Search the web.", props, req),
        qq,
        args,
        {"results": [{"title": t, "url": f"https://example.com/{noun(rng)}"}]},
        f"I found a page called {t}.",
    )


def convert(rng):
    v = rng.randint(1, 200)
    a, b, m = rng.choice(
        [
            ("km", "m", 1000),
            ("kg", "g", 1000),
            ("hours", "minutes", 60),
            ("m", "cm", 100),
            ("days", "hours", 24),
            ("minutes", "seconds", 60),
        ]
    )
    return (
        schema(
            rng.choice(["convert_units", "unit_convert"]),
            "Convert a value from one unit to another.",
            {"value": number(), "from_unit": string(), "to_unit": string()},
        ),
        rng.choice([f"Convert {v} {a} to {b}.", f"How many {b} are {v} {a}?", f"{v} {a} in {b}"]),
        {"value": v, "from_unit": a, "to_unit": b},
        {"value": v * m, "unit": b},
        f"{v} {a} are {v * m} {b}.",
    )


def translate(rng):
    p, language = phrase(rng), rng.choice(LANGUAGES)
    o = " ".join(rng.choice(FOREIGN_WORDS) for _ in range(3))
    k = rng.choice(["target_language", "target", "language"])
    return (
        schema(
            rng.choice(["translate", "translate_text"]),
            "Translate a text.",
            {"text": string(), k: string("Language to translate into")},
        ),
        rng.choice(
            [
                f'Translate "{p}" into {language}.',
                f"How do you say '{p}' in {language}?",
                f"translate to {language}: {p}",
            ]
        ),
        {"text": p, k: language},
        {"translation": o},
        rng.choice([f'In {language} it is "{o}".', f"The translation is: {o}"]),
    )


def currency(rng):
    v = rng.randint(1, 900)
    a, b = rng.sample(CURRENCIES, 2)
    o = round(v * rng.randint(50, 200) / 100, 2)
    return (
        schema(
            rng.choice(["convert_currency", "exchange"]),
            "Convert money between currencies.",
            {"amount": number(), "from": string("Currency code"), "to": string("Currency code")},
        ),
        rng.choice(
            [
                f"Convert {v} {a} to {b}.",
                f"How much is {v} {a} in {b}?",
                f"{v} {a} to {b}",
                f"I have {v} {a}. What is that in {b}?",
            ]
        ),
        {"amount": v, "from": a, "to": b},
        {"amount": o, "currency": b},
        f"{v} {a} is {o} {b}.",
    )


def lights(rng):
    rm, on = rng.choice(ROOMS), rng.random() < 0.5
    w = "on" if on else "off"
    if rng.random() < 0.3:
        p = rng.randrange(10, 101, 5)
        return (
            schema(
                "set_brightness",
                "Set the brightness of a lamp.",
                {"room": string(), "percent": integer("0 to 100")},
            ),
            rng.choice([f"Set the {rm} light to {p} percent.", f"Dim the {rm} to {p}%."]),
            {"room": rm, "percent": p},
            {"ok": True, "percent": p},
            f"The {rm} light is now at {p} percent.",
        )
    return (
        schema(
            rng.choice(["set_light", "switch_light", "light_switch"]),
            "Turn a light on or off.",
            {"room": string(), "on": boolean("true to turn it on")},
        ),
        rng.choice(
            [
                f"Turn {w} the light in the {rm}.",
                f"Switch {w} the {rm} light.",
                f"{rm} light {w}",
                f"Turn the {rm} lights {w}.",
            ]
        ),
        {"room": rm, "on": on},
        {"room": rm, "state": w},
        rng.choice([f"The {rm} light is {w}.", f"Done, the light in the {rm} is {w} now."]),
    )


def timer(rng):
    m = rng.randint(1, 90)
    label = rng.choice(["tea", "pasta", "cake", "break", "laundry", "eggs", "workout"])
    args, props = {"minutes": m}, {"minutes": integer()}
    qq = rng.choice(
        [
            f"Set a timer for {m} minutes.",
            f"timer {m} minutes",
            f"Start a {m} minute timer.",
            f"Wake me in {m} minutes.",
        ]
    )
    if rng.random() < 0.5:
        props["label"] = string("Name of the timer")
        if rng.random() < 0.8:
            args["label"] = label
            qq = rng.choice(
                [f"Set a {m} minute timer for {label}.", f"Start a timer called {label} for {m} minutes."]
            )
    return (
        schema(rng.choice(["set_timer", "start_timer"]), "Start a timer.", props, ["minutes"]),
        qq,
        args,
        {"ok": True, "minutes": m},
        rng.choice([f"The timer is set for {m} minutes.", f"Done. I will ring in {m} minutes."]),
    )
