"""A reply's text to a message: reasoning, content and tool calls."""

import json
import re

CALLS = re.compile(r"<minimax:tool_call>(.*?)</minimax:tool_call>", re.DOTALL)
INVOKE = re.compile(r'<invoke name="(.*?)">(.*?)</invoke>', re.DOTALL)
PARAMETER = re.compile(r'<parameter name="(.*?)">(.*?)</parameter>', re.DOTALL)
FROM_FIRST_CALL = re.compile(r"<minimax:tool_call>.*", re.DOTALL)


def parse(text, tools):
    reasoning, closed, rest = text.partition("</think>")
    if not closed:
        rest = ""
    message = {
        "role": "assistant",
        "reasoning_content": reasoning.strip("\n"),
        "content": FROM_FIRST_CALL.sub("", rest).strip("\n"),
    }
    calls = [call for block in CALLS.findall(rest) for call in calls_of(block, tools)]
    return message | ({"tool_calls": calls} if calls else {})


def calls_of(block, tools):
    schemas = {t["function"]["name"]: t["function"]["parameters"].get("properties", {}) for t in tools}
    for name, body in INVOKE.findall(block):
        properties = schemas.get(name, {})
        arguments = {
            key: value_of(text, properties.get(key, {}).get("type", "string"))
            for key, text in PARAMETER.findall(body)
        }
        yield {"function": {"name": name, "arguments": arguments}}


def value_of(text, kind):
    """JSON, unless the schema says string or the text is no JSON."""
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
