"""Tools of an office: calendar, mail, lists, bookings.

Each builder gives (schema, request, arguments, result, answer): see `offer.Use`.
"""

from demo_recipe.chat.tools.schema import (
    CHORES,
    GENRES,
    ROOMS,
    array,
    boolean,
    city,
    integer,
    name,
    noun,
    object_of,
    schema,
    string,
)
from demo_recipe.chat.vocabulary import ADJECTIVES, CATEGORIES, CITIES, DAYS
from demo_recipe.chat.wording import join_words


def calendar(rng):
    d, h, n = rng.choice(DAYS), f"{rng.randint(8, 20)}:{rng.choice(['00', '15', '30'])}", name(rng)
    t = rng.choice(
        [
            f"lunch with {n}",
            f"meeting with {n}",
            f"call with {n}",
            "dentist",
            "team meeting",
            "yoga",
            "piano lesson",
        ]
    )
    i = rng.randint(100, 999)
    return (
        schema(
            rng.choice(["create_event", "add_calendar_event", "add_event"]),
            "Add an event to the calendar.",
            {"title": string(), "day": string("Weekday"), "time": string("Time such as 14:30")},
        ),
        rng.choice(
            [
                f"Add {t} on {d} at {h} to my calendar.",
                f"Put {t} in the calendar for {d}, {h}.",
                f"Schedule {t} on {d} at {h}.",
            ]
        ),
        {"title": t, "day": d, "time": h},
        {"ok": True, "event_id": i},
        rng.choice([f"I added {t} on {d} at {h}.", f"Done. The event has the number {i}."]),
    )


def list_events(rng):
    d, n = rng.choice(DAYS), name(rng)
    t, h = f"{rng.choice(['lunch', 'meeting', 'call'])} with {n}", f"{rng.randint(8, 20)}:00"
    return (
        schema("list_events", "List the events of a day.", {"day": string()}),
        rng.choice(
            [f"What is on my calendar on {d}?", f"Do I have plans on {d}?", f"Show my events for {d}."]
        ),
        {"day": d},
        {"events": [{"title": t, "time": h}]},
        f"On {d} you have {t} at {h}.",
    )


def email(rng):
    n = name(rng)
    to = f"{n.lower()}@example.com"
    s, b = (
        rng.choice(["lunch", "report", "hello", "meeting", "invoice", "trip", "news"]),
        rng.choice(
            [
                "See you soon.",
                "Please call me.",
                "The work is done.",
                f"I am in {city(rng)} now.",
                f"Meet me on {rng.choice(DAYS)}.",
                "Thank you for your help.",
            ]
        ),
    )
    return (
        schema(
            rng.choice(["send_email", "send_mail"]),
            "Send an email.",
            {"to": string("Address"), "subject": string(), "body": string()},
        ),
        rng.choice(
            [
                f'Send an email to {to} with the subject {s} and the text "{b}"',
                f'Write to {to}, subject "{s}", body: {b}',
                f"Email {to} about {s}: {b}",
            ]
        ),
        {"to": to, "subject": s, "body": b},
        {"status": "sent", "id": rng.randint(100, 999)},
        f"The email to {to} was sent.",
    )


def message(rng):
    n, b = (
        name(rng),
        rng.choice(
            [
                "I am late",
                "call me back",
                "see you at eight",
                "happy birthday",
                "the train is late",
                "good luck today",
                "dinner is ready",
            ]
        ),
    )
    return (
        schema("send_message", "Send a short message to a contact.", {"contact": string(), "text": string()}),
        rng.choice([f"Send {n} the message: {b}", f'Text {n} "{b}".', f"Tell {n}: {b}"]),
        {"contact": n, "text": b},
        {"status": "delivered"},
        f"Your message to {n} was delivered.",
    )


def playlist(rng):
    g, n = rng.choice(GENRES), rng.randint(5, 40)
    t = f"{rng.choice(ADJECTIVES)} {noun(rng)}"
    return (
        schema(
            "create_playlist",
            "Create a music playlist.",
            {"title": string(), "genre": string(), "songs": integer("Number of songs"), "shuffle": boolean()},
            ["title", "genre", "songs"],
        ),
        rng.choice(
            [
                f'Make a {g} playlist called "{t}" with {n} songs.',
                f"Create a playlist named '{t}' with {n} {g} songs.",
            ]
        ),
        {"title": t, "genre": g, "songs": n},
        {"playlist_id": rng.randint(10, 99), "songs": n},
        f"The playlist {t} with {n} {g} songs is ready.",
    )


def play(rng):
    g, rm = rng.choice(GENRES), rng.choice(ROOMS)
    return (
        schema("play_music", "Play music in a room.", {"genre": string(), "room": string()}),
        rng.choice([f"Play {g} in the {rm}.", f"I want to hear {g} music in the {rm}."]),
        {"genre": g, "room": rm},
        {"playing": True},
        f"I am playing {g} in the {rm}.",
    )


def todo(rng):
    if rng.random() < 0.4:
        xs = rng.sample(CATEGORIES["fruits"] + CATEGORIES["vegetables"], rng.randint(2, 4))
        return (
            schema(
                rng.choice(["add_items", "add_to_shopping_list"]),
                "Add items to the shopping list.",
                {"items": array(string(), "Items to add")},
            ),
            rng.choice(
                [
                    f"Add {join_words(xs)} to my shopping list.",
                    f"Put {join_words(xs)} on the shopping list.",
                    f"shopping list: {', '.join(xs)}",
                ]
            ),
            {"items": xs},
            {"ok": True, "total": len(xs) + rng.randint(0, 6)},
            f"I added {join_words(xs)} to the list.",
        )
    t, p = rng.choice(CHORES), rng.choice(["low", "normal", "high"])
    args, props = {"task": t}, {"task": string()}
    qq = rng.choice(
        [f"Add '{t}' to my tasks.", f"Remind me to {t}.", f"todo: {t}", f"Put {t} on my to-do list."]
    )
    if rng.random() < 0.4:
        props["priority"] = string(enum=["low", "normal", "high"])
        args["priority"] = p
        qq = f"Add the task '{t}' with {p} priority."
    return (
        schema(
            rng.choice(["add_todo", "add_task", "create_task"]),
            "Add a task to the to-do list.",
            props,
            ["task"],
        ),
        qq,
        args,
        {"id": rng.randint(1, 99), "task": t},
        f"I added the task: {t}.",
    )


def create_user(rng):
    n, a, c = name(rng), rng.randint(18, 80), city(rng)
    return (
        schema(
            rng.choice(["create_user", "add_contact"]),
            "Save a person.",
            {"user": object_of({"name": string(), "age": integer(), "city": string()})},
        ),
        rng.choice([f"Save {n}, {a} years old, from {c}.", f"Create a record for {n} from {c}, age {a}."]),
        {"user": {"name": n, "age": a, "city": c}},
        {"ok": True, "id": rng.randint(100, 999)},
        f"I saved {n} from {c}.",
    )


def table(rng):
    n, c, h = rng.randint(1, 9), city(rng), f"{rng.randint(17, 22)}:00"
    return schema(
        "book_table",
        "Book a table in a restaurant.",
        {"city": string(), "people": integer(), "time": string(), "outside": boolean("Sit outside")},
        ["city", "people", "time"],
    ), *(
        (
            lambda out: (
                rng.choice(
                    [f"Book a table for {n} in {c} at {h}", f"I need a table in {c} for {n} people at {h}"]
                )
                + (", outside." if out else "."),
                dict({"city": c, "people": n, "time": h}, **({"outside": True} if out else {})),
                {"ok": True, "code": f"T{rng.randint(100, 999)}"},
                f"Your table for {n} in {c} at {h} is booked.",
            )
        )(rng.random() < 0.4)
    )


def train(rng):
    a, b = rng.sample(CITIES, 2)
    h, d = f"{rng.randint(5, 22)}:{rng.choice(['05', '20', '45'])}", rng.choice(DAYS)
    return (
        schema(
            rng.choice(["find_train", "search_trains"]),
            "Find a train between two cities.",
            {"origin": string(), "destination": string(), "day": string()},
        ),
        rng.choice(
            [
                f"Find a train from {a} to {b} on {d}.",
                f"I want to go from {a} to {b} on {d}. Which train can I take?",
            ]
        ),
        {"origin": a, "destination": b, "day": d},
        {"departure": h, "price": rng.randint(10, 150)},
        f"There is a train from {a} to {b} on {d} at {h}.",
    )
