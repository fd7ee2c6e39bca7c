"""Source text of the small functions and of their tests, and what a wrong body does."""

import copy
import textwrap
from dataclasses import dataclass

#: A loop of a wrong body that runs longer than this is called endless.
MOST_LOOP_TURNS = 3000


def call_text(name, arguments):
    return f"{name}({', '.join(map(repr, arguments))})"


def function_source(name, argument_names, body):
    body = body.format(**dict(zip("abc", argument_names, strict=False)))
    return f"def {name}({', '.join(argument_names)}):\n" + textwrap.indent(body, "    ") + "\n"


def with_bug(body, bug):
    return body.replace(bug[0], bug[1], 1)


def compiled(source, name, **more):
    """The function that this source defines."""
    namespace = dict(more)
    exec(source, namespace)
    return namespace[name]


@dataclass(frozen=True)
class Failure:
    """A test that a body fails: what it returned, or the text of what it raised."""

    arguments: tuple
    want: object
    got: object
    raised: bool


def first_failure(name, argument_names, body, tests):
    """The first of `tests` ((arguments, wanted), ...) that this body fails, or None."""
    turns = 0

    def turn():
        nonlocal turns
        turns += 1
        if turns > MOST_LOOP_TURNS:
            raise TimeoutError("timed out")
        return True

    source = function_source(name, argument_names, body).replace("while ", "while _turn() and ")
    function = compiled(source, name, _turn=turn)
    for arguments, want in tests:
        turns = 0
        try:
            got = function(*copy.deepcopy(arguments))
        except Exception as error:
            return Failure(arguments, want, f"{type(error).__name__}: {error}", True)
        if got != want or type(got) is not type(want):
            return Failure(arguments, want, got, False)
    return None


def test_source(rng, name, module, tests, style=None):
    """A test file in one of three styles, and the tests it holds."""
    style = style or rng.choice("aabc")
    held = tests[: rng.randint(2, 4)]
    head = f"from {module} import {name}\n\n\n"
    if style == "a":
        lines = "".join(f"    assert {call_text(name, given)} == {want!r}\n" for given, want in held)
        return f"{head}def test_{name}():\n{lines}", held
    if style == "b":
        functions = (
            f"def test_{number}():\n    assert {call_text(name, given)} == {want!r}"
            for number, (given, want) in enumerate(held, 1)
        )
        return head + "\n\n\n".join(functions) + "\n", held
    lines = "".join(f"        self.assertEqual({call_text(name, given)}, {want!r})\n" for given, want in held)
    return f"import unittest\n{head}class Test(unittest.TestCase):\n    def test_{name}(self):\n{lines}", held
