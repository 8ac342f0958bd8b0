"""What serving costs: a real Triton server against ONNX Runtime alone, on this machine's processor.

    PYTHONPATH=tests/helpers python -m benchmarks.serving [SECONDS]

The network is a ResNet18 of 64 px with uint8 input and random weights. scripts/triton-server serves it as deploy.triton
writes it: dynamic batching, one or two instances. Clients are threads of this process, each with one request at a time,
and take their part of the same cores. Every answer is compared with ONNX Runtime's, bit by bit. Needs grpcio and
geventhttpclient.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from triton_server import Server, infer, library, running, tensor

from benchmarks.stamp import stamp
from deploy.triton_repository import write_repository
from export import export_onnx
from export.session import run, session
from qat import ModelSpec, Preprocessing, build_model, calibrate_ranges, prepare, save_checkpoint
from qat.base.this_program import versions

PIXELS, CLASSES, IMAGES, MAX_BATCH = 64, 10, 64, 16
Request = Callable[[int], np.ndarray]
"""Place of the first image -> logits [batch, CLASSES]."""


@dataclass(frozen=True)
class Load:
    """What is asked of the server: how, how many images a request, from how many clients at a time."""

    how: str
    batch: int
    clients: int


LOADS = [Load(how, batch, clients) for batch, clients in ((1, 1), (1, 8), (8, 4)) for how in ("http", "grpc", "shared")]


def write_network(folder: Path) -> Path:
    torch.manual_seed(0)
    spec = ModelSpec("resnet18", CLASSES)
    model = prepare(build_model(spec), input_shape=(3, PIXELS, PIXELS))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # some start at zero, which would make their weights vanish
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    calibrate_ranges(model, torch.randn(16, 3, PIXELS, PIXELS).split(8), "max")
    preprocessing = Preprocessing(PIXELS, PIXELS, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=PIXELS)
    save_checkpoint(folder / "model.qat", model, spec, preprocessing, [str(index) for index in range(CLASSES)])
    export_onnx(folder / "model.qat", folder / "model.onnx", input="uint8-nhwc")
    return folder / "model.onnx"


def measure(open_request: Callable[[int], Iterator[Request]], load: Load, wanted: np.ndarray, seconds: float) -> str:
    """Images per second and latencies of ``load``, as a row of the table."""
    taken: list[list[float]] = [[] for _ in range(load.clients)]
    failed: list[BaseException] = []
    ready = threading.Barrier(load.clients)

    def work(index: int) -> None:
        try:
            with contextmanager(open_request)(index) as request:
                request(0)  # the first one opens the connection
                ready.wait(60)
                end, place = time.perf_counter() + seconds, index
                while (start := time.perf_counter()) < end:
                    first = place % (IMAGES - load.batch + 1)
                    found = request(first)
                    taken[index].append(time.perf_counter() - start)
                    np.testing.assert_array_equal(found, wanted[first : first + load.batch])
                    place += 7
        except BaseException as error:
            failed.append(error)
            ready.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(load.clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    times = np.array([time for part in taken for time in part])
    images = len(times) * load.batch / min(seconds, time.perf_counter() - start)
    middle, slow = np.percentile(times, (50, 99)) * 1e3
    return f"{load.batch:5} {load.clients:7} {images:9.1f} {middle:8.2f} {slow:8.2f}"


def of_onnx_runtime(path: Path, images: np.ndarray, batch: int) -> Callable[[int], Iterator[Request]]:
    loaded = session(path)

    def opened(index: int) -> Iterator[Request]:
        yield lambda first: next(iter(run(loaded, images[first : first + batch]).values()))

    return opened


def of_server(server: Server, images: np.ndarray, load: Load) -> Callable[[int], Iterator[Request]]:
    def opened(index: int) -> Iterator[Request]:
        protocol = "http" if load.how == "http" else "grpc"
        with server.client(protocol) as client:
            if load.how != "shared":
                yield lambda first: infer(client, protocol, "model", {"input": images[first : first + load.batch]})[
                    "logits"
                ]
                return
            from tritonclient.utils import shared_memory

            name, part = f"{server.shared_memory}-{load.batch}-{load.clients}-{index}", images[: load.batch]
            outputs = load.batch * CLASSES * 4
            region = shared_memory.create_shared_memory_region(name, f"/{name}", part.nbytes + outputs)
            try:
                client.register_system_shared_memory(name, f"/{name}", part.nbytes + outputs)
                given = tensor("grpc", "input", part)
                given.set_shared_memory(name, part.nbytes)
                asked = library("grpc").InferRequestedOutput("logits")
                asked.set_shared_memory(name, outputs, offset=part.nbytes)

                def request(first: int) -> np.ndarray:
                    shared_memory.set_shared_memory_region(region, [images[first : first + load.batch]])
                    client.infer("model", [given], outputs=[asked])
                    shape = [load.batch, CLASSES]
                    return shared_memory.get_contents_as_numpy(region, np.float32, shape, offset=part.nbytes)

                yield request
            finally:
                shared_memory.destroy_shared_memory_region(region)

    return opened


def main() -> None:
    warnings.simplefilter("ignore")
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with redirect_stdout(io.StringIO()):
            path = write_network(folder)
        images = np.random.default_rng(0).integers(0, 256, (IMAGES, PIXELS, PIXELS, 3), np.uint8)
        wanted = np.concatenate([run(session(path), images[i : i + 1])["logits"] for i in range(IMAGES)])
        print(stamp("PYTHONPATH=tests/helpers python -m benchmarks.serving"))
        print(", ".join(f"{name} {found}" for name, found in versions("onnxruntime", "tritonclient", "numpy").items()))
        load = os.getloadavg()[0]
        print(f"{os.cpu_count()} cores, shared with the clients; load of the machine before: {load:.1f}")
        print(f"tritonserver 2.51; ResNet18, {PIXELS} px, uint8 input; {seconds:g} s each; no GPU\n")
        print(f"{'':44}batch clients  images/s   p50 ms   p99 ms")
        for batch in (1, 8):
            row = measure(of_onnx_runtime(path, images, batch), Load("", batch, 1), wanted, seconds)
            print(f"{'ONNX Runtime alone, in the process':44}{row}", flush=True)
        for instances in (1, 2):
            repository = folder / f"repository{instances}"
            with redirect_stdout(io.StringIO()):
                write_repository(path, repository, backend="python", instances=instances, max_batch=MAX_BATCH)
            with running(repository, folder / "log.txt") as server:
                with server.client("http") as client:
                    client.load_model("model")
                for load in LOADS:
                    name = {"shared": "gRPC, shared memory", "grpc": "gRPC", "http": "HTTP"}[load.how]
                    row = measure(of_server(server, images, load), load, wanted, seconds)
                    print(f"{f'Triton, instances: {instances}, {name}':44}{row}", flush=True)


if __name__ == "__main__":
    main()
