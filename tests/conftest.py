"""What several test modules share: command lines in processes of their own, and one tiny trained checkpoint."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import tiny
from commands import ONE_THREAD, ROOT, Run, one_thread

# What the tests make is remembered as this user's own (qat/base/trust.py), but not in the user's own folder. Workers of
# pytest-xdist share that of the process that started them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="state-of-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def _launcher() -> Iterator[subprocess.Popen[str]]:
    launcher = subprocess.Popen(
        [sys.executable, "-c", "import launcher; launcher.serve()"],
        cwd=ROOT,
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield launcher
    _stream(launcher.stdin).close()
    launcher.wait()
    _stream(launcher.stdout).close()


@pytest.fixture
def command(_launcher: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Command lines as a user gives them, in a process of their own that finds torch imported already."""
    streams_folder = tmp_path_factory.mktemp("streams")

    def run(
        module: str,
        *arguments: object,
        environment: dict[str, str] | None = None,
        file_size: int | None = None,
        folder: Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        streams = {name: streams_folder / name for name in ("stdout", "stderr")}
        for path in streams.values():
            path.write_text("")
        request = {
            "module": module,
            "arguments": list(map(str, arguments)),
            "environment": environment or {},
            "file_size": file_size,
            "folder": str(folder),
            **{name: str(path) for name, path in streams.items()},
        }
        stdin = _stream(_launcher.stdin)
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        code = int(_stream(_launcher.stdout).readline())
        texts = {name: path.read_text() for name, path in streams.items()}
        return subprocess.CompletedProcess([module, *arguments], code, **texts)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.qat, its sidecar, and the network and images that it was made from. Not to be changed."""
    from qat.options import TrainOptions
    from qat.train import main as run

    folder = tmp_path_factory.mktemp("trained")
    with one_thread():
        run(TrainOptions(**tiny.options(folder)))
    return folder


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained checkpoint and its sidecar, to be changed."""
    for name in ("model.qat", "model.qat.json"):
        shutil.copy(trained / name, tmp_path / name)
    return tmp_path / "model.qat"


@pytest.fixture(scope="session")
def chain(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.qat, the ONNX file made of it, the engine made of that, and their sidecars. Not to change."""
    from deploy import build
    from export import export_onnx

    folder = tmp_path_factory.mktemp("chain")
    for name in ("model.qat", "model.qat.json"):
        shutil.copy(trained / name, folder / name)
    export_onnx(folder / "model.qat")
    onnx = folder / "model.onnx"
    assert build.main(build.BuildOptions(model=onnx, builder="tensorrt-rtx", compute_capabilities=("8.9",))) == 0
    return folder


def _stream(stream: IO[Any] | None) -> IO[Any]:
    assert stream is not None
    return stream
