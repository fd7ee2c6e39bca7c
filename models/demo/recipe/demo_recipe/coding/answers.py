"""Single-turn code answers: write, run in the head, review, explain; and plain code to continue."""

from demo_recipe.coding.source import call_text, test_source
from demo_recipe.coding.task import draw_function
from demo_recipe.coding.tools import assistant


def question_and_answer(question, thought, answer):
    return {"messages": [{"role": "user", "content": question}, assistant(thought, answer)], "tools": None}


def code(rng, family=None):
    function = draw_function(rng, family)
    x = rng.random()
    if x < 0.45:
        return write(rng, function)
    if x < 0.65:
        return predict(rng, function)
    return review(rng, function) if x < 0.85 else explain(rng, function)


def write(rng, function):
    what, name = function.family.what, function.name
    with_test = rng.random() < 0.5
    question = rng.choice(
        [
            "Write a Python function that should {w}.",
            "Write a function {fn} in Python. It should {w}.",
            "Python function to {w}, please.",
            "Can you write {fn}? It should {w}.",
            "Implement {fn} in Python: {w}.",
            "write python code to {w}",
            "Give me a Python function named {fn} to {w}.",
        ]
    ).format(w=what, fn=name)
    if with_test:
        question = question.rstrip(".,?") + rng.choice(
            [
                ", then write a unit test for it.",
                ". Then write a unit test for it.",
                " and a unit test.",
                ", with a test.",
            ]
        )
    tests_text = test_source(rng, name, function.module, function.tests, "a")[0]
    answer = f"```python\n{function.source}```"
    if with_test:
        answer += f"\n\nUnit test:\n\n```python\n{tests_text}```"
    else:
        arguments, want = function.tests[0]
        answer += rng.choice(["", "", f"\n\nExample: `{call_text(name, arguments)}` gives `{want!r}`."])
    thought = rng.choice([f"The function should {what}.", f"I write {name} and show it.", ""])
    return question_and_answer(question, thought, answer)


def predict(rng, function):
    arguments, want = rng.choice(function.tests)
    call = call_text(function.name, arguments)
    question = rng.choice(
        [
            "What does this function return for {c}?\n```python\n{s}```",
            "```python\n{s}```\nWhat is {c}?",
            "Given\n```python\n{s}```\nwhat does `{c}` give?",
        ]
    ).format(c=call, s=function.source)
    return question_and_answer(
        question, f"The function will {function.family.what}.", f"`{call}` gives `{want!r}`."
    )


def review(rng, function):
    what, bug = function.family.what, rng.choice(function.family.bugs)
    question = rng.choice(
        [
            "What is wrong with this function? It should {w}.\n```python\n{s}```",
            "Find the bug. It should {w}.\n```python\n{s}```",
            "Fix this code, it should {w}:\n```python\n{s}```",
            "Review this function:\n```python\n{s}```\nIt should {w}.",
        ]
    ).format(w=what, s=function.broken_by(bug))
    answer = f"The bug: {bug[2]}. Corrected:\n\n```python\n{function.source}```"
    return question_and_answer(question, f"It should {what}, but {bug[2]}.", answer)


def explain(rng, function):
    what, name = function.family.what, function.name
    question = rng.choice(
        [
            "What does this function do?\n```python\n{s}```",
            "Explain this code:\n```python\n{s}```",
            "```python\n{s}```\nWhat is this for?",
        ]
    ).format(s=function.source)
    answer = rng.choice([f"`{name}` is meant to {what}.", f"The function `{name}` is there to {what}."])
    return question_and_answer(question, "", answer)


LINKED_LIST = """class Node:
    def __init__(self, value, next=None):
        self.value = value
        self.next = next


def reverse_linked_list(head):
    previous = None
    while head:
        head.next, previous, head = previous, head, head.next
    return previous
"""
LINKED_LIST_TEST = """import unittest


class TestReverse(unittest.TestCase):
    def test_three_nodes(self):
        head = reverse_linked_list(Node(1, Node(2, Node(3))))
        self.assertEqual([head.value, head.next.value, head.next.next.value], [3, 2, 1])

    def test_empty(self):
        self.assertIsNone(reverse_linked_list(None))


if __name__ == "__main__":
    unittest.main()
"""


def linked_list(rng):
    """The one that every guide asks first."""
    question = rng.choice(
        [
            "Write a Python function that reverses a linked list, then write a unit test for it.",
            "write a function to reverse a linked list in python",
            "Reverse a linked list in Python, with a unit test.",
            "Implement reverse_linked_list in Python.",
            "How do I reverse a linked list in Python?",
            "Write a Python function that reverses a linked list.",
        ]
    )
    thought = rng.choice(
        [
            "I walk through the list and turn every next pointer around.",
            "Keep a previous node and turn each pointer around.",
        ]
    )
    answer = f"Here is the function:\n\n```python\n{LINKED_LIST}```"
    if "test" in question or rng.random() < 0.3:
        answer += f"\n\nAnd a unit test:\n\n```python\n{LINKED_LIST_TEST}```"
    return question_and_answer(question, thought, answer)


def plain_code(rng):
    """Some functions of one file, most with a docstring, some with a test."""
    pieces = []
    for _ in range(rng.randint(1, 4)):
        function = draw_function(rng)
        head, body = function.source.split("\n", 1)
        what = function.family.what
        docstring = f'    """{what[0].upper() + what[1:]}."""\n' if rng.random() < 0.7 else ""
        piece = f"{head}\n{docstring}{body}"
        if rng.random() >= 0.7:
            tests_text = test_source(rng, function.name, function.module, function.tests, "a")[0]
            piece += "\n\n" + tests_text.split("\n\n\n", 1)[1]
        pieces.append(piece)
    return "\n\n".join(pieces)
