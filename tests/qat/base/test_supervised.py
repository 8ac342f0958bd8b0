"""A command whose native code crashes: one line, exit code 2, nothing left; signals reach the child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT

COMMAND = '''
"""A command that does what it is told."""
import ctypes, os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from qat.base.writing import atomic_write
from qat.base.console import Command, run_command
from qat.base.supervised import native, said

@dataclass(frozen=True, kw_only=True)
class Options(Command):
    """Options."""
    do: str
    """What to do."""

def main(options):
    with native("Parser parsing net.onnx"), atomic_write(Path("out.bin")) as part:
        part.write_text("half")
        said("node 7")
        exec(options.do)

run_command(main, Options, supervised=True)
'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(COMMAND)
    return path


def start(script: Path, do: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, script, "--do", do, *options],
        cwd=script.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left(script: Path) -> list[str]:
    return sorted(path.name for path in script.parent.iterdir() if path != script)


@pytest.mark.parametrize(
    ("do", "says"),
    [
        ("ctypes.string_at(0)", "crashed (SIGSEGV) (its last message: node 7)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed (SIGKILL), as a system does that is short of memory"),
        (
            "os.write(2, b'terminate called\\n  what():  std::bad_alloc\\n'); os.abort()",
            "it wrote: what(): std::bad_alloc",
        ),
    ],
)
def test_a_crash_is_one_line_and_leaves_nothing(script: Path, do: str, says: str) -> None:
    process = start(script, do)
    out, line = process.communicate(timeout=60)
    assert (process.returncode, out, line.count("\n")) == (2, "", 1)
    assert line.startswith("error: Parser parsing net.onnx ")
    assert says in line
    assert left(script) == []


@pytest.mark.parametrize("name", ["a\nb", "a\u2028b", "a\x0cb", os.fsdecode(b"a\xffb")])
def test_a_crash_in_a_folder_with_an_odd_name_removes_its_own_file_only(script: Path, name: str) -> None:
    folder = script.parent / name
    folder.mkdir()
    for other in ("a", "a?b", "a\ufffdb"):  # what such a path could be taken for
        (script.parent / other).write_text("of the user")
    before = left(script)
    moved = script.rename(folder / script.name)
    process = start(moved, "os.abort()")
    assert process.communicate(timeout=60)[1].startswith("error: Parser parsing net.onnx crashed")
    assert left(moved) == []
    assert sorted(path.name for path in folder.parent.iterdir()) == before


def test_what_the_child_answers_is_passed_on(script: Path) -> None:
    done = start(script, "os.write(2, b'native\\n'); print('out'); print('err', file=sys.stderr)")
    assert done.communicate(timeout=60) == ("out\n", "err\nnative\n")
    assert done.returncode == 0
    assert left(script) == ["out.bin"]
    done = start(script, "raise ValueError('x')")
    assert "internal error: ValueError: x" in done.communicate(timeout=60)[1]
    assert done.returncode == 70
    done = start(script, "raise MemoryError")
    assert "not enough memory" in done.communicate(timeout=60)[1]
    assert done.returncode == 2


def test_debug_runs_in_one_process(script: Path) -> None:
    done = start(script, "print(os.getppid())", "--debug")
    assert int(done.communicate(timeout=60)[0]) == os.getpid()


def started_child(process: subprocess.Popen[str]) -> int:
    """The child's number, which it prints when it is at work."""
    assert process.stdout is not None
    return int(process.stdout.readline())


WAIT = "print(os.getpid(), flush=True); time.sleep(60)"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_signal_reaches_the_child(script: Path, number: signal.Signals, code: int) -> None:
    process = start(script, WAIT)
    started_child(process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    if number != signal.SIGKILL:
        assert left(script) == []
        assert err.startswith("interrupted: ")


def test_a_killed_parent_takes_the_child_along(script: Path) -> None:
    process = start(script, WAIT)
    child = started_child(process)
    process.kill()
    process.communicate(timeout=60)  # to the end of its streams, which the child holds too
    for _ in range(100):
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    pytest.fail("the child outlived its parent")


def test_a_process_that_has_loaded_native_libraries_is_not_forked(script: Path) -> None:
    script.write_text(f"import onnxruntime\n{COMMAND}")
    done = start(script, "print(os.getppid())")
    assert int(done.communicate(timeout=60)[0]) == os.getpid()
