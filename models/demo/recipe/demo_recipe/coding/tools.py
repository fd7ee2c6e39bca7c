"""The three tools of a coding agent, and what they answer."""

import json

from demo_recipe.coding.source import call_text


def tool(name, description, properties, required):
    parameters = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


CODE_EXEC = tool(
    "code_exec",
    "Execute Python code in a sandboxed environment and return stdout, stderr, and exit code.",
    {
        "code": {"type": "string", "description": "Python code to execute"},
        "timeout": {"type": "integer", "description": "Execution timeout in seconds", "default": 30},
    },
    ["code"],
)
FILE_WRITE = tool(
    "file_write",
    "Write content to a file, creating parent directories as needed.",
    {
        "path": {"type": "string", "description": "Relative file path"},
        "content": {"type": "string", "description": "File content to write"},
    },
    ["path", "content"],
)
TEST_RUNNER = tool(
    "test_runner",
    "Run the test suite and return a summary of passes, failures, and error messages.",
    {
        "test_file": {"type": "string", "description": "Path to the test file to run"},
        "framework": {"type": "string", "enum": ["pytest", "unittest"], "default": "pytest"},
    },
    ["test_file"],
)
TOOLS = [CODE_EXEC, FILE_WRITE, TEST_RUNNER]


def written(rng, path, text):
    """One of the ways in which a file_write tool says that all went well."""
    return rng.choice(
        [
            lambda: {"ok": True},
            lambda: {"ok": True, "path": path},
            lambda: {"status": "written", "path": path, "bytes": len(text)},
            lambda: {"success": True},
            lambda: {"path": path, "bytes_written": len(text)},
            lambda: {"result": "ok"},
            lambda: {"written": path},
        ]
    )()


def all_passed(rng, tests):
    """One of the ways in which a test_runner says that all tests pass."""
    return rng.choice(
        [
            lambda: {"passed": tests, "failed": 0},
            lambda: {"passed": tests, "failed": 0, "errors": []},
            lambda: {"summary": f"{tests} passed"},
            lambda: {"exit_code": 0, "stdout": f"{tests} passed in 0.0{rng.randint(1, 9)}s", "stderr": ""},
            lambda: {"passed": tests, "failed": 0, "output": f"{tests} passed"},
            lambda: {"success": True, "summary": f"{tests} passed, 0 failed"},
            lambda: {"status": "passed", "tests": tests, "failures": 0},
        ]
    )()


def some_failed(rng, tests, name, failure):
    """One of the ways in which a test_runner reports this failure."""
    want, got, call = failure.want, failure.got, call_text(name, failure.arguments)
    message = (
        got
        if failure.raised
        else rng.choice(
            [
                f"assert {got!r} == {want!r}",
                f"AssertionError: assert {got!r} == {want!r}",
                f"assert {call} == {want!r}",
                f"E       assert {got!r} == {want!r}\nE        +  where {got!r} = {call}",
                f"AssertionError: {got!r} != {want!r}",
            ]
        )
    )
    passed = rng.randint(0, max(0, tests - 1))
    failed = tests - passed
    return rng.choice(
        [
            lambda: {"passed": passed, "failed": failed, "output": message},
            lambda: {"passed": passed, "failed": failed, "errors": [message]},
            lambda: {"summary": f"{failed} failed, {passed} passed", "failures": [message]},
            lambda: {
                "exit_code": 1,
                "stdout": f"{message}\n{failed} failed, {passed} passed in 0.0{rng.randint(1, 9)}s",
                "stderr": "",
            },
            lambda: {"success": False, "output": message},
            lambda: {"status": "failed", "message": message},
        ]
    )()


def assistant(thought, content, *calls):
    """An assistant's turn; `calls` are (tool, arguments)."""
    message = {"role": "assistant", "reasoning_content": thought, "content": content}
    if calls:
        message["tool_calls"] = [
            {"function": {"name": name, "arguments": arguments}} for name, arguments in calls
        ]
    return message


def tool_result(rng, result):
    """A tool's turn: mostly JSON, now and then the bare output."""
    text = json.dumps(result)
    if rng.random() >= 0.92:
        text = result.get("output") or result.get("summary") or text
    return {"role": "tool", "content": text}
