"""Runs what a model wrote: one workspace folder, no network, bounded time, memory and output.

What must stay true: a path never leaves the workspace; a program never outlives its timeout; a tool call never
raises, whatever its arguments are, but returns a JSON object that the model can read.

This is isolation enough for an example. For code of people you do not trust, run the whole agent in a container
without network (docker run --network none) or under gVisor.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

MAX_SECONDS = 30
MAX_MEMORY_BYTES = 1 << 30
MAX_FILE_BYTES = 1 << 20
MAX_OUTPUT_CHARS = 2000
SOURCE_FOLDERS = ("", "src", "pkg", "app")


def _limit_process():
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))


def _network_wrapper():
    """A command prefix that gives the program a network namespace of its own, where the system allows it."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return []
    prefix = [unshare, "--map-root-user", "--net"]
    allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    return prefix if allowed else []


class Sandbox:
    """The three tools of a coding agent, over one workspace folder."""

    def __init__(self, workspace):
        self.workspace = Path(workspace).resolve()
        self._prefix = _network_wrapper()

    def call(self, name, arguments):
        """Runs one tool call; every failure is a value."""
        tools = {"code_exec": self.code_exec, "file_write": self.file_write, "test_runner": self.test_runner}
        if name not in tools:
            return {"error": f"no tool named {name!r}; there are {', '.join(tools)}"}
        try:
            return tools[name](**arguments)
        except subprocess.TimeoutExpired as late:
            return {"error": f"timed out after {late.timeout} s"}
        except (OSError, TypeError, ValueError) as wrong:
            return {"error": str(wrong)}

    def file_write(self, path, content):
        target = self._inside(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
        return {"ok": True, "path": path}

    def code_exec(self, code, timeout=MAX_SECONDS):
        done = self._python(["-c", code], timeout)
        return {
            "stdout": done.stdout[-MAX_OUTPUT_CHARS:],
            "stderr": done.stderr[-MAX_OUTPUT_CHARS:],
            "exit_code": done.returncode,
        }

    def test_runner(self, test_file, framework="pytest"):
        target = str(self._inside(test_file).relative_to(self.workspace))
        if framework == "unittest":
            done = self._python(["-m", "unittest", target], MAX_SECONDS)
            return {"passed": int(done.returncode == 0), "failed": int(done.returncode != 0), "errors": []}
        options = ["-q", "--no-header", "-p", "no:cacheprovider", "--tb=short"]
        done = self._python(["-m", "pytest", *options, target], MAX_SECONDS)
        counts = {word: (re.findall(rf"(\d+) {word}", done.stdout) or ["0"])[-1] for word in ("passed", "failed")}
        errors = [line[2:].strip() for line in done.stdout.splitlines() if line.startswith("E  ")]
        result = {"passed": int(counts["passed"]), "failed": int(counts["failed"]), "errors": errors[:2]}
        if done.returncode != 0 and not result["failed"]:
            result.update(failed=1, errors=errors[:2] or [done.stdout[-200:]])
        return result

    def _inside(self, path):
        target = (self.workspace / path).resolve()
        if not target.is_relative_to(self.workspace):
            raise ValueError(f"path {path!r} leaves the workspace; give a relative path")
        return target

    def _python(self, arguments, timeout):
        folders = os.pathsep.join(str(self.workspace / folder) for folder in SOURCE_FOLDERS)
        return subprocess.run(
            [*self._prefix, sys.executable, *arguments],
            cwd=self.workspace,
            env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": folders, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=min(max(int(timeout), 1), MAX_SECONDS),
            preexec_fn=_limit_process,
            check=False,
        )
