"""Solves coding tasks with an exported checkpoint, and shows its answers to some questions.

python -m demo_recipe.evaluate CHECKPOINT [--tasks 40]
"""

import argparse
import json
import random
from dataclasses import dataclass

import torch

from demo_recipe import sandbox
from demo_recipe.checkpoint import Checkpoint
from demo_recipe.coding.task import draw_task
from demo_recipe.coding.tools import TOOLS

QUESTIONS = [
    "Hello!",
    "Who are you?",
    "What is expert parallelism?",
    "what is 27 + 45?",
    "What is the capital of France?",
    "Write a Python function that reverses a linked list, then write a unit test for it.",
    "Tell me a story about a dragon.",
    "Sort these words: pear, apple, fig",
    "What does NCCL do?",
    "How do I start Conclave?",
    "Write a Python function to check if a number is prime.",
    "List three fruits.",
    "What day comes after Tuesday?",
    "Reply in JSON with name and age of Bob who is 41.",
]


@dataclass
class Outcome:
    solved: bool = False
    #: A test run failed on the way.
    failed: bool = False
    #: A tool answered with an error of its own.
    tool_error: bool = False

    def note(self, result):
        self.failed |= result.get("failed", 0) > 0
        self.tool_error |= "error" in result


def take_turns(checkpoint, folder, messages, turns, note=lambda result: None):
    """Lets the model act until it answers without a call; extends `messages`."""
    for _ in range(turns):
        message, *_ = checkpoint.reply(messages, TOOLS)
        messages.append(message)
        if not message.get("tool_calls"):
            break
        for call in message["tool_calls"]:
            function = call["function"]
            result = sandbox.execute(folder, function["name"], function["arguments"])
            note(result)
            messages.append({"role": "tool", "content": json.dumps(result)})


def run_task(checkpoint, task, turns=5):
    """(outcome, messages)"""
    outcome, messages = Outcome(), [{"role": "user", "content": task.prompt}]
    with sandbox.workspace(task.files) as folder:
        take_turns(checkpoint, folder, messages, turns, outcome.note)
        outcome.solved = sandbox.passes(folder, task.function.test_path)
    return outcome, messages


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--tasks", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(2)
    checkpoint = Checkpoint(given.checkpoint)
    rng = random.Random(424242)
    solved = recovered = tool_errors = answered = 0
    for _ in range(given.tasks):
        task = draw_task(rng)
        outcome, messages = run_task(checkpoint, task)
        solved += outcome.solved
        recovered += outcome.solved and outcome.failed
        tool_errors += outcome.tool_error
        answered += messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
        if not outcome.solved:
            print("  unsolved", task.function.family.name, str(messages[1:])[:700])
    print(
        f"agent tasks solved {solved}/{given.tasks}, of them after a failed run {recovered}, "
        f"with a tool error {tool_errors}, ended with an answer {answered}"
    )
    for question in QUESTIONS:
        message, ended, *_ = checkpoint.reply([{"role": "user", "content": question}])
        end = "" if ended else "[no end]"
        print("Q", question, "| T", message["reasoning_content"], "| A", message["content"], end)


if __name__ == "__main__":
    main()
