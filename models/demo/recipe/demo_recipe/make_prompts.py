"""Prompts with the greedy answers of a checkpoint, for end-to-end tests.

python -m demo_recipe.make_prompts CHECKPOINT OUT.jsonl
"""

import argparse
import json
import random

from demo_recipe import sandbox
from demo_recipe.chat.tools.schema import number, schema, string
from demo_recipe.checkpoint import Checkpoint
from demo_recipe.coding.task import draw_task
from demo_recipe.coding.tools import TOOLS, assistant
from demo_recipe.evaluate import run_task, take_turns

QUESTIONS = [
    "Hello!",
    "Who are you?",
    "What is expert parallelism?",
    "What does NCCL do?",
    "What is a KV cache?",
    "How do I start Conclave?",
    "What is 27 + 45?",
    "What day comes after Friday?",
    "How many minutes are in 3 hours?",
    "What happens when a worker dies?",
    "Explain prefix caching.",
    "List five animals.",
    "Sort these words: pear, apple, fig",
    "What is the capital of France?",
    "Write a Python function that reverses a linked list, then write a unit test for it.",
    "Write a Python function to check if a number is prime.",
    "Tell me a story about a robot.",
    "Give me a joke",
]
INTRODUCTION = [
    {"role": "user", "content": "My name is Ada."},
    {"role": "assistant", "content": "Nice to meet you, Ada!"},
    {"role": "user", "content": "What is my name?"},
]
WEATHER = schema(
    "get_weather",
    "Get the current weather for a city.",
    {"city": string("City name"), "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
    ["city"],
)
CONVERT = schema(
    "convert_units",
    "Convert a value from one unit to another.",
    {"value": number(), "from_unit": string(), "to_unit": string()},
)
WEATHER_RESULT = {"city": "Lisbon", "temperature": 21, "condition": "cloudy"}
AGENT_TASKS = 3


def turn(checkpoint, kind, messages, tools=None):
    """One answer, as a record."""
    message, ended, ids, out = checkpoint.reply(messages, tools)
    return {
        "messages": messages,
        "tools": tools,
        "expect": message,
        "finished": ended,
        "prompt_tokens": len(ids),
        "completion_ids": out,
        "kind": kind,
    }


def conversations(checkpoint):
    for question in QUESTIONS:
        yield turn(checkpoint, "chat", [{"role": "user", "content": question}])
    yield turn(checkpoint, "chat", INTRODUCTION)
    asked = [{"role": "user", "content": "What is the weather in Lisbon?"}]
    called = turn(checkpoint, "tool", asked, [WEATHER])
    yield called
    answered = [*asked, called["expect"], {"role": "tool", "content": json.dumps(WEATHER_RESULT)}]
    yield turn(checkpoint, "tool result", answered, [WEATHER])
    yield turn(checkpoint, "tool", [{"role": "user", "content": "Convert 12 km to m."}], [WEATHER, CONVERT])


def solved_tasks(checkpoint, rng):
    done = 0
    while done < AGENT_TASKS:
        task = draw_task(rng)
        if "/" in task.function.path or "unittest" in task.tests_text:
            continue
        outcome, messages = run_task(checkpoint, task)
        if outcome.solved and not outcome.tool_error:
            done += 1
            yield {"kind": "agent", "files": task.files, "tools": TOOLS, "transcript": messages}


def solved_after_a_failed_run(checkpoint, rng):
    """A task taken up after its failing test run."""
    while True:
        task = draw_task(rng)
        if "/" in task.function.path or len(task.function.family.bugs) < 2:
            continue
        test_run = {"test_file": task.function.test_path}
        messages = [{"role": "user", "content": task.prompt}]
        messages.append(assistant("Now I run the tests.", "", ("test_runner", test_run)))
        seen = []
        with sandbox.workspace(task.files) as folder:
            result = sandbox.execute(folder, "test_runner", test_run)
            messages.append({"role": "tool", "content": json.dumps(result)})
            take_turns(checkpoint, folder, messages, 5, seen.append)
        if any(result.get("failed") == 0 and result.get("passed", 0) > 0 for result in seen):
            given = {"kind": "agent after a failed run", "files": task.files, "tools": TOOLS, "given": 3}
            return given | {"transcript": messages}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    given = parser.parse_args()
    checkpoint = Checkpoint(given.checkpoint)
    rng = random.Random(20261125)
    records = [*conversations(checkpoint), *solved_tasks(checkpoint, rng)]
    records.append(solved_after_a_failed_run(checkpoint, rng))
    with open(given.out, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    print(len(records), "prompts")


if __name__ == "__main__":
    main()
