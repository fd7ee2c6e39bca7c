"""Plain paragraphs, to be continued rather than answered."""

from demo_recipe.chat.facts import FACTS
from demo_recipe.chat.stories import story
from demo_recipe.chat.vocabulary import ADJECTIVES, CATEGORIES, CITIES, DAYS, NAMES, NOUNS
from demo_recipe.chat.wording import capitalise, join_words, with_article
from demo_recipe.chat.world_facts import CAPITALS, COLOURS_OF, YOUNG


def paragraphs(rng):
    x = rng.random()
    if x < 0.3:
        return story(rng)
    if x < 0.6:
        facts = rng.sample(FACTS, rng.randint(2, 4))
        return " ".join(f"{fact['answer']} {fact['more']}".strip() for fact in facts)
    if x < 0.8:
        return journey(rng)
    return " ".join(statement(rng) for _ in range(rng.randint(3, 6)))


def journey(rng):
    """Somebody goes to a city and buys something."""
    city, name = rng.choice(CITIES), rng.choice(NAMES)
    friend = rng.choice(NAMES)
    sentences = [
        f"On {rng.choice(DAYS)} {name} took the train to {city}.",
        rng.choice(
            [
                "The weather was warm and the streets were full.",
                "It rained all day, and the streets were empty.",
                "Snow lay on the roofs.",
                "A soft wind came from the river.",
            ]
        ),
    ]
    thing = with_article(f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}")
    sentences.append(f"{name} wanted to buy {thing} for {friend}.")
    fruits = join_words(rng.sample(CATEGORIES["fruits"], 3))
    one, two = with_article(rng.choice(NOUNS)), with_article(rng.choice(NOUNS))
    sentences.append(
        rng.choice(
            [
                f"At the market there were {fruits} for sale.",
                f"In the window of a shop stood {one} and {two}.",
            ]
        )
    )
    sentences.append(f"It cost {rng.randint(2, 90)} euros, and {name} paid with a smile.")
    sentences.append(
        rng.choice(
            [
                f"In the evening {name} called {friend} and told the whole story.",
                f"Then {name} went home and slept.",
                f"{friend} was very happy with it.",
            ]
        )
    )
    return " ".join(sentences)


def statement(rng):
    kind = rng.randint(0, 4)
    if kind == 0:
        country, city = rng.choice(CAPITALS)
        return f"The capital of {country} is {city}."
    if kind == 1:
        name, city = rng.choice(NAMES), rng.choice(CITIES)
        animal = with_article(f"{rng.choice(ADJECTIVES)} {rng.choice(CATEGORIES['animals'])}")
        return f"{name} lives in {city} and has {animal}."
    if kind == 2:
        animal, young = rng.choice(YOUNG).split()
        return f"A young {animal} is called {with_article(young)}."
    if kind == 3:
        thing, colour = rng.choice(COLOURS_OF).split("|")
        return f"{capitalise(thing)} is {colour}."
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    return f"The sum of {a} and {b} is {a + b}."
