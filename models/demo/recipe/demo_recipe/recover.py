"""Share of tasks repaired when the history holds a scripted wrong attempt and its failing test.

python -m demo_recipe.recover CHECKPOINT TASKS
"""

import argparse
import json
import random

from demo_recipe import sandbox
from demo_recipe.checkpoint import Checkpoint
from demo_recipe.coding.task import draw_task
from demo_recipe.coding.tools import assistant
from demo_recipe.evaluate import take_turns


def other_attempts(task):
    """The same function with each of its other bugs."""
    texts = [task.function.broken_by(bug) for bug in task.function.family.bugs]
    return [text for text in texts if text != task.broken]


def history(task, wrong, result):
    """The task, the wrong attempt and its test run."""
    path, test_path = task.function.path, task.function.test_path
    return [
        {"role": "user", "content": task.prompt},
        assistant("I will rewrite it.", "", ("file_write", {"path": path, "content": wrong})),
        {"role": "tool", "content": '{"ok": true}'},
        assistant("Now I run the tests.", "", ("test_runner", {"test_file": test_path})),
        {"role": "tool", "content": json.dumps(result)},
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("tasks", type=int)
    given = parser.parse_args()
    checkpoint = Checkpoint(given.checkpoint)
    rng = random.Random(5150)
    repaired = tried = 0
    while tried < given.tasks:
        task = draw_task(rng)
        attempts = other_attempts(task)
        if not attempts:
            continue
        wrong = rng.choice(attempts)
        with sandbox.workspace(task.files | {task.function.path: wrong}) as folder:
            test_path = task.function.test_path
            result = sandbox.execute(folder, "test_runner", {"test_file": test_path})
            if not result.get("failed"):
                continue
            tried += 1
            take_turns(checkpoint, folder, history(task, wrong, result), turns=4)
            repaired += sandbox.execute(folder, "test_runner", {"test_file": test_path}).get("failed") == 0
    print(f"repaired after a scripted wrong attempt {repaired}/{tried}")


if __name__ == "__main__":
    main()
