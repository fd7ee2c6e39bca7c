"""Carries out the coding agent's calls in a folder of its own. No more a sandbox than a folder and a time
limit: run it on code of this tiny model only, or inside a container."""

import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

TIMEOUT_SECONDS = 10
TEST_COMMAND = ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=short"]


@contextmanager
def workspace(files):
    """A temporary folder that holds these files."""
    with tempfile.TemporaryDirectory() as folder:
        for path, text in files.items():
            write(folder, path, text)
        yield folder


def write(folder, path, text):
    target = Path(folder, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def execute(folder, name, arguments):
    """What the tool answers."""
    try:
        if name == "file_write":
            write(folder, arguments["path"], arguments["content"])
            return {"ok": True, "path": arguments["path"]}
        if name == "code_exec":
            done = python(folder, ["-c", arguments["code"]])
            return {"stdout": done.stdout, "stderr": done.stderr[-300:], "exit_code": done.returncode}
        if name == "test_runner":
            return summary(python(folder, [*TEST_COMMAND, arguments["test_file"]]))
        return {"error": "unknown tool"}
    except subprocess.TimeoutExpired:
        return {"error": "timed out"}
    except Exception as error:
        return {"error": repr(error)}


def python(folder, arguments):
    paths = [folder, *(f"{folder}/{name}" for name in ("src", "pkg", "app"))]
    environment = dict(os.environ, PYTHONPATH=":".join(paths), PYTHONDONTWRITEBYTECODE="1")
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def summary(done):
    """Passed, failed and the first two errors of a pytest run."""
    passed, failed = (
        int((re.findall(rf"(\d+) {word}", done.stdout) or [0])[-1]) for word in ("passed", "failed")
    )
    errors = [line[2:].strip() for line in done.stdout.splitlines() if line.startswith("E  ")]
    if done.returncode == 0 or failed or errors:
        return {"passed": passed, "failed": failed, "errors": errors[:2]}
    return {"passed": 0, "failed": 1, "errors": [done.stdout[-200:]]}


def passes(folder, test_path):
    result = execute(folder, "test_runner", {"test_file": test_path})
    return result.get("failed") == 0 and result.get("passed", 0) > 0
