"""Conversations in which the user tells something and asks for it later."""

from dataclasses import dataclass

from demo_recipe.chat.arithmetic import arithmetic
from demo_recipe.chat.facts import fact_question
from demo_recipe.chat.messages import assistant, exchange, user
from demo_recipe.chat.small_talk import small_talk
from demo_recipe.chat.vocabulary import CATEGORIES, CITIES, NAMES, NOUNS
from demo_recipe.chat.word_tasks import word_task
from demo_recipe.chat.wording import capitalise, with_article
from demo_recipe.chat.world import world_question

JOBS = "baker teacher pilot painter farmer nurse writer driver singer doctor engineer student".split()
OTHER_TOPICS = [small_talk, fact_question, arithmetic, world_question, word_task]


@dataclass(frozen=True)
class Item:
    """Something that a user tells."""

    kind: str
    #: What it is called in thoughts: "favourite colour".
    thing: str
    value: object
    statements: list
    questions: list
    answer: str

    def acknowledgement(self, rng):
        if self.kind == "name":
            greetings = [
                f"Nice to meet you, {self.value}!",
                f"Hello {self.value}! How can I help?",
                f"Hi {self.value}!",
            ]
            return rng.choice(greetings)
        special = {
            "colour": [f"{capitalise(str(self.value))} is a lovely colour."],
            "city": [f"{self.value} is a nice place to live."],
            "pet": ["How nice! Give it a pat from me."],
            "food": ["That is a tasty choice."],
            "job": ["That sounds like good work."],
        }.get(self.kind, [])
        return rng.choice(special + ["I will remember that.", "Good to know.", f"Noted: {self.value}."])


def name(rng):
    v = rng.choice(NAMES)
    statements = [
        f"My name is {v}.",
        f"I am {v}.",
        f"Hi, I'm {v}.",
        f"Call me {v}.",
        f"hello, my name is {v}",
    ]
    questions = [
        "What is my name?",
        "what's my name",
        "Do you remember my name?",
        "Who am I?",
        "How am I called?",
    ]
    return Item("name", "name", v, statements, questions, f"Your name is {v}.")


def colour(rng):
    v = rng.choice(CATEGORIES["colours"])
    statements = [
        f"My favourite colour is {v}.",
        f"I like {v} best of all colours.",
        f"my favorite color is {v}",
    ]
    questions = ["What is my favourite colour?", "Which colour do I like best?", "what's my favorite color"]
    return Item("colour", "favourite colour", v, statements, questions, f"Your favourite colour is {v}.")


def city(rng):
    v = rng.choice(CITIES)
    statements = [f"I live in {v}.", f"My home is in {v}.", f"I moved to {v} last year.", f"i live in {v}"]
    questions = ["Where do I live?", "In which city do I live?", "which city is my home"]
    return Item("city", "city", v, statements, questions, f"You live in {v}.")


def pet(rng):
    animal, v = rng.choice(CATEGORIES["animals"]), rng.choice(NAMES)
    one = with_article(animal)
    statements = [f"I have {one} called {v}.", f"My {animal} is called {v}.", f"My pet is {one} named {v}."]
    questions = ["What is my pet called?", f"What is the name of my {animal}?", "Do you remember my pet?"]
    return Item("pet", "pet", f"{one} called {v}", statements, questions, f"Your {animal} is called {v}.")


def number(rng):
    v = rng.randint(1, 999)
    statements = [
        f"My lucky number is {v}.",
        f"Remember the number {v}.",
        f"Please keep the number {v} in mind.",
    ]
    questions = ["Which number did I tell you?", "What was the number?", "what is my number"]
    return Item("number", "number", v, statements, questions, f"The number is {v}.")


def word(rng):
    v = rng.choice(NOUNS)
    statements = [f"The secret word is {v}.", f"Remember the word {v}.", f"The password is {v}."]
    questions = ["What was the word?", "Which word did I tell you?", "Do you remember the word?"]
    return Item("word", "word", v, statements, questions, f"The word is {v}.")


def food(rng):
    v = rng.choice(CATEGORIES["fruits"])
    statements = [f"My favourite fruit is {v}.", f"I like {v} more than any other fruit."]
    questions = ["What is my favourite fruit?", "Which fruit do I like best?"]
    return Item("food", "favourite fruit", v, statements, questions, f"Your favourite fruit is {v}.")


def job(rng):
    v = rng.choice(JOBS)
    statements = [f"I am {with_article(v)}.", f"I work as {with_article(v)}.", f"My job is {v}."]
    questions = ["What is my job?", "What do I do for work?", "what's my job"]
    return Item("job", "job", v, statements, questions, f"You work as {with_article(v)}.")


ITEMS = {maker.__name__: maker for maker in (name, colour, city, pet, number, word, food, job)}


def memory(rng):
    # A name is told twice as often as anything else.
    drawn = rng.sample(
        ["name", "name2", "colour", "city", "pet", "number", "word", "food", "job"], rng.choice([1, 1, 2, 2])
    )
    kinds = list(dict.fromkeys("name" if kind == "name2" else kind for kind in drawn))
    items = [ITEMS[kind](rng) for kind in kinds]
    messages = told(rng, items)
    for _ in range(rng.randint(0, max(0, 3 - len(messages) // 2))):
        messages += exchange(rng.choice(OTHER_TOPICS)(rng))
    rng.shuffle(items)
    messages += asked(rng, items[0])
    if len(items) == 2 and len(messages) <= 6:
        messages += asked_too(rng, items[1])
    elif rng.random() < 0.06:
        messages += asked_in_vain(rng, kinds)
    return messages


def told(rng, items):
    """Both things in one message, or one message each."""
    if len(items) == 2 and rng.random() < 0.5:
        one, two = items
        first, second = rng.choice(one.statements), rng.choice(two.statements)
        first = first if first[-1] in ".!?" else first + "."
        thought = f"The user tells me two things: {one.thing} {one.value}, and {two.thing} {two.value}."
        replies = ["Thank you, I will remember both.", one.acknowledgement(rng), two.acknowledgement(rng)]
        return [user(f"{first} {second}"), assistant(thought, rng.choice(replies))]
    messages = []
    for item in items:
        messages.append(user(rng.choice(item.statements)))
        thought = rng.choice(
            [
                f"The user tells me the {item.thing}: {item.value}.",
                f"I should remember: {item.thing} is {item.value}.",
            ]
        )
        messages.append(assistant(thought, item.acknowledgement(rng)))
    return messages


def asked(rng, item):
    question = user(rng.choice(item.questions))
    thought = rng.choice(
        [
            f"The user told me the {item.thing}: {item.value}.",
            f"Earlier the user said that the {item.thing} is {item.value}.",
            f"I remember: {item.thing} {item.value}.",
        ]
    )
    return [question, assistant(thought, item.answer)]


def asked_too(rng, item):
    opening = rng.choice(["And ", ""])
    question = rng.choice(item.questions)
    if opening:
        question = opening + question[0].lower() + question[1:]
    return [user(question), assistant(f"The user told me the {item.thing}: {item.value}.", item.answer)]


def asked_in_vain(rng, known):
    """A question for something that was never told."""
    kind = rng.choice([k for k in ("colour", "city", "pet", "food", "job", "name") if k not in known])
    item = ITEMS[kind](rng)
    replies = [f"You have not told me your {item.thing} yet.", "I do not know that yet. Please tell me."]
    thought = f"The user has not told me the {item.thing}."
    return [user(item.questions[0]), assistant(thought, rng.choice(replies))]
