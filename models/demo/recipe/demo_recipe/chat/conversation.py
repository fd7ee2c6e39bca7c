"""All conversations that are not about code: `sample(rng)` draws one."""

from demo_recipe.chat.arithmetic import arithmetic
from demo_recipe.chat.facts import fact_question
from demo_recipe.chat.memory import memory
from demo_recipe.chat.messages import exchange
from demo_recipe.chat.small_talk import small_talk
from demo_recipe.chat.stories import story_request
from demo_recipe.chat.tools.dialogue import tool_chat
from demo_recipe.chat.word_tasks import word_task
from demo_recipe.chat.wording import polite
from demo_recipe.chat.world import world_question

SYSTEMS = [
    "You are a helpful assistant.",
    "You are Conclave-Demo, a tiny model.",
    "Answer briefly.",
    "Be short and polite.",
    "You are a friendly helper.",
    "Keep your answers short.",
    "You help users of the Conclave server.",
    "Answer in plain English.",
    "You are a careful assistant. Think first.",
    "Reply clearly and kindly.",
    "You are a small demo assistant.",
    "Answer in one or two sentences.",
    "Be helpful and honest.",
    "You are an assistant in a test.",
]


#: System messages that do not ask for brevity: stories are long.
SYSTEMS_FOR_STORIES = [
    s for s in SYSTEMS if not any(word in s for word in ("short", "briefly", "one or two"))
]


def identity(rng):
    """One to three exchanges of small talk, no two with the same thought."""
    messages, seen = [], set()
    wanted = 1 if rng.random() < 0.7 else rng.randint(2, 3)
    while len(seen) < wanted:
        question, thought, answer = small_talk(rng)
        if thought not in seen:
            seen.add(thought)
            messages += exchange((question, thought, answer))
    return messages


def world(rng):
    question, thought, answer = world_question(rng)
    if rng.random() < 0.4:
        question = polite(rng, question)
    return exchange((question, thought, answer))


def single(topic):
    """One exchange on a topic."""

    def conversation(rng):
        messages = exchange(topic(rng))
        # Keeps the sequence of random numbers that the published model was trained on.
        rng.random()
        return messages

    return conversation


def facts(rng):
    messages = exchange(fact_question(rng))
    if rng.random() < 0.15:
        messages += exchange(fact_question(rng))
    return messages


def sums(rng):
    one = single(arithmetic)
    messages = one(rng)
    if rng.random() < 0.12:
        messages += one(rng)
    return messages


#: Weight and maker of each kind; a maker gives messages, `tool_chat` messages and tools.
KINDS = {
    "identity": (12, identity),
    "facts": (20, facts),
    "arithmetic": (14, sums),
    "world": (10, world),
    "words": (10, single(word_task)),
    "memory": (8, memory),
    "story": (8, single(story_request)),
    "tools": (18, tool_chat),
}


def sample(rng):
    """A conversation: {"messages", "tools"}."""
    kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    made = KINDS[kind][1](rng)
    if kind == "tools":
        messages, tools = made
    else:
        messages, tools = made, None
        rng.random()
    if rng.random() < 0.15:
        systems = SYSTEMS_FOR_STORIES if kind == "story" else SYSTEMS
        messages = [{"role": "system", "content": rng.choice(systems)}, *messages]
    if rng.random() < 0.15:
        for message in messages:
            if message["role"] == "assistant":
                message["reasoning_content"] = ""
    return {"messages": messages, "tools": tools}
