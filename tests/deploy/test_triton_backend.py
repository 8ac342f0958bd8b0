"""What runs in the processes of Triton's Python backend. On the real server: tests/deploy/test_triton_server.py."""

from __future__ import annotations

import gc
import json
import sys
import threading
import types
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deploy.runtime import Engine
from deploy.triton_backend import IN_FLIGHT, TritonPythonModel, answer, open_engine, threads_for
from qat.base.artifact import Sidecar, TensorSpec, write_artifact
from qat.base.errors import UserError

INPUTS = (TensorSpec("x", (-1, 2), "float32"), TensorSpec("y", (-1,), "int64"))
OUTPUTS = (TensorSpec("sum", (-1, 2), "float32"), TensorSpec("twice", (-1,), "int64"))


def request(*values: int) -> dict[str, np.ndarray]:
    return {"x": np.full((len(values), 2), values[0], np.float32), "y": np.array(values)}


def compute(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"sum": arrays["x"] + arrays["y"][:, None].astype(np.float32), "twice": arrays["y"] * 2}


class Counted:
    """Computes the requests as one batch, and fails if any of them has the value 13."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, requests: Any) -> dict[str, np.ndarray]:
        joined = {name: np.concatenate([given[name] for given in requests]) for name in ("x", "y")}
        self.batches.append(len(joined["x"]))
        if 13 in joined["y"]:
            raise RuntimeError("the 13th")
        return compute(joined)


def check(found: Any, *values: int) -> None:
    wanted = compute(request(*values))
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_requests_are_one_batch_and_each_gets_its_own_answer() -> None:
    run = Counted()
    first, second, third = answer(run, [request(1), request(2, 3, 4), request(5, 6)], together=True)
    check(first, 1)
    check(second, 2, 3, 4)
    check(third, 5, 6)
    assert run.batches == [6]


def test_an_error_is_in_the_answer_of_its_own_request_only() -> None:
    run = Counted()
    first, second, third = answer(run, [request(1), request(13, 2), request(5, 6)], together=True)
    check(first, 1)
    assert str(second) == "the 13th"
    check(third, 5, 6)
    assert run.batches == [5, 1, 2, 2]


def test_requests_of_a_fixed_batch_are_never_put_together() -> None:
    run = Counted()
    first, second = answer(run, [request(1, 2), request(3, 4)], together=False)
    check(first, 1, 2)
    check(second, 3, 4)
    assert run.batches == [2, 2]


def test_an_output_without_the_batch_is_not_cut_into_wrong_answers() -> None:
    def run(requests: Any) -> dict[str, np.ndarray]:
        return {"sum": np.zeros((3, 2), np.float32)} if len(requests) > 1 else {"sum": requests[0]["x"]}

    first, second = answer(run, [request(1), request(2)], together=True)
    assert (first["sum"].tolist(), second["sum"].tolist()) == ([[1, 1]], [[2, 2]])


def test_all_instances_together_have_the_cores_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    assert [threads_for(instances) for instances in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]


class Pinned:
    """Stands for an engine, which needs a GPU: what is put together must lie in its pinned memory."""

    inputs, outputs, max_batch = INPUTS, OUTPUTS, 4

    def __init__(self) -> None:
        self.memory: list[dict[str, np.ndarray]] = []
        self.closed = False
        self.go_on = threading.Event()
        self.go_on.set()

    def pinned_input(self, batch: int) -> dict[str, np.ndarray]:
        assert batch == self.max_batch
        self.memory.append({"x": np.empty((4, 2), np.float32), "y": np.empty(4, np.int64)})
        return self.memory[-1]

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if len(arrays["x"]) > self.max_batch:
            raise UserError(f"a batch of {len(arrays['x'])} is outside")
        assert any(all(np.shares_memory(arrays[name], own[name]) for name in arrays) for own in self.memory)
        assert self.go_on.wait(10)
        return compute(arrays)

    def __enter__(self) -> Pinned:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "m" / "1" / "model.engine"
    path.parent.mkdir(parents=True)
    sidecar = Sidecar("engine", inputs=INPUTS, outputs=OUTPUTS)
    write_artifact(path, sidecar, lambda file: file.write_bytes(b"a plan") and None)
    return path


@pytest.fixture
def engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> Pinned:
    engine = Pinned()
    known = {(path, IN_FLIGHT): engine}
    monkeypatch.setattr(Engine, "load", lambda given, *, contexts: known[given, contexts])
    return engine


def test_an_engine_gets_its_batch_in_pinned_memory(path: Path, engine: Pinned) -> None:
    with ExitStack() as close:
        found, run = open_engine(path, close)
        assert found.outputs == OUTPUTS
        first, second = answer(run, [request(1), request(2, 3)], together=True)
        check(first, 1)
        check(second, 2, 3)
        too_large = answer(run, [request(1, 2, 3), request(4, 5)], together=True)
        check(too_large[0], 1, 2, 3)
        check(too_large[1], 4, 5)
        assert "a batch of 5" in str(answer(run, [request(1, 2, 3, 4, 5)], together=True)[0])
        assert not engine.closed
    assert engine.closed


@dataclass
class Tensor:
    """Stands for Triton's: takes and gives DLPack, as the real one does, and renames the capsule as it does."""

    name: str
    array: np.ndarray

    @classmethod
    def from_dlpack(cls, name: str, source: Any) -> Tensor:
        return cls(name, np.from_dlpack(source).copy())

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own module, which only its processes have."""
    module = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError = Tensor, str  # type: ignore[attr-defined]
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1  # type: ignore[attr-defined]
    module.get_input_tensor_by_name = lambda given, name: given[name]  # type: ignore[attr-defined]
    module.InferenceResponse = lambda tensors=(), error=None: (list(tensors), error)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


class Asked(dict[str, Tensor]):
    """A request, whose response is sent later."""

    def __init__(self, *values: int) -> None:
        super().__init__({name: Tensor(name, array) for name, array in request(*values).items()})
        self.sent: list[tuple[Any, int]] = []

    def get_response_sender(self) -> Asked:
        return self

    def send(self, response: Any, flags: int) -> None:
        self.sent.append((response, flags))


def test_several_batches_of_an_engine_are_on_their_way(
    path: Path, engine: Pinned, triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.cuda.use_device", lambda index: None)
    model = TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps({"max_batch_size": 4}),
            "model_repository": str(path.parents[1]),
            "model_version": "1",
            "model_instance_device_id": "0",
        }
    )
    engine.go_on.clear()
    batches = [[Asked(n, n + 1), Asked(n + 2)] for n in range(0, 10 * IN_FLIGHT, 10)]
    for batch in batches:
        assert model.execute(batch) is None
    late = [Asked(1, 2, 3, 4, 5)]
    taken = threading.Thread(target=model.execute, args=(late,))
    taken.start()
    taken.join(0.2)
    assert taken.is_alive()  # it waits until one of those is done
    assert not any(asked.sent for batch in batches for asked in batch)
    engine.go_on.set()
    taken.join(10)
    model.finalize()
    assert engine.closed
    for n, (first, second) in zip(range(0, 10 * IN_FLIGHT, 10), batches, strict=True):
        for asked, values in ((first, (n, n + 1)), (second, (n + 2,))):
            (((tensors, error), final),) = asked.sent
            assert (error, final) == (None, 1)
            check({tensor.name: tensor.array for tensor in tensors}, *values)
    ((([], error), final),) = late[0].sent
    assert "a batch of 5 is outside" in error
    assert final == 1


def write_network(path: Path) -> None:
    """x [N, 2] -> y = x + [1, 2], which refuses a batch of 3."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    sides = [[helper.make_tensor_value_info(name, kind, ["N", 2])] for name in ("x", "y")]
    constant = onnx.numpy_helper.from_array(np.array([1, 2], np.float32), "c")
    graph = helper.make_graph([helper.make_node("Add", ["x", "c"], ["y"])], "add", *sides, [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    inputs, outputs = (TensorSpec("x", (-1, 2), "float32"),), (TensorSpec("y", (-1, 2), "float32"),)
    write_artifact(path, Sidecar("onnx", inputs=inputs, outputs=outputs), lambda file: onnx.save(model, file))


def test_the_model_as_triton_calls_it(tmp_path: Path, triton: None) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    write_network(tmp_path / "m" / "1" / "model.onnx")
    config = {"max_batch_size": 4, "instance_group": [{"count": 2}]}
    model = TritonPythonModel()
    model.initialize(
        {"model_config": json.dumps(config), "model_repository": str(tmp_path / "m"), "model_version": "1"}
    )
    xs = [np.ones((2, 2), np.float32), np.zeros((1, 3), np.float32), np.full((1, 2), 5, np.float32)]
    responses = model.execute([{"x": Tensor("x", x)} for x in xs])
    assert responses is not None
    (first,), error = responses[0]
    assert (first.name, first.array.tolist(), error) == ("y", [[2, 3], [2, 3]], None)
    assert responses[1][0] == []
    assert "INVALID_ARGUMENT" in responses[1][1]
    assert responses[2][0][0].array.tolist() == [[6, 7]]
    model.finalize()


def test_arrays_that_triton_has_taken_are_freed(triton: None) -> None:
    from deploy.triton_backend import _ForTriton

    array = np.ones((4, 4), np.float32)
    alive = weakref.ref(array)
    taken = np.from_dlpack(_ForTriton(array))
    assert np.shares_memory(taken, array)
    del array, taken
    gc.collect()
    assert alive() is None
