"""Conversations that call tools, or rightly do not. All give (messages, tools)."""

import json

from demo_recipe.chat.arithmetic import arithmetic
from demo_recipe.chat.facts import fact_question
from demo_recipe.chat.messages import assistant, exchange, user
from demo_recipe.chat.small_talk import small_talk
from demo_recipe.chat.tools.calls import AFTER_A_RESULT, calling, result_message, thought_before
from demo_recipe.chat.tools.everyday import currency, lights, timer, translate, weather
from demo_recipe.chat.tools.machines import clock, cluster, fetch, list_dir, read_file, stock
from demo_recipe.chat.tools.offer import (
    ARITHMETIC,
    MACHINES,
    SEARCH,
    TOOLS,
    draw_use,
    group_of,
    offer,
    use_of,
)
from demo_recipe.chat.wording import capitalise, polite
from demo_recipe.chat.world import world_question

#: Tools that one may well call twice in one message.
REPEATABLE = (weather, clock, stock, read_file, timer, currency, lights, cluster, translate, fetch, list_dir)
ERRORS = ["not found", "timeout", "permission denied", "service unavailable"]


def tool_chat(rng):
    x = rng.random()
    if x < 0.12:
        return without_call(rng)
    first = draw_use(rng)
    messages, needed = (two_calls(rng, first) if x < 0.32 else None) or one_call(rng, first)
    tools = offer(rng, needed)
    if rng.random() < 0.18:
        messages += further_turn(rng, tools)
    return messages, tools


def without_call(rng):
    """Tools are offered, and none is needed or none fits."""
    tools = offer(rng, [])
    groups = [group_of(schema) for schema in tools]
    if rng.random() < 0.7:
        question, thought, answer = rng.choice([small_talk, arithmetic, world_question, world_question])(rng)
        if ARITHMETIC in groups or SEARCH in groups:
            question, thought, answer = rng.choice([small_talk, fact_question])(rng)
        no_tool = ["No tool is needed here. " + thought, "I can answer this without a tool."]
        thought = rng.choice([thought, *no_tool])
        return exchange((question, thought, answer)), tools
    wanted = draw_use(rng)
    group = group_of(wanted.schema)
    if group in groups or group in (ARITHMETIC, MACHINES) or SEARCH in groups or MACHINES in groups:
        return exchange(small_talk(rng)), tools
    thought = rng.choice(["None of my tools can do this. I should say so.", "No tool here fits the request."])
    answer = rng.choice(
        [
            "I am sorry, but I have no tool for that.",
            "I cannot do that with the tools I have.",
            "Sorry, none of my tools can do that.",
        ]
    )
    return exchange((wanted.request, thought, answer)), tools


def two_calls(rng, first):
    """Two calls in one message, or None if no second one was found."""
    first, second = pair_of_uses(rng, first)
    if second is None:
        return None
    twice = first.name == second.name
    request = joined_request(rng, first.request, second.request)
    thought = rng.choice(
        [
            f"Two things are asked. I call {first.name} twice."
            if twice
            else f"Two things are asked. I call {first.name} and {second.name}.",
            "The user wants two things, so I make two calls.",
        ]
    )
    messages = [
        user(request),
        calling(thought, "", first, second),
        result_message(rng, first.result),
        result_message(rng, second.result),
    ]
    thought = rng.choice(["Both results are here. I report them.", "I have both results and can answer now."])
    messages.append(assistant(thought, f"{first.answer} {second.answer}"))
    return messages, [first.schema, second.schema]


def pair_of_uses(rng, first):
    """The same tool twice with other arguments, or two tools that do not serve one purpose."""
    tool = None
    if rng.random() < 0.5:
        for candidate in TOOLS:
            if tool is None and candidate in REPEATABLE and rng.random() < 0.25:
                tool = candidate
    if tool is None:
        second = draw_use(rng)
        while second.name == first.name or group_of(second.schema) == group_of(first.schema):
            second = draw_use(rng)
        return first, second
    first, second, tries = use_of(tool, rng), use_of(tool, rng), 0
    while (second.schema != first.schema or second.arguments == first.arguments) and tries < 200:
        second = use_of(tool, rng)
        tries += 1
    return first, second if second.schema == first.schema else None


def joined_request(rng, first, second):
    start = second.split()[0]
    low = second if start == "I" or start.isupper() else second[0].lower() + second[1:]
    full = first if first[-1] in ".?" else first + "."
    if ":" in first or first[-1] in "?\"'" or rng.random() < 0.4:
        return rng.choice([f"{full} Also, {low}", f"{full} {capitalise(second)}", f"{full} And {low}"])
    return first.rstrip(".") + rng.choice([" and ", ", and ", ", then "]) + low


def one_call(rng, use):
    request = user(polite(rng, use.request))
    content = rng.choice(["", "", "", "", "Let me check.", "One moment.", "I will do that now."])
    messages = [request, calling(thought_before(rng, use), content, use)]
    if rng.random() < 0.06:
        error = rng.choice(ERRORS)
        answers = [f"I am sorry, the tool failed: {error}.", f"That did not work. The error is: {error}."]
        messages.append({"role": "tool", "content": json.dumps({"error": error})})
        messages.append(assistant("The tool failed. I tell the user about the error.", rng.choice(answers)))
    else:
        messages.append(result_message(rng, use.result))
        messages.append(assistant(rng.choice(AFTER_A_RESULT), use.answer))
    return messages, [use.schema]


def further_turn(rng, tools):
    """Thanks, or another request for an offered tool (one is added to `tools` if none comes up)."""
    if rng.random() < 0.4:
        thanks = rng.choice(["thanks", "Thank you!", "great, thanks", "perfect"])
        answer = rng.choice(["You are welcome!", "Glad I could help.", "My pleasure!"])
        return exchange((thanks, "The user thanks me. I reply kindly.", answer))
    use = next((use for use in (draw_use(rng) for _ in range(400)) if use.schema in tools), None)
    if use is None and len(tools) < 4:
        use = draw_use(rng)
        names = {schema["function"]["name"] for schema in tools}
        if use.name in names or group_of(use.schema) in [group_of(schema) for schema in tools]:
            return []
        tools.append(use.schema)
    if use is None:
        return []
    return [
        user(use.request),
        calling(thought_before(rng, use), "", use),
        result_message(rng, use.result),
        assistant(rng.choice(AFTER_A_RESULT), use.answer),
    ]
