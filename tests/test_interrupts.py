"""Real command lines that are stopped, that nobody listens to, or that meet another run: what is left, and the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import ONE_THREAD, ROOT, Run
from safetensors.torch import load_file

from qat.base.lock import lock_path, locked


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash in ``folder``; ``python`` there is this interpreter."""
    program = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}; set -o pipefail; {line}'
    given = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-c", program], cwd=folder, env=given, capture_output=True, text=True, check=False)


def training(folder: Path, **changes: Any) -> str:
    return "python -m qat.train " + shlex.join(tiny.flags(tiny.options(folder, **changes)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- five commands that destroyed an input


@pytest.mark.parametrize(
    ("module", "given", "destroyed"),
    [
        ("deploy.report", ("model.engine", "--output", "model.engine"), "model.engine"),
        ("deploy.audit", ("model.engine", "--json", "model.engine"), "model.engine"),
        ("qat.placement", ("model.qat", "--json", "model.qat"), "model.qat"),
        ("export.lint", ("model.onnx", "--json", "model.onnx.json"), "model.onnx.json"),
        ("deploy.evaluate", ("model.engine", "--json", "model.onnx"), "model.onnx"),
    ],
)
def test_outputs_destroy_no_input(
    chain: Path, command: Run, tmp_path: Path, module: str, given: tuple[str, ...], destroyed: str
) -> None:
    for path in chain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = command(module, *given, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {given[1]} {given[2]} would overwrite the input {destroyed}: give another name\n"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_training_does_not_overwrite_its_images(trained: Path, command: Run, tmp_path: Path) -> None:
    options = tiny.options(tmp_path, output=tmp_path / "images.npz")
    before = (tmp_path / "images.npz").read_bytes()
    done = command("qat.train", *tiny.flags(options))
    assert done.returncode == 2
    assert "images.npz would overwrite the input" in done.stderr
    assert (tmp_path / "images.npz").read_bytes() == before


# --- standard streams


@pytest.mark.parametrize("name", ["-", pytest.param("/dev/stdout", marks=pytest.mark.slow)])
def test_standard_output_has_the_json_alone(trained: Path, name: str) -> None:
    done = shell(f"python -m qat.placement model.qat --json {name}", trained)
    assert done.returncode == 0, done.stderr
    assert "conv1" in json.dumps(json.loads(done.stdout))
    assert "INT8: 3 of 3 convolutions" in done.stderr


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("| head -1", 141, 1),
        pytest.param(">&-", 0, 0, marks=pytest.mark.slow),
        pytest.param("> /dev/full", 141, 0, marks=pytest.mark.slow),
        pytest.param(">&- 2>&-", 0, 0, marks=pytest.mark.slow),
    ],
)
def test_a_standard_output_that_takes_nothing_ends_no_training(
    trained: Path, tmp_path: Path, redirection: str, code: int, said: int
) -> None:
    done = shell(f"{training(trained, output='out/model.qat')} {redirection}", tmp_path)
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (code, "", said)
    assert names(tmp_path / "out") == ["model.qat", "model.qat.json", "model.ranges.json"]
    one, other = load_file(tmp_path / "out" / "model.qat"), load_file(trained / "model.qat")
    assert all(one[name].equal(other[name]) for name in other)


def test_help_that_nobody_reads() -> None:
    done = shell("python -m qat.train --help | true", ROOT)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
def test_data_that_is_not_read_to_its_end(trained: Path) -> None:
    done = shell("python -m qat.placement model.qat --json - 2> /dev/null | true", trained)
    assert done.returncode == 141


@pytest.mark.slow
def test_neither_a_home_nor_a_temporary_folder(trained: Path, tmp_path: Path) -> None:
    line = f"unset HOME; TMPDIR=/nonexistent {training(trained, output='model.qat')}"
    assert shell(line, tmp_path).returncode == 0
    assert shell("unset HOME; python -m export.onnx model.qat", tmp_path, TMPDIR="/nonexistent").returncode == 0


ERROR = """
import errno, qat.placement
from qat.base.console import run_command
def main(options: qat.placement.PlacementOptions) -> None:
    raise {error}
run_command(main, qat.placement.PlacementOptions)
"""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("OSError(errno.ENOSPC, 'No space left on device', '/tmp/x')", 2, "error: .*No space left.* TMPDIR"),
        ("FileNotFoundError('No usable temporary directory found')", 2, "error: No usable temporary.* TMPDIR"),
        (
            "OSError(errno.ENAMETOOLONG, 'File name too long', 'x' * 5000)",
            2,
            "error: File name too long: .*; give another",
        ),
        (
            "PermissionError(errno.EACCES, 'Permission denied', '/x')",
            2,
            "error: Permission denied: /x; give another path",
        ),
        ("ValueError('odd')", 70, "internal error: ValueError: odd; run again with --debug and report it"),
        ("KeyboardInterrupt", 130, "interrupted: no half-written file was left behind"),
    ],
)
def test_the_kinds_of_an_end_have_codes_of_their_own(tmp_path: Path, error: str, code: int, line: str) -> None:
    (tmp_path / "program.py").write_text(ERROR.format(error=error))
    done = shell("python program.py resnet18", tmp_path)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1
    assert re.match(line, done.stderr)
    done = shell("python program.py resnet18 --debug", tmp_path)
    assert done.returncode == code
    assert "Traceback" in done.stderr


# --- signals, and several runs


def test_an_interrupt_that_a_native_import_made_another_error_of_is_one(tmp_path: Path) -> None:
    program = ERROR.replace(
        "    raise {error}",
        """
    import os, signal
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        raise ImportError("initialization failed")
""",
    )
    (tmp_path / "program.py").write_text(program)
    done = shell("python program.py resnet18", tmp_path)
    assert (done.returncode, done.stderr) == (130, "interrupted: no half-written file was left behind\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_saves_what_training_has_done(trained: Path, command: Run, tmp_path: Path, number: int) -> None:
    given = tiny.flags(tiny.options(trained, output=tmp_path / "model.qat"))
    stop = {"STOP_IN_PASS": "5", "STOP_BY": str(int(number))}
    done = command("qat.train", *given, environment=stop)
    assert done.returncode == 130
    assert done.stderr.startswith("interrupted: saved; continue with: ")
    assert names(tmp_path) == ["model.qat.state"]
    assert command("qat.train", *given, "--resume").returncode == 0
    one, other = load_file(tmp_path / "model.qat"), load_file(trained / "model.qat")
    assert all(one[name].equal(other[name]) for name in other)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_signals_end_other_commands_in_one_line(trained: Path, tmp_path: Path, number: int) -> None:
    net = (trained / "net.py").read_text()
    (tmp_path / "net.py").write_text(f"import os; os.kill(os.getpid(), {int(number)})\n{net}")
    done = shell("python -m qat.placement net.py:net --json placement.json", tmp_path)
    assert (done.returncode, done.stderr) == (130, "interrupted: no half-written file was left behind\n")
    assert "placement.json" not in names(tmp_path)
    assert ".placement.json.lock" not in names(tmp_path)


@pytest.mark.slow
def test_a_run_under_nohup_goes_on_when_its_terminal_is_closed(trained: Path, tmp_path: Path) -> None:
    stop = f"STOP_IN_PASS=5 STOP_BY={int(signal.SIGHUP)}"
    done = shell(f"trap '' HUP; {stop} {training(trained, output='model.qat')}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_second_run_into_the_same_output_is_refused(trained: Path, command: Run, tmp_path: Path) -> None:
    output = tmp_path / "model.qat"
    given = tiny.flags(tiny.options(trained, output=output))
    with locked(output, "python -m qat.train --output model.qat"):
        done = command("qat.train", *given)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"is being written by process {os.getpid()} since " in line
    assert ": python -m qat.train --output model.qat; wait for it, or give another --output" in line
    assert names(tmp_path) == []


def test_what_a_killed_run_leaves_is_removed_by_the_next(trained: Path, command: Run, tmp_path: Path) -> None:
    given = tiny.flags(tiny.options(trained, output=tmp_path / "model.qat"))
    command("qat.train", *given, environment={"STOP_IN_PASS": "5", "STOP_BY": str(int(signal.SIGKILL))})
    assert names(tmp_path) == [lock_path(tmp_path / "model.qat").name]
    (tmp_path / ".model.qat.state.abcd_123.part").write_bytes(b"half")
    assert command("qat.train", *given).returncode == 0
    assert names(tmp_path) == ["model.qat", "model.qat.json", "model.ranges.json"]


@pytest.mark.slow
def test_resuming_with_other_threads_says_that_bits_may_differ(trained: Path, command: Run, tmp_path: Path) -> None:
    given = tiny.flags(tiny.options(trained, output=tmp_path / "model.qat", float_epochs=1, qat_epochs=1))
    command("qat.train", *given, environment={"STOP_IN_PASS": "5", "STOP_BY": str(int(signal.SIGINT))})
    # Passive: threads that spin while they wait take several times as much of a processor that others use too.
    two = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    done = shell(f"python -m qat.train {shlex.join(given)} --resume", tmp_path, **two)
    assert done.returncode == 0
    assert done.stderr == (
        "warning: the stopped run computed with 1 threads, this one has 2: the last bits of the result may differ; "
        "OMP_NUM_THREADS=1 keeps them\n"
    )


# --- at random moments


@pytest.mark.slow
def test_whatever_is_killed_at_random_ends_bit_by_bit_the_same(tmp_path: Path) -> None:
    done = shell("python -m benchmarks.kills --rounds 10 --seed 2", ROOT, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 faults" in done.stdout
