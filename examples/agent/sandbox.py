"""Runs what a model wrote: one workspace folder, no network, bounded time, memory and output.

What must stay true: a path never leaves the workspace; a program never outlives its timeout, nor does anything that it
started; a tool call never raises, whatever its arguments are, but returns a JSON object that the model can read.

Programs are confined by `confine.py` (Landlock and seccomp). It is no defence against faults of the kernel: for code
of people you do not trust, run the whole agent in a container without network or under gVisor as well.
"""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from confine import MAX_FILE_BYTES, MAX_SECONDS

CONFINE = str(Path(__file__).with_name("confine.py"))
MAX_OUTPUT_CHARS = 2000
SOURCE_FOLDERS = ("", "src", "pkg", "app")
PYTEST_OPTIONS = ["-q", "--no-header", "-p", "no:cacheprovider", "--tb=short"]


class SandboxError(Exception):
    """Programs cannot be confined here; the message says why and what to do."""


class Sandbox:
    """The three tools of a coding agent, over one workspace folder."""

    def __init__(self, workspace, confined=True):
        self.workspace = Path(workspace).resolve()
        self.confined = confined
        probe = self._python(["-c", ""], MAX_SECONDS)
        if probe.returncode != 0:
            raise SandboxError(
                f"programs cannot be confined on this machine ({probe.stderr.strip()}); run the agent in a "
                "container without network and give --unconfined"
            )

    def call(self, name, arguments):
        """Runs one tool call; every failure is a value."""
        tools = {"code_exec": self.code_exec, "file_write": self.file_write, "test_runner": self.test_runner}
        if name not in tools:
            return {"error": f"no tool named {name!r}; there are {', '.join(tools)}"}
        if not isinstance(arguments, dict):
            return {"error": f"the arguments of {name} must be a JSON object"}
        try:
            return tools[name](**arguments)
        except subprocess.TimeoutExpired as late:
            return {"error": f"timed out after {late.timeout} s"}
        except (AttributeError, OSError, TypeError, ValueError) as wrong:
            return {"error": str(wrong)}

    def file_write(self, path, content):
        target = self._inside(path)
        if len(content.encode()) > MAX_FILE_BYTES:
            raise ValueError(f"content is longer than {MAX_FILE_BYTES} bytes")
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
            return unittest_summary(self._python(["-m", "unittest", target], MAX_SECONDS))
        if framework == "pytest":
            return pytest_summary(self._python(["-m", "pytest", *PYTEST_OPTIONS, target], MAX_SECONDS))
        raise ValueError(f"framework {framework!r}; there are pytest and unittest")

    def _inside(self, path):
        target = (self.workspace / path).resolve()
        if not target.is_relative_to(self.workspace):
            raise ValueError(f"path {path!r} leaves the workspace; give a relative path")
        return target

    def _python(self, arguments, timeout):
        """Runs Python in the workspace. Output goes to files, whose size the confinement bounds."""
        timeout = min(max(int(timeout), 1), MAX_SECONDS)
        with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                [*self._confinement(scratch), sys.executable, *arguments],
                cwd=self.workspace,
                env=self._environment(scratch),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                status = process.wait(timeout)
            finally:
                # The program has ended or is late; what it started ends with it.
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
            return subprocess.CompletedProcess(arguments, status, text_of(out), text_of(err))

    def _confinement(self, scratch):
        if not self.confined:
            return []
        writable = f"{self.workspace}:{scratch}"
        readable = {sys.prefix, sys.base_prefix, os.path.realpath(sys.executable), *sysconfig.get_paths().values()}
        return [sys.executable, "-I", CONFINE, writable, ":".join(sorted(readable))]

    def _environment(self, scratch):
        return {
            "PATH": os.environ.get("PATH", ""),
            "HOME": scratch,
            "TMPDIR": scratch,
            "PYTHONPATH": os.pathsep.join(str(self.workspace / folder) for folder in SOURCE_FOLDERS),
            "PYTHONDONTWRITEBYTECODE": "1",
        }


def text_of(file):
    file.seek(0)
    return file.read(MAX_FILE_BYTES).decode(errors="replace")


def pytest_summary(done):
    """Passed, failed and the first two errors."""
    counts = {word: (re.findall(rf"(\d+) {word}", done.stdout) or ["0"])[-1] for word in ("passed", "failed")}
    errors = [line[2:].strip() for line in done.stdout.splitlines() if line.startswith("E  ")]
    result = {"passed": int(counts["passed"]), "failed": int(counts["failed"]), "errors": errors[:2]}
    if done.returncode != 0 and not result["failed"]:
        result.update(failed=1, errors=errors[:2] or [(done.stdout + done.stderr)[-200:]])
    return result


def unittest_summary(done):
    """The same of unittest's report, which it writes to standard error."""
    ran = int((re.findall(r"^Ran (\d+) test", done.stderr, re.MULTILINE) or ["0"])[-1])
    failed = sum(int(count) for count in re.findall(r"(?:failures|errors)=(\d+)", done.stderr))
    if done.returncode != 0:
        failed = max(failed, 1)
    errors = [line for line in done.stderr.splitlines() if re.match(r"\w+(Error|Exception)\b", line)]
    return {"passed": max(ran - failed, 0), "failed": failed, "errors": errors[:2]}
