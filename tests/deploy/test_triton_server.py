"""The repositories of deploy.triton for the Python backend on NVIDIA's own server, without a GPU.

Answers are compared with ONNX Runtime bit by bit: whatever requests the server puts into one batch, each image gets the
answer that it gets alone.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from qdq_models import Graph
from triton_server import PROTOCOLS, Server, infer, library, running, tensor, why_not_here

from deploy.triton_repository import write_repository
from export import export_onnx
from export.session import run, session
from qat.base.artifact import Sidecar, TensorSpec, write_artifact

pytestmark = pytest.mark.slow
THREADS, REQUESTS = 6, 40
Arrays = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def files(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bytes.onnx, as the pipeline exports it, takes uint8 images; pair.onnx has two inputs and two outputs; two forms
    of swapped.onnx have different weights; fixed.onnx has a batch of 2."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("model.qat", "model.qat.json"):
        shutil.copy(trained / name, folder / name)
    export_onnx(folder / "model.qat", folder / "bytes.onnx", input="uint8-nhwc")
    _pair(folder / "pair.onnx")
    for name, seed in (("first", 1), ("second", 2)):
        (folder / name).mkdir()
        _linear(folder / name / "swapped.onnx", seed)
    _linear(folder / "fixed.onnx", 3, batch=2)
    return folder


@pytest.fixture(scope="module")
def repository(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server") / "repository"
    options: dict[str, Any] = {"backend": "python", "max_batch": 16, "max_queue_delay_us": 20_000}
    for path in (files / "bytes.onnx", files / "pair.onnx", files / "first" / "swapped.onnx"):
        write_repository(path, folder, instances=2, **options)
    write_repository(files / "fixed.onnx", folder, backend="python")
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    _skip_where_no_server_runs()
    with running(repository, repository.parent / "log.txt") as started:
        with started.client("http") as client:
            for model in ("bytes", "pair", "swapped", "fixed"):
                client.load_model(model)
        yield started
        assert started.end() == 0
        assert started.left_in_shared_memory() == []


def _skip_where_no_server_runs() -> None:
    """Only where the machine cannot run it. Where it can and does not, the tests fail."""
    if reason := why_not_here():
        pytest.skip(f"THE REAL TRITON SERVER IS NOT TESTED: {reason}")


def _pair(path: Path) -> None:
    """Image [N, 3] of bytes and shift [N, 4] -> scores [N, 4], and the best of them, one number for each image."""
    graph = Graph()
    graph.node("Cast", ["image"], "values", to=TensorProto.FLOAT)
    graph.node("MatMul", ["values", graph.float_weights("w", (3, 4))], "product")
    graph.node("Add", ["product", "shift"], "scores")
    graph.node("ArgMax", ["scores"], "best", axis=1, keepdims=0)
    inputs = (TensorSpec("image", (-1, 3), "uint8"), TensorSpec("shift", (-1, 4), "float32"))
    outputs = (TensorSpec("scores", (-1, 4), "float32"), TensorSpec("best", (-1,), "int64"))
    _save(path, graph, inputs, outputs)


def _linear(path: Path, seed: int, batch: int = -1) -> None:
    graph = Graph(seed)
    graph.node("MatMul", ["input", graph.float_weights("w", (8, 5))], "logits")
    _save(path, graph, (TensorSpec("input", (batch, 8), "float32"),), (TensorSpec("logits", (batch, 5), "float32"),))


def _save(path: Path, graph: Graph, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    values = [
        [
            helper.make_tensor_value_info(
                spec.name,
                helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)),
                ["N" if size == -1 else size for size in spec.shape],
            )
            for spec in specs
        ]
        for specs in (inputs, outputs)
    ]
    made = helper.make_graph(graph.nodes, "tiny", *values, graph.initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    write_artifact(path, Sidecar("onnx", inputs=inputs, outputs=outputs), lambda file: onnx.save(model, file))


class Reference:
    """Random inputs of a file and what ONNX Runtime answers to each alone."""

    def __init__(self, path: Path, count: int = 64) -> None:
        self.session = session(path)
        random = np.random.default_rng(0)
        self.inputs = {}
        for given in self.session.get_inputs():
            shape = (count, *given.shape[1:])
            integers = given.type == "tensor(uint8)"
            made = random.integers(0, 256, shape) if integers else random.standard_normal(shape)
            self.inputs[given.name] = made.astype(np.uint8 if integers else np.float32)
        alone = [run(self.session, self.part(index, 1)) for index in range(count)]
        self.outputs = {name: np.concatenate([found[name] for found in alone]) for name in alone[0]}
        self.count = count

    def part(self, start: int, batch: int) -> dict[str, np.ndarray]:
        return {name: array[start : start + batch] for name, array in self.inputs.items()}

    def check(self, found: Arrays, start: int, batch: int) -> None:
        assert found.keys() == self.outputs.keys()
        for name, whole in self.outputs.items():
            wanted = whole[start : start + batch]
            # Triton has no empty dims: one number for each image is [N, 1].
            assert found[name].dtype == wanted.dtype
            np.testing.assert_array_equal(found[name].reshape(wanted.shape), wanted)


def from_threads(work: Callable[[int], None], threads: int = THREADS) -> None:
    """Calls ``work`` with 0, 1, ... in so many threads; raises what any of them raises."""
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, index) for index in range(threads)]:
            done.result(timeout=120)


@pytest.mark.parametrize("model", ["bytes", "pair"])
def test_many_clients_get_the_answers_of_onnx_runtime(server: Server, files: Path, model: str) -> None:
    reference = Reference(files / f"{model}.onnx")

    def work(index: int) -> None:
        protocol, random = PROTOCOLS[index % 2], np.random.default_rng(index)
        with server.client(protocol) as client:
            for _ in range(REQUESTS):
                batch = int(random.integers(1, 9))
                start = int(random.integers(0, reference.count - batch))
                reference.check(infer(client, protocol, model, reference.part(start, batch)), start, batch)

    from_threads(work)
    with server.client("http") as client:
        (counted,) = client.get_inference_statistics(model)["model_stats"]
    assert counted["inference_stats"]["success"]["count"] >= THREADS * REQUESTS
    assert counted["execution_count"] < THREADS * REQUESTS  # requests shared batches


def test_a_fixed_batch(server: Server, files: Path) -> None:
    x = np.arange(16, dtype=np.float32).reshape(2, 8)
    wanted = run(session(files / "fixed.onnx"), x)["logits"]
    for protocol in PROTOCOLS:
        with server.client(protocol) as client:
            found = infer(client, protocol, "fixed", {"input": x})
        np.testing.assert_array_equal(found["logits"], wanted)


def test_shared_memory(server: Server, files: Path) -> None:
    """Inputs and outputs in the system's shared memory: only their places go over gRPC."""
    from tritonclient.utils import shared_memory

    reference, batch = Reference(files / "bytes.onnx"), 8
    (input_name, whole), (output_name, wanted) = *reference.inputs.items(), *reference.outputs.items()
    sizes = {"in": whole[:batch].nbytes, "out": wanted[:batch].nbytes}
    handles = {
        name: shared_memory.create_shared_memory_region(name, f"/{server.shared_memory}-{name}", size)
        for name, size in sizes.items()
    }
    given = tensor("grpc", input_name, whole[:batch])
    given.set_shared_memory("in", sizes["in"])
    asked = library("grpc").InferRequestedOutput(output_name)
    asked.set_shared_memory("out", sizes["out"])
    try:
        with server.client("grpc") as client:
            for name, size in sizes.items():
                client.register_system_shared_memory(name, f"/{server.shared_memory}-{name}", size)
            for start in range(0, 32, batch):
                shared_memory.set_shared_memory_region(handles["in"], [whole[start : start + batch]])
                result = client.infer("bytes", [given], outputs=[asked])
                assert result.get_response().raw_output_contents == [b""]
                found = shared_memory.get_contents_as_numpy(handles["out"], wanted.dtype, [batch, *wanted.shape[1:]])
                reference.check({output_name: found}, start, batch)
    finally:
        for handle in handles.values():
            shared_memory.destroy_shared_memory_region(handle)


def test_requests_that_are_refused_do_not_touch_others(server: Server, files: Path) -> None:
    reference = Reference(files / "pair.onnx")
    wrong = {"image": np.zeros((17, 3), np.uint8), "shift": np.zeros((17, 4), np.float32)}

    def work(index: int) -> None:
        from tritonclient.utils import InferenceServerException

        protocol = PROTOCOLS[index // 2 % 2]
        with server.client(protocol) as client:
            for start in range(REQUESTS):
                if index % 2:
                    with pytest.raises(InferenceServerException, match="must be <= 16"):
                        infer(client, protocol, "pair", wrong)
                else:
                    reference.check(infer(client, protocol, "pair", reference.part(start, 3)), start, 3)

    from_threads(work)


def test_the_model_is_exchanged_while_requests_run(server: Server, repository: Path, files: Path) -> None:
    """No request fails, each is answered by the old or the new weights, and none by the old ones after the reload."""
    old, new = (Reference(files / name / "swapped.onnx") for name in ("first", "second"))
    stop, reloaded = threading.Event(), threading.Event()
    seen = {"old": 0, "new": 0}
    running_now = threading.Barrier(THREADS + 1)

    def work(index: int) -> None:
        protocol, start = PROTOCOLS[index % 2], index * 7
        running_now.wait(60)
        with server.client(protocol) as client:
            while not stop.is_set():
                was_reloaded = reloaded.is_set()
                found = infer(client, protocol, "swapped", old.part(start, 5))
                is_new = np.array_equal(found["logits"], new.outputs["logits"][start : start + 5])
                (new if is_new else old).check(found, start, 5)
                assert is_new or not was_reloaded
                seen["new" if is_new else "old"] += 1

    with ThreadPoolExecutor(THREADS) as pool:
        working = [pool.submit(work, index) for index in range(THREADS)]
        try:
            running_now.wait(60)
            write_repository(
                files / "second" / "swapped.onnx", repository, backend="python", max_batch=16, overwrite=True
            )
            with server.client("http") as client:
                client.load_model("swapped")
            reloaded.set()
            stop.wait(2)
        finally:
            stop.set()
        for done in working:
            done.result(timeout=60)
    assert min(seen.values()) > 0


def test_a_file_that_does_not_load_leaves_the_old_one_served(files: Path, tmp_path: Path) -> None:
    """On a server of its own: tritonserver 2.51 waits at its end for a model that did not load, until its timeout."""
    from tritonclient.utils import InferenceServerException

    _skip_where_no_server_runs()
    reference, repository = Reference(files / "pair.onnx"), tmp_path / "repository"
    write_repository(files / "pair.onnx", repository, backend="python")
    served = repository / "pair" / "1" / "model.onnx"
    with running(repository, tmp_path / "log.txt", exit_timeout=1) as server, server.client("http") as client:
        client.load_model("pair")
        served.write_bytes(served.read_bytes()[:-1])
        with pytest.raises(InferenceServerException, match="its sidecar was written for"):
            client.load_model("pair")
        reference.check(infer(client, "http", "pair", reference.part(0, 4)), 0, 4)
