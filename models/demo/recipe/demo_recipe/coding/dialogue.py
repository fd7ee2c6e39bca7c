"""Conversations in which an agent mends or writes a function with tools, sometimes on the second try."""

from demo_recipe.coding import tools
from demo_recipe.coding.source import call_text, function_source, test_source, with_bug
from demo_recipe.coding.task import draw_function, request
from demo_recipe.coding.tools import assistant, tool_result

SYSTEMS = [
    "You are a coding agent. Fix the code and run the tests.",
    "You are a helpful coding assistant with tools.",
    "You repair Python code. Use the tools.",
    "You are a software engineer. Keep answers short.",
]


def agent(rng, family=None):
    """A whole solved task: {"messages", "tools"}."""
    function = draw_function(rng, family)
    tests_text, tests = test_source(rng, function.name, function.module, function.tests)
    bugs = [bug for bug in function.family.bugs if function.failure(bug, tests)]
    if not bugs:
        return agent(rng)
    return Dialogue(rng, function, tests_text, tests, bugs).run()


class Dialogue:
    """One conversation while it is written."""

    def __init__(self, rng, function, tests_text, tests, bugs):
        self.rng, self.function, self.tests_text, self.tests, self.bugs = (
            rng,
            function,
            tests_text,
            tests,
            bugs,
        )
        self.bug = rng.choice(bugs)
        self.broken = function.broken_by(self.bug)
        #: What is wrong, in words: of the user's file, later of the agent's own first try.
        self.reason = self.bug[2]
        self.missing = rng.random() < 0.15
        self.tools = self.offered()
        framework = "unittest" if "unittest" in tests_text else "pytest"
        self.run_arguments = {"test_file": function.test_path}
        if rng.random() >= 0.7:
            self.run_arguments["framework"] = framework
        self.messages = []

    def offered(self):
        x = self.rng.random()
        if x > 0.8:
            return [tools.FILE_WRITE, tools.TEST_RUNNER]
        return self.rng.sample(tools.TOOLS, 3) if x > 0.7 else tools.TOOLS

    def run(self):
        rng, function = self.rng, self.function
        if rng.random() < 0.3:
            self.messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
        wish = request(rng, function, self.broken, self.tests_text, self.missing)
        self.messages.append({"role": "user", "content": wish})
        plans = [["wrong", "good"], ["good"], ["good"], ["good"], ["wrong", "good"]]
        plan = rng.choice(plans) if rng.random() < 0.9 else ["look", "good"]
        if plan[0] == "look":
            plan = ["good"]
            if tools.CODE_EXEC in self.tools and not self.missing:
                self.look()
        failure = self.wrong_try() if plan[0] == "wrong" else None
        self.good_try(failure)
        self.close()
        return {"messages": self.messages, "tools": self.tools}

    def look(self):
        """Runs the broken function once."""
        failure = self.function.failure(self.bug, self.tests)
        code = self.broken + f"\nprint({call_text(self.function.name, failure.arguments)})"
        thought = "Let me run the function once to see what it returns."
        self.messages.append(assistant(thought, "", ("code_exec", {"code": code})))
        result = {
            "stdout": "" if failure.raised else f"{failure.got!r}\n",
            "stderr": failure.got if failure.raised else "",
            "exit_code": 1 if failure.raised else 0,
        }
        self.messages.append(tool_result(self.rng, result))

    def wrong_try(self):
        """Writes another bug, without loss, and sees the tests fail. Gives the failure or None."""
        rng, function = self.rng, self.function
        others = self.bugs if self.missing else [bug for bug in self.bugs if bug is not self.bug]
        if not others:
            return None
        bug = rng.choice(others)
        body = with_bug(function.family.body, bug)
        text = function_source(function.name, function.argument_names, body)
        thought = rng.choice(
            [
                f"The function should {function.family.what}. I will write a corrected version.",
                f"I will rewrite {function.name}.",
                f"{function.name} should {function.family.what}.",
            ]
        )
        content = rng.choice(["", "", f"I will rewrite `{function.name}`."])
        call = ("file_write", {"path": function.path, "content": text})
        self.messages.append(assistant(thought, content, call) | {"noloss": True})
        self.messages.append(tool_result(rng, tools.written(rng, function.path, text)))
        failure = function.failure(bug, self.tests)
        result = tools.some_failed(rng, len(self.tests), function.name, failure)
        self.messages.append(assistant("Now I run the tests.", "", ("test_runner", dict(self.run_arguments))))
        self.messages.append(tool_result(rng, result))
        self.reason = bug[2]
        return failure

    def good_try(self, failure):
        """Writes the right file and sees the tests pass."""
        rng, function = self.rng, self.function
        thought = self.thought_before_writing(failure)
        content = rng.choice(["", "", "", f"I will fix `{function.name}`."])
        call = ("file_write", {"path": function.path, "content": function.source})
        self.messages.append(assistant(thought, content, call))
        self.messages.append(tool_result(rng, tools.written(rng, function.path, function.source)))
        thought = rng.choice(
            ["Now I run the tests.", "The file is written. I run the tests.", "Next, run the tests."]
        )
        self.messages.append(assistant(thought, "", ("test_runner", dict(self.run_arguments))))
        self.messages.append(tool_result(rng, tools.all_passed(rng, len(self.tests))))

    def thought_before_writing(self, failure):
        rng, name, what, reason = self.rng, self.function.name, self.function.family.what, self.reason
        if failure:
            call = call_text(name, failure.arguments)
            return rng.choice(
                [
                    f"The test fails: {call} should be {failure.want!r}. The mistake: {reason}. I fix that.",
                    f"{call} must give {failure.want!r}. In my version {reason}.",
                    f"The failure shows that {reason}. I correct it.",
                ]
            )
        if self.missing:
            return rng.choice([f"{name} should {what}.", f"I write {name} from scratch: it should {what}."])
        return rng.choice(
            [
                f"The bug: {reason}. I will write the corrected file.",
                f"It should {what}, but {reason}.",
                f"{reason[0].upper() + reason[1:]}. I fix that and run the tests.",
            ]
        )

    def close(self):
        rng, function, count = self.rng, self.function, len(self.tests)
        name, path, what = function.name, function.path, function.family.what
        thought = rng.choice(["All tests pass. I am done.", "The tests pass.", ""])
        if self.missing:
            answers = [
                f"I wrote `{name}` in {path}. All {count} tests pass.",
                f"`{name}` is in {path}, and the tests in {function.test_path} pass.",
            ]
        else:
            answers = [
                f"I fixed `{name}` in {path}: {self.reason}. All tests pass now.",
                f"`{name}` now works: it should {what}. All {count} tests pass.",
                f"Done. The bug was that {self.reason}. The tests in {function.test_path} pass.",
                f"The function `{name}` is fixed and all {count} tests pass.",
            ]
        self.messages.append(assistant(thought, rng.choice(answers)))
        if rng.random() < 0.1:
            thanks = rng.choice(["Thanks!", "thank you", "Great, thanks."])
            self.messages.append({"role": "user", "content": thanks})
            self.messages.append(assistant("", "You are welcome!"))
