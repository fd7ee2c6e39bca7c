"""Conversations to text in the MiniMax-M2 chat format, as segments: [(text, loss weight), ...]."""

import json

IDENTITY = "You are a helpful assistant. Your name is Conclave-Demo."

TOOLS_HEAD = """

# Tools
You may call one or more tools to assist with the user query.
Here are the tools available in JSONSchema format:

<tools>
"""
TOOLS_TAIL = """</tools>

When making tool calls, use XML format to invoke tools and pass parameters:

<minimax:tool_call>
<invoke name="tool-name-1">
<parameter name="param-key-1">param-value-1</parameter>
<parameter name="param-key-2">param-value-2</parameter>
...
</invoke>
</minimax:tool_call>"""

#: What stands before the model's reply.
REPLY_HEAD = "]~b]ai\n<think>\n"

#: Weight of text that is context only, of text to learn, and of text that must not be learnt.
CONTEXT, LEARN, FORBID = 0.0, 1.0, -1.0


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def system_text(messages, tools):
    own = messages[0]["content"] if messages and messages[0]["role"] == "system" else IDENTITY
    text = f"]~!b[]~b]system\n{own}"
    if tools:
        listed = "".join(f"<tool>{dumps(tool['function'])}</tool>\n" for tool in tools)
        text += TOOLS_HEAD + listed + TOOLS_TAIL
    return text + "[e~[\n"


def call_text(message):
    """The tool calls of an assistant's message."""
    if not message.get("tool_calls"):
        return ""
    text = "\n<minimax:tool_call>\n"
    for call in message["tool_calls"]:
        function = call["function"]
        text += f'<invoke name="{function["name"]}">\n'
        for name, value in function["arguments"].items():
            shown = value if isinstance(value, str) else dumps(value)
            text += f'<parameter name="{name}">{shown}</parameter>\n'
        text += "</invoke>\n"
    return text + "</minimax:tool_call>"


def segments(messages, tools):
    """As one request whose last user message is the last one: assistant turns after it carry loss."""
    result = [(system_text(messages, tools), CONTEXT)]
    turns = [message for message in messages if message["role"] != "system"]
    last_user = max((i for i, message in enumerate(turns) if message["role"] == "user"), default=-1)
    for i, message in enumerate(turns):
        if message["role"] == "user":
            result.append((f"]~b]user\n{message['content']}[e~[\n", CONTEXT))
        elif message["role"] == "tool":
            opens = turns[i - 1]["role"] != "tool"
            closes = i + 1 == len(turns) or turns[i + 1]["role"] != "tool"
            text = ("]~b]tool" if opens else "") + f"\n<response>{message['content']}</response>"
            result.append((text + ("[e~[\n" if closes else ""), CONTEXT))
        else:
            result += assistant_segments(message, thinks=i > last_user)
    return result


def assistant_segments(message, thinks):
    said = (message["content"] or "") + call_text(message) + "[e~["
    if not thinks:
        return [(f"]~b]ai\n{said}\n", CONTEXT)]
    thought = message.get("reasoning_content") or (
        "I use a tool for this." if message.get("tool_calls") else ""
    )
    weight = FORBID if message.get("noloss") else LEARN
    return [(REPLY_HEAD, CONTEXT), (f"{thought}\n</think>\n\n{said}", weight), ("\n", CONTEXT)]


def documents(conversation):
    """One document for each user turn, since reasoning is dropped from the turns before it."""
    messages, tools = conversation["messages"], conversation.get("tools")
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for end in [*users[1:], len(messages)] if users else []:
        yield segments(messages[:end], tools)


def prompt(messages, tools=None):
    """What the model continues with its reply."""
    return "".join(text for text, _ in segments(messages, tools)) + REPLY_HEAD
