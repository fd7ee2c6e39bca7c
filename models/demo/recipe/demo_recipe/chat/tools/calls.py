"""Calls, results and the thoughts around them, as messages."""

import json

AFTER_A_RESULT = [
    "The tool gave a result. I report it.",
    "I have the result and can answer now.",
    "The result is here. I tell the user.",
    "Now I answer with the value from the result.",
]


def calling(thought, content, *wanted):
    """An assistant's turn that calls tools."""
    calls = [{"function": {"name": use.name, "arguments": use.arguments}} for use in wanted]
    return {"role": "assistant", "reasoning_content": thought, "content": content, "tool_calls": calls}


def thought_before(rng, use):
    shown = [
        str(value)
        for value in use.arguments.values()
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and len(str(value)) < 30
    ]
    value = rng.choice(shown) if shown else ""
    thoughts = [
        f"I should call {use.name}.",
        f"The tool {use.name} fits this request.",
        f"This needs {use.name}.",
    ]
    if value:
        key = next(key for key, given in use.arguments.items() if str(given) == value)
        thoughts += [
            f"I call {use.name} with {key} {value}.",
            f"The user wants {use.name}. The {key} is {value}.",
            f"{use.name} fits, and {key} is {value}.",
        ]
    return rng.choice(thoughts)


def result_message(rng, result):
    """Mostly JSON; now and then a single value alone."""
    text = json.dumps(result)
    if rng.random() < 0.05 and len(result) == 1:
        (value,) = result.values()
        text = text if isinstance(value, (list, dict)) else str(value)
    return {"role": "tool", "content": text}
