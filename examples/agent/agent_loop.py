"""A coding agent over the OpenAI API: it edits files, runs tests and repeats until they pass.

    pip install openai pytest
    cargo run --release -- serve &
    python examples/agent/agent_loop.py --workspace DIR "helpers.py has a bug. Fix it, then run test.py to check. ..."

Works against any OpenAI-compatible server. With no task on the command line it makes a small broken function with a
failing test in a temporary folder and mends that. Programs run confined to the workspace, see sandbox.py.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from openai import OpenAI

from sandbox import Sandbox, SandboxError

MAX_ITERATIONS = 5
MAX_TOKENS = 4096
TOOLS = json.loads((Path(__file__).parent / "tools.json").read_text())

BROKEN = 'def initials(text):\n    return "".join(w[-1].upper() for w in text.split())\n'
TEST = (
    "from helpers import initials\n\n\n"
    "def test_initials():\n"
    "    assert initials('green cloud cloud') == 'GCC'\n"
    "    assert initials('window silver summer green') == 'WSSG'\n"
)


class AgentError(Exception):
    """The loop cannot go on; the message says why."""


def is_stalled(messages):
    """The same test result twice in a row, of the test runner alone: no progress is being made."""
    tool_of_call = {
        call["id"]: call["function"]["name"]
        for message in messages
        if message["role"] == "assistant"
        for call in message.get("tool_calls") or []
    }
    results = [
        message["content"]
        for message in messages
        if message["role"] == "tool" and tool_of_call.get(message["tool_call_id"]) == "test_runner"
    ]
    return len(results) >= 2 and results[-1] == results[-2]


def run_tool_calls(message, sandbox):
    """One tool message for each call, in order."""
    for call in message.tool_calls:
        try:
            arguments = json.loads(call.function.arguments)
        except json.JSONDecodeError as wrong:
            raise AgentError(f"arguments of {call.function.name} are not JSON: {wrong}") from wrong
        result = sandbox.call(call.function.name, arguments)
        print(f"  {call.function.name} -> {json.dumps(result)}", file=sys.stderr)
        yield {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)}


def run_agent(client, model, messages, sandbox, max_tokens=MAX_TOKENS, temperature=0.0):
    """Runs the loop on a conversation, which it extends; returns the final answer."""
    ask = {"model": model, "tools": TOOLS, "max_tokens": max_tokens, "temperature": temperature}
    for iteration in range(MAX_ITERATIONS):
        choice = client.chat.completions.create(messages=messages, tool_choice="auto", **ask).choices[0]
        messages.append(choice.message.model_dump(exclude_none=True))
        if choice.finish_reason == "length":
            raise AgentError("the answer was cut before it was complete; raise max_tokens")
        if not choice.message.tool_calls:
            return choice.message.content or ""
        messages.extend(run_tool_calls(choice.message, sandbox))
        if iteration >= 2 and is_stalled(messages):
            raise AgentError("stalled: the same tests fail as before")
    choice = client.chat.completions.create(messages=messages, tool_choice="none", **ask).choices[0]
    messages.append(choice.message.model_dump(exclude_none=True))
    return choice.message.content or ""


def demo_task(workspace):
    """A broken function and its failing test, and the words that ask for the repair."""
    (workspace / "helpers.py").write_text(BROKEN)
    (workspace / "test.py").write_text(TEST)
    return (
        "helpers.py has a bug. Fix it, then run test.py to check.\n\n"
        f"```python\n# helpers.py\n{BROKEN}```\n\ntest.py:\n```python\n{TEST[:-1]}\n```"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", help="what to do; default: mend a small broken function")
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="unused")
    parser.add_argument("--model", help="default: the first model served")
    parser.add_argument("--workspace", help="folder to work in; default: a temporary one")
    parser.add_argument("--unconfined", action="store_true", help="run programs as they are: you are in a container")
    options = parser.parse_args()

    client = OpenAI(base_url=options.base_url, api_key=options.api_key)
    model = options.model or client.models.list().data[0].id
    with tempfile.TemporaryDirectory() as temporary:
        workspace = Path(options.workspace or temporary)
        task = options.task or demo_task(workspace)
        try:
            sandbox = Sandbox(workspace, confined=not options.unconfined)
            answer = run_agent(client, model, [{"role": "user", "content": task}], sandbox)
        except (AgentError, SandboxError) as wrong:
            sys.exit(f"agent: {wrong}")
    print(answer)


if __name__ == "__main__":
    main()
