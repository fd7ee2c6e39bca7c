"""A function to write or to mend: drawn from a family, with names, a file, a test file and tests."""

import copy
from dataclasses import dataclass

from demo_recipe.coding.families import FAMILIES
from demo_recipe.coding.families.common import Family
from demo_recipe.coding.source import compiled, first_failure, function_source, test_source, with_bug

MODULES = "utils helpers solution main tools lib core mathutils ops code app work".split()
FOLDERS = ["", "", "", "src/", "pkg/", "app/"]

REQUESTS = [
    "The function {fn} in {path} is broken: it should {what}. Fix it so that {test} passes.",
    "Fix the bug in {path} so that {test} passes.",
    "{fn} should {what}, but the tests fail. Please repair it.",
    "My test {test} fails. Find the bug in {path} and fix it.",
    "Repair {fn} in {path}. It should {what}.",
    "There is a bug in {fn}. It should {what}. Fix the file {path} and run {test}.",
    "please fix {path}, the tests in {test} fail",
    "Make {test} pass by fixing {path}.",
    "This function is wrong: it should {what}. Correct it and run the tests.",
    "{path} has a bug. Fix it, then run {test} to check.",
    "The following function should {what}, but it does not. Fix it.",
    "Fix this function and verify it with the tests.",
]
REQUESTS_TO_WRITE = [
    "Write a function {fn} in {path} that should {what}. The tests in {test} must pass.",
    "Implement {fn} in {path}: it should {what}. Run {test} to check.",
    "Create {path} with a function {fn}. It should {what}. Make {test} pass.",
    "{fn} is missing. Add it to {path}; it should {what}. Then run {test}.",
]
FILE_SHOWN = [
    "{p}:\n```python\n{s}```",
    "Here is {p}:\n```python\n{s}```",
    "File {p}:\n```python\n{s}```",
    "```python\n# {p}\n{s}```",
]
TEST_SHOWN = [
    "{p}:\n```python\n{s}```",
    "Test file {p}:\n```python\n{s}```",
    "The test, {p}:\n```python\n{s}```",
    "```python\n# {p}\n{s}```",
]


@dataclass(frozen=True)
class Function:
    """A family's function under names of its own."""

    family: Family
    name: str
    argument_names: list
    module: str
    path: str
    test_path: str
    #: The right source.
    source: str
    #: (arguments, wanted), up to five.
    tests: list

    def broken_by(self, bug):
        return function_source(self.name, self.argument_names, with_bug(self.family.body, bug))

    def failure(self, bug, tests):
        """The first of `tests` that fails with this bug, or None."""
        return first_failure(self.name, self.argument_names, with_bug(self.family.body, bug), tests)


def draw_function(rng, family=None):
    family = family or rng.choice(FAMILIES)
    name = rng.choice(family.names + family.names[:1] * 2)
    argument_names = []
    for choices in family.args:
        argument_names.append(rng.choice([choice for choice in choices if choice not in argument_names]))
    if rng.random() < 0.15:
        name = rng.choice(["my_", "do_", "get_"]) + name
    module = rng.choice([name, family.name, *MODULES])
    path = rng.choice(FOLDERS) + module + ".py"
    test_path = rng.choice([f"test_{module}.py", f"tests/test_{module}.py", f"test_{name}.py", "test.py"])
    source = function_source(name, argument_names, family.body)
    tests = draw_tests(rng, family, compiled(source, name))
    return Function(family, name, argument_names, module, path, test_path, source, tests)


def draw_tests(rng, family, function, most=5, tries=30):
    tests, seen = [], set()
    for _ in range(tries):
        arguments = family.inputs(rng)
        if repr(arguments) in seen:
            continue
        seen.add(repr(arguments))
        try:
            tests.append((arguments, function(*copy.deepcopy(arguments))))
        except Exception:
            continue  # these arguments are not for this function
        if len(tests) >= most:
            break
    return tests


def request(rng, function, broken, tests_text, missing=False):
    """What a user writes: the wish, the broken file (unless it is missing) and the test file."""
    text = rng.choice(REQUESTS_TO_WRITE if missing else REQUESTS)
    shown_name = rng.choice([function.name, function.name, f"`{function.name}`"])
    text = text.format(fn=shown_name, path=function.path, test=function.test_path, what=function.family.what)
    parts = [] if missing else [rng.choice(FILE_SHOWN).format(p=function.path, s=broken)]
    parts.append(rng.choice(TEST_SHOWN).format(p=function.test_path, s=tests_text))
    if rng.random() < 0.15:
        parts.reverse()
    return "\n\n".join([text, *parts])


@dataclass(frozen=True)
class Task:
    """A broken file whose test fails, as the evaluation gives it to a model."""

    function: Function
    broken: str
    tests_text: str
    prompt: str

    @property
    def files(self):
        return {self.function.path: self.broken, self.function.test_path: self.tests_text}


def draw_task(rng, family=None):
    while True:
        function = draw_function(rng, family)
        tests_text, tests = test_source(rng, function.name, function.module, function.tests)
        bugs = [bug for bug in function.family.bugs if function.failure(bug, tests)]
        if not bugs:
            continue
        broken = function.broken_by(rng.choice(bugs))
        return Task(function, broken, tests_text, request(rng, function, broken, tests_text))
