"""A real Triton server, as scripts/triton-server starts it, on this machine's own address; and clients of it."""

from __future__ import annotations

import importlib
import os
import platform
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

ROOT = Path(__file__).parents[2]
START = ROOT / "scripts" / "triton-server"
SECONDS_TO_START, SECONDS_TO_END = 120, 60
PROTOCOLS = ("http", "grpc")


def why_not_here() -> str:
    """Why no server can run on this machine: its processor, its C library or its Python. Empty where one can."""
    libc, release = platform.libc_ver()
    if platform.machine() != "x86_64" or libc != "glibc" or tuple(map(int, release.split("."))) < (2, 35):
        return f"NVIDIA's wheel of Triton needs x86-64 and glibc 2.35; this is {platform.machine()}, {libc} {release}"
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        return f"Triton's Python backend needs a Python with a shared library, which {sys.executable} has not"
    return ""


@dataclass
class Server:
    """A running server, with explicit model control."""

    process: subprocess.Popen[bytes]
    ports: dict[str, int]
    log: Path
    shared_memory: str

    def client(self, protocol: str) -> Any:
        """A client, for one thread. To be closed: the server's end waits for open connections."""
        return library(protocol).InferenceServerClient(f"127.0.0.1:{self.ports[protocol]}")

    def end(self) -> int:
        """Ends it as a service manager does, by SIGTERM. Returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS_TO_END)

    def left_in_shared_memory(self) -> list[str]:
        """What its Python backend has in /dev/shm."""
        return [path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(self.shared_memory)]


def library(protocol: str) -> Any:
    """tritonclient.http or tritonclient.grpc."""
    return importlib.import_module(f"tritonclient.{protocol}")


@contextmanager
def running(repository: Path, log: Path, *, exit_timeout: int = 20) -> Iterator[Server]:
    """A server of the models in ``repository``, none of them loaded yet. It ends with the block, or is killed."""
    ports = dict(zip((*PROTOCOLS, "metrics"), _free_ports(3), strict=True))
    prefix = f"qat-test-{os.getpid()}-{ports['http']}"
    options = [f"--model-repository={repository}", "--model-control-mode=explicit"]
    options += [f"--exit-timeout-secs={exit_timeout}", f"--backend-config=python,shm-region-prefix-name={prefix}"]
    for name, port in ports.items():
        options += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
    packages = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": packages}
    with log.open("wb") as file:
        process = subprocess.Popen([str(START), *options], stdout=file, stderr=file, env=environment)
    server = Server(process, ports, log, prefix)
    try:
        _wait_until_live(server)
        yield server
    finally:
        try:
            server.end()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def infer(client: Any, protocol: str, model: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One request: inputs by name -> all outputs by name."""
    inputs = [tensor(protocol, name, array) for name, array in arrays.items()]
    for given, array in zip(inputs, arrays.values(), strict=True):
        given.set_data_from_numpy(array)
    result = client.infer(model, inputs)
    response = result.get_response()
    names = [o["name"] for o in response["outputs"]] if protocol == "http" else [o.name for o in response.outputs]
    return {name: result.as_numpy(name) for name in names}


def tensor(protocol: str, name: str, array: np.ndarray) -> Any:
    """The description of an input, without its values."""
    from tritonclient.utils import np_to_triton_dtype

    return library(protocol).InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))


def _wait_until_live(server: Server) -> None:
    address = f"http://127.0.0.1:{server.ports['http']}/v2/health/live"
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end and server.process.poll() is None:
        try:
            with urlopen(address, timeout=5):
                return
        except OSError:  # nobody listens yet
            time.sleep(0.1)
    raise AssertionError(f"the server does not start:\n{server.log.read_text(errors='replace')[-4000:]}")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
