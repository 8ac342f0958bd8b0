"""Loading engines on a machine that cannot run them: one line for every reason. With a GPU: tests/gpu."""

from __future__ import annotations

import gc
import queue
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploy import cuda, runtime
from deploy.loaded_engine import LoadedEngine
from deploy.runtime import Engine
from deploy.settings import Profile
from qat.base.artifact import TensorSpec, sidecar_path
from qat.base.errors import UserError


@pytest.fixture
def engine(chain: Path, tmp_path: Path) -> Path:
    for name in ("model.engine", "model.engine.json"):
        shutil.copy(chain / name, tmp_path)
    return tmp_path / "model.engine"


def refused(path: Path, **options: bool) -> str:
    with pytest.raises(UserError) as caught:
        Engine.load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def gpu() -> bool:
    try:
        cuda.device()
    except UserError:
        return False
    return True


def test_what_is_not_an_engine_is_said_before_a_gpu_is_looked_for(engine, chain):
    assert "no file" in refused(engine.with_name("no.engine"))
    assert "no file" in refused(engine.with_name("no.engine"), trust=True)
    assert "is a file of kind 'onnx', but must be of kind 'engine'" in refused(chain / "model.onnx")
    engine.write_bytes(engine.read_bytes()[:-1])
    assert "is truncated or is another one" in refused(engine)
    sidecar_path(engine).unlink()
    assert "has no sidecar" in refused(engine)


@pytest.mark.skipif(gpu(), reason="this machine has a GPU")
def test_no_gpu_is_one_line_with_what_to_do(engine):
    for options in ({}, {"trust": True}):
        assert refused(engine, **options).endswith("run this on a machine with an NVIDIA GPU and its driver")


def test_the_profile_that_suits_a_batch_best():
    loaded = LoadedEngine.__new__(LoadedEngine)
    loaded.profiles = (Profile(1, 4, 16), Profile(8, 12, 32), Profile(64, 64, 64))
    assert loaded.max_batch == 64
    assert [loaded.profile_for(batch) for batch in (1, 7, 8, 9, 16, 32, 64)] == [0, 0, 0, 1, 1, 1, 2]
    with pytest.raises(UserError, match=r"a batch of 33 is outside what the engine takes \(1 to 16 or 8 to 32 or 64\)"):
        loaded.profile_for(33)


# --- faults: the executors are stand-ins, since a broken GPU cannot be had; on a working one tests/gpu runs the real
# ones


class BrokenExecutor:
    """Computes ``good`` times; then everything fails, as after an illegal access on a GPU."""

    def __init__(self, good: int) -> None:
        self.left, self.closed, self.failed = good, False, False

    def submit(self, inputs: object) -> None:
        self.left -= 1
        self._check()

    def result(self) -> dict[str, int]:
        self._check()
        return {"logits": self.left}

    def settle(self) -> None:
        self._check()

    def close(self) -> None:
        self.closed = True
        self._check()

    def _check(self) -> None:
        if self.left < 0:
            self.failed = True
            raise RuntimeError("cudaStreamSynchronize: cudaErrorIllegalAddress")


def engine_of(executors: list[BrokenExecutor], monkeypatch: pytest.MonkeyPatch) -> Engine:
    def no_other(loaded: LoadedEngine) -> None:
        raise RuntimeError("cudaStreamCreateWithFlags: cudaErrorIllegalAddress")

    monkeypatch.setattr(cuda, "use_device", lambda number: None)
    monkeypatch.setattr(runtime, "Executor", no_other)
    loaded, engine = LoadedEngine.__new__(LoadedEngine), Engine.__new__(Engine)
    loaded.inputs, loaded.profiles = (TensorSpec("x", (-1, 2), "float32"),), (Profile(1, 2, 4),)
    loaded.lock, loaded.cuda_engine, loaded._runtime = threading.Lock(), None, None  # type: ignore[assignment]
    engine.loaded, engine._closed, engine._device = loaded, False, 0
    engine._all, engine.contexts = threading.Lock(), len(executors)
    engine._maps, engine._free, engine._executors = weakref.WeakSet(), queue.Queue(), executors  # type: ignore[assignment]
    for executor in executors:
        engine._free.put(executor)  # type: ignore[arg-type]
    return engine


def within_seconds(work: Callable[[], None]) -> list[BaseException]:
    """What ``work`` raised; fails when it hangs."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it hangs"
    return raised


X = np.zeros((2, 2), np.float32)


def test_a_fault_of_the_gpu_ends_in_errors_not_in_waiting(monkeypatch):
    executors = [BrokenExecutor(1), BrokenExecutor(1)]
    engine = engine_of(executors, monkeypatch)

    def work() -> None:
        with engine:
            for _ in range(9):
                engine(X)

    (error,) = within_seconds(work)
    assert "cudaErrorIllegalAddress" in str(error)
    assert all(executor.closed for executor in executors)
    with pytest.raises(ValueError, match="the engine is closed"):
        engine(X)


def test_a_fault_in_the_middle_of_a_map(monkeypatch):
    executors = [BrokenExecutor(2), BrokenExecutor(2), BrokenExecutor(2)]
    engine = engine_of(executors, monkeypatch)

    def work() -> None:
        with engine:
            list(engine.map([X] * 20))

    (error,) = within_seconds(work)
    assert "cudaErrorIllegalAddress" in str(error)
    assert all(executor.closed for executor in executors)


def test_an_engine_is_closed_while_a_map_is_held(monkeypatch):
    engine = engine_of([BrokenExecutor(99), BrokenExecutor(99)], monkeypatch)
    running = engine.map([X] * 6)
    next(running)
    assert within_seconds(engine.close) == []
    with pytest.raises(ValueError, match="the engine is closed"):
        next(running)


def test_two_maps_and_calls_share_two_executors(monkeypatch):
    engine = engine_of([BrokenExecutor(999), BrokenExecutor(999)], monkeypatch)

    def work() -> None:
        first, second = engine.map([X] * 8), engine.map([X] * 8)
        assert len(list(zip(first, range(8), strict=True))) == 8
        assert len(list(second)) == 8
        engine(X)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert within_seconds(engine.close) == []


class SlowExecutor(BrokenExecutor):
    """Takes a moment for each result."""

    def result(self) -> dict[str, int]:
        time.sleep(0.05)
        return super().result()


def test_an_engine_is_closed_while_a_map_computes_in_another_thread(monkeypatch):
    engine = engine_of([SlowExecutor(999), SlowExecutor(999)], monkeypatch)
    seen: list[str] = []

    def consume() -> None:
        try:
            held = engine.map([X] * 500)
            for _ in held:
                seen.append("result")
            seen.append("complete")
        except ValueError as error:
            seen.append(str(error))

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    while not seen:
        time.sleep(0.01)
    time.sleep(0.03)  # in the middle of a result
    assert within_seconds(engine.close) == []
    consumer.join(10)
    assert not consumer.is_alive()
    assert seen[-1] == "the engine is closed"


def test_a_map_that_was_ended_does_not_look_complete(monkeypatch):
    engine = engine_of([BrokenExecutor(99), BrokenExecutor(99)], monkeypatch)
    running = engine.map([X] * 5)
    next(running)
    engine.close()
    with pytest.raises(ValueError, match="the engine is closed"):
        list(running)


def test_all_executors_that_cannot_be_had_are_given_back(monkeypatch):
    engine = engine_of([BrokenExecutor(99) for _ in range(3)], monkeypatch)
    busy = [engine._wait_for_executor(), engine._wait_for_executor()]

    def measure() -> None:
        with engine.all_executors():
            raise AssertionError("the engine is being closed")

    raised: list[BaseException] = []
    measuring = threading.Thread(target=lambda: raised.extend(within_seconds(measure)), daemon=True)
    measuring.start()
    time.sleep(0.05)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    time.sleep(0.05)
    for executor in busy:
        engine._return_executor(executor)
    closing.join(10)
    measuring.join(10)
    assert not closing.is_alive()
    assert [str(error) for error in raised] == ["the engine is closed"]


def test_a_fault_while_a_held_map_is_ended_frees_the_rest(monkeypatch):
    executors = [BrokenExecutor(2), BrokenExecutor(2)]
    engine = engine_of(executors, monkeypatch)
    running = engine.map([X] * 9)
    next(running)
    for executor in executors:
        executor.left = -1
    (error,) = within_seconds(engine.close)
    assert "cudaErrorIllegalAddress" in str(error)
    assert all(executor.closed for executor in executors)
    assert not hasattr(engine.loaded, "cuda_engine")


def test_a_map_that_is_left_early_gives_its_executors_back_at_once(monkeypatch):
    engine = engine_of([BrokenExecutor(999), BrokenExecutor(999)], monkeypatch)
    gc.disable()  # not at some later time
    try:
        for _ in range(5):
            for _found in engine.map([X] * 8):
                break
            assert engine._free.qsize() == 2
    finally:
        gc.enable()
    assert within_seconds(lambda: engine(X)) == []


def test_a_complete_map_stays_at_its_end(monkeypatch):
    engine = engine_of([BrokenExecutor(99)], monkeypatch)
    running = engine.map([X] * 3)
    assert len(list(running)) == 3
    assert list(running) == []
    engine.close()
    assert list(running) == []
