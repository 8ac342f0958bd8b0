"""What serving costs: a real Triton server against what it serves, alone in one process.

    PYTHONPATH=tests/helpers python -m benchmarks.serving                                  # ONNX Runtime, no GPU
    PYTHONPATH=tests/helpers python -m benchmarks.serving --engine runs/model.engine       # an engine on a GPU

Without --engine the network is a ResNet18 of 64 px with uint8 input and random weights. scripts/triton-server serves it
as deploy.triton writes it: Python backend, dynamic batching, several instances. Clients are threads of this process,
each with one request at a time, and take their part of the same cores. With shared memory the images lie there once,
and a request names its part of them. Every answer is compared: with ONNX Runtime's bit by bit, with the engine's, which
may take other kernels for another batch, within a thousandth of the largest. Needs grpcio and, without --engine,
geventhttpclient.
"""

from __future__ import annotations

import io
import os
import platform
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import tyro
from triton_server import Server, infer, library, running, tensor

from deploy import Engine, cuda
from deploy.measure import host_to_host
from deploy.triton_repository import write_repository
from qat.base.this_program import versions

PIXELS, CLASSES, MAX_BATCH = 64, 10, 16
NAMES = {"shared": "gRPC, shared memory", "grpc": "gRPC", "http": "HTTP"}
Request = Callable[[int], np.ndarray]
"""Place of the first image -> logits [batch, classes]."""


@dataclass(frozen=True)
class Load:
    """What is asked of the server: how, how many images a request, from how many clients at a time."""

    how: str
    batch: int
    clients: int


@dataclass(frozen=True)
class Served:
    """What is served: a file, uint8 images [N, H, W, C], and the logits that it gives them, [N, classes]."""

    path: Path
    images: np.ndarray
    wanted: np.ndarray
    tolerance: float


def write_network(folder: Path) -> Path:
    import torch

    from export import export_onnx
    from qat import ModelSpec, Preprocessing, build_model, calibrate_ranges, prepare, save_checkpoint

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


def measure(open_request: Callable[[int], Iterator[Request]], load: Load, served: Served, seconds: float) -> str:
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
                    first = place % (len(served.images) - load.batch + 1)
                    found = request(first)
                    taken[index].append(time.perf_counter() - start)
                    wanted = served.wanted[first : first + load.batch]
                    np.testing.assert_allclose(found, wanted, rtol=0, atol=served.tolerance)
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


def of_onnx_runtime(served: Served, batch: int) -> Callable[[int], Iterator[Request]]:
    from export.session import run, session

    loaded = session(served.path)

    def opened(index: int) -> Iterator[Request]:
        yield lambda first: next(iter(run(loaded, served.images[first : first + batch]).values()))

    return opened


def of_server(server: Server, served: Served, load: Load) -> Callable[[int], Iterator[Request]]:
    images, classes = served.images, served.wanted.shape[1]

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
            size = images.nbytes + load.batch * classes * 4
            region = shared_memory.create_shared_memory_region(name, f"/{name}", size)
            try:
                shared_memory.set_shared_memory_region(region, [images])
                client.register_system_shared_memory(name, f"/{name}", size)
                asked = library("grpc").InferRequestedOutput("logits")
                asked.set_shared_memory(name, size - images.nbytes, offset=images.nbytes)

                def request(first: int) -> np.ndarray:
                    given = tensor("grpc", "input", part)  # a new one: it keeps an offset that was not 0
                    given.set_shared_memory(name, part.nbytes, offset=first * images[0].nbytes)
                    client.infer("model", [given], outputs=[asked])
                    shape = [load.batch, classes]
                    return shared_memory.get_contents_as_numpy(region, np.float32, shape, offset=images.nbytes)

                yield request
            finally:
                shared_memory.destroy_shared_memory_region(region)

    return opened


def measure_served(served: Served, loads: Sequence[Load], counts: Sequence[int], seconds: float, folder: Path) -> None:
    """Prints a row for each load of a server with each number of instances."""
    max_batch = None if served.path.suffix == ".engine" else MAX_BATCH
    for instances in counts:
        repository = folder / f"repository{instances}"
        with redirect_stdout(io.StringIO()):
            write_repository(
                served.path, repository, backend="python", name="model", instances=instances, max_batch=max_batch
            )
        with running(repository, folder / "log.txt") as server:
            with server.client("grpc") as client:
                client.load_model("model")
            for load in loads:
                row = measure(of_server(server, served, load), load, served, seconds)
                print(f"{f'Triton, instances: {instances}, {NAMES[load.how]}':44}{row}", flush=True)


def on_the_processor(seconds: float, folder: Path) -> None:
    """ONNX Runtime alone and served."""
    from benchmarks.stamp import stamp
    from export.session import run, session

    print(stamp("PYTHONPATH=tests/helpers python -m benchmarks.serving"))

    with redirect_stdout(io.StringIO()):
        path = write_network(folder)
    images = np.random.default_rng(0).integers(0, 256, (64, PIXELS, PIXELS, 3), np.uint8)
    wanted = np.concatenate([run(session(path), images[i : i + 1])["logits"] for i in range(len(images))])
    served = Served(path, images, wanted, tolerance=0.0)
    print(f"tritonserver 2.51; ResNet18, {PIXELS} px, uint8 input; {seconds:g} s each; no GPU\n")
    print(f"{'':44}batch clients  images/s   p50 ms   p99 ms")
    for batch in (1, 8):
        row = measure(of_onnx_runtime(served, batch), Load("", batch, 1), served, seconds)
        print(f"{'ONNX Runtime alone, in the process':44}{row}", flush=True)
    loads = [Load(how, batch, clients) for batch, clients in ((1, 1), (1, 8), (8, 4)) for how in NAMES]
    measure_served(served, loads, (1, 2), seconds, folder)


def on_a_gpu(path: Path, seconds: float, folder: Path) -> None:
    """An engine alone, from host memory to host memory, and served."""
    with Engine.load(path, contexts=3) as engine:
        batch, spec = engine.max_batch, engine.inputs[0]
        images = np.random.default_rng(0).integers(0, 256, (batch + 32, *spec.shape[1:]), np.uint8)
        wanted = np.concatenate([engine(images[:batch]), engine(images[-batch:])[-32:]])
        served = Served(path, images, wanted, tolerance=float(np.abs(wanted).max()) / 1000)
        gpu = cuda.device()
        print(f"{date.today()}  PYTHONPATH=tests/helpers python -m benchmarks.serving --engine {path.name}")
        print(f"{gpu.name}, driver {gpu.driver}, Python {platform.python_version()}")
        print(f"tritonserver 2.51; {path.name}, input {spec.dtype} {spec.shape}; {engine.toolkit.title}\n")
        print(f"{'':44}batch clients  images/s   p50 ms   p99 ms")
        for kind, pinned in (("pinned", True), ("pageable", False)):
            found = host_to_host(engine, batch, pinned=pinned, seconds=seconds)
            print(f"{f'Engine alone, {kind} memory, 3 contexts':44}{batch:5} {'':7} {found:9.1f}", flush=True)
    loads = [Load("shared", batch, 4), Load("shared", batch, 8), Load("grpc", batch, 4), Load("shared", 1, 8)]
    measure_served(served, loads, (1, 2, 4, 8), seconds, folder)


def main(engine: Path | None = None, seconds: float = 8.0) -> None:
    """Prints the figures.

    Args:
        engine: an engine with one uint8 input, for this GPU.
        seconds: how long each load lasts.
    """
    warnings.simplefilter("ignore")
    print(", ".join(f"{name} {found}" for name, found in versions("onnxruntime", "tritonclient", "numpy").items()))
    print(f"{os.cpu_count()} cores, shared with the clients; load of the machine before: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        if engine is None:
            on_the_processor(seconds, Path(folder))
        else:
            on_a_gpu(engine, seconds, Path(folder))


if __name__ == "__main__":
    tyro.cli(main)
