"""What a program that a model wrote can and cannot do."""

import os
import socket
import time

import pytest

from sandbox import Sandbox, SandboxError


@pytest.fixture
def box(tmp_path):
    try:
        return Sandbox(tmp_path)
    except SandboxError as refused:
        assert "--unconfined" in str(refused)
        pytest.skip(str(refused))


def run(box, code, **options):
    return box.call("code_exec", {"code": code, **options})


def test_it_computes_and_writes_in_its_folder(box):
    done = run(box, "open('a', 'w').write('x'); import asyncio, tempfile; tempfile.TemporaryFile(); print(open('a').read())")
    assert done == {"stdout": "x\n", "stderr": "", "exit_code": 0}


def test_no_network(box):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = run(box, f"import socket; socket.create_connection(('127.0.0.1', {port}))")
    assert done["exit_code"] == 1 and "PermissionError" in done["stderr"]
    done = run(box, "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import socket; socket.socket()'], check=True)")
    assert "PermissionError" in done["stderr"]


def test_no_file_outside(box, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.write_text("secret")
    for code in [f"open({str(outside)!r}).read()", f"open({str(outside)!r}, 'w')", f"import os; os.remove({str(outside)!r})"]:
        assert "PermissionError" in run(box, code)["stderr"], code
    assert outside.read_text() == "secret"
    os.symlink(outside, tmp_path / "link")
    for path in ["link", "../x", "/etc/x"]:
        assert "leaves the workspace" in box.call("file_write", {"path": path, "content": "x"})["error"]


def test_time_is_bounded_and_nothing_is_left_running(box, tmp_path):
    started = time.monotonic()
    code = "import os, time\nif os.fork() == 0:\n    time.sleep(4)\n    open('late', 'w')\nelse:\n    while True: pass"
    assert run(box, code, timeout=1) == {"error": "timed out after 1 s"}
    assert time.monotonic() - started < 20
    time.sleep(5)
    assert not (tmp_path / "late").exists()
    assert "PermissionError" in run(box, "import os\nif os.fork() == 0: os.setsid()")["stderr"]


def test_memory_files_and_output_are_bounded(box):
    assert "MemoryError" in run(box, "bytearray(4 << 30)")["stderr"]
    assert "File too large" in run(box, "open('big', 'wb').write(bytes(2 << 20))")["stderr"]
    assert len(run(box, "print('a' * 100_000)")["stdout"]) <= 2000
    assert "longer than" in box.call("file_write", {"path": "big", "content": "a" * (2 << 20)})["error"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("file_write", []),
        ("file_write", {}),
        ("file_write", {"path": 3, "content": "x"}),
        ("file_write", {"path": "a", "content": 3}),
        ("code_exec", {"code": 3}),
        ("code_exec", {"code": "1", "timeout": "long"}),
        ("test_runner", {"test_file": "t.py", "framework": "nose"}),
        ("rm", {}),
    ],
)
def test_bad_calls_are_answered(box, name, arguments):
    assert isinstance(box.call(name, arguments)["error"], str)


def test_both_test_frameworks_count(box):
    box.call("file_write", {"path": "p.py", "content": "def test_a(): assert 1 == 1\ndef test_b(): assert 1 == 2\n"})
    assert box.call("test_runner", {"test_file": "p.py"}) == {"passed": 1, "failed": 1, "errors": ["assert 1 == 2"]}
    code = "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): pass\n    def test_b(self): self.assertEqual(1, 2)\n"
    box.call("file_write", {"path": "u.py", "content": code})
    counted = box.call("test_runner", {"test_file": "u.py", "framework": "unittest"})
    assert counted == {"passed": 1, "failed": 1, "errors": ["AssertionError: 1 != 2"]}
    assert box.call("test_runner", {"test_file": "none.py"})["failed"] == 1
