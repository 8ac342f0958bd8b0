"""Requests when a context fails, memory is full, or the engine is exchanged: on a GPU in host memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from host_gpu import VALUES, HostGpu, answer_to, install, load

from deploy import ServedEngine
from deploy.runtime import EngineClosedError
from deploy.settings import Profile
from qat.base.artifact import TensorSpec
from qat.base.errors import UserError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> HostGpu:
    return install(monkeypatch)


def images(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, VALUES)).astype(np.float32)


def check(engine: Callable[[np.ndarray], np.ndarray], batch: int, seed: int = 0) -> None:
    x = images(batch, seed)
    np.testing.assert_array_equal(engine(x), answer_to(x))


def from_threads(work: Callable[[int], None], threads: int = 8) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, index) for index in range(threads)]:
            done.result(timeout=60)


def test_a_context_that_fails_fails_one_request_and_is_replaced(gpu: HostGpu) -> None:
    with load(gpu, contexts=1) as engine:
        check(engine, 3)
        before = engine._executors[0]
        for seed in range(5):
            gpu.break_next_context = True
            with pytest.raises(RuntimeError, match="cudaGraphLaunch: cudaErrorLaunchFailure"):
                engine(images(3, seed))
            check(engine, 3, seed)
            check(engine, 5, seed)
        assert engine._executors[0] is not before
        assert len(engine._executors) == 1
    assert gpu.bytes == 0


def test_a_context_that_fails_in_the_middle_of_a_map(gpu: HostGpu) -> None:
    with load(gpu, contexts=2) as engine:
        batches = [images(4, seed) for seed in range(6)]
        list(engine.map(batches))
        gpu.break_next_context = True
        with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure"):
            list(engine.map(batches))
        for x, found in zip(batches, engine.map(batches), strict=True):
            np.testing.assert_array_equal(found, answer_to(x))
    assert gpu.bytes == 0


def test_an_error_of_one_request_is_not_left_for_the_next(gpu: HostGpu) -> None:
    """TensorRT asks CUDA for the thread's last error: an old one would end the next request."""
    with load(gpu, contexts=1) as engine:
        check(engine, 3)
        gpu.break_next_context = True
        with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure"):
            engine(images(3))
        (left,) = gpu.cudaGetLastError()
        assert int(left) == 0


def test_memory_that_is_full_when_an_executor_is_made_anew(gpu: HostGpu) -> None:
    """The requests that find none get the reason; as soon as there is memory again, all goes on."""
    with load(gpu, contexts=1) as engine:
        check(engine, 3)
        gpu.break_next_context = True
        with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure"):
            engine(images(3))
        most, gpu.most_bytes = gpu.most_bytes, 100
        for _ in range(3):
            with pytest.raises(UserError, match="out of GPU memory"):
                engine(images(3))
        gpu.most_bytes = most
        check(engine, 3)
    assert gpu.bytes == 0


def test_after_an_illegal_address_every_call_raises_and_close_ends(gpu: HostGpu) -> None:
    engine = load(gpu, contexts=2)
    check(engine, 3)
    gpu.dead = True
    for _ in range(5):
        with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
            engine(images(3))
    engine.close()
    assert engine.closed


def test_wrong_requests_between_right_ones(gpu: HostGpu) -> None:
    wrong = (np.zeros((3, VALUES + 1), np.float32), np.zeros((3, VALUES)), np.zeros((33, VALUES), np.float32), "x", {})

    with load(gpu, contexts=3) as engine:

        def work(index: int) -> None:
            for seed in range(50):
                if index % 2:
                    with pytest.raises(UserError):
                        engine(wrong[seed % len(wrong)])
                else:
                    check(engine, 1 + (index + seed) % 32, seed)

        from_threads(work)
        assert not any(executor.failed for executor in engine._executors)
    assert gpu.bytes == 0


def test_contexts_that_fail_while_eight_threads_ask(gpu: HostGpu) -> None:
    """As many requests fail as contexts were broken; all others are right, and no memory is lost."""
    failed = []

    with load(gpu, contexts=3) as engine:

        def work(index: int) -> None:
            for seed in range(100):
                if seed % 25 == 24:
                    gpu.break_next_context = True
                try:
                    check(engine, 1 + (index + seed) % 20, seed)
                except RuntimeError as error:
                    failed.append(str(error))

        from_threads(work)
        gpu.break_next_context = False
        assert 1 <= len(failed) <= 32
        assert len(engine._executors) == 3
        for batch in range(1, 33):
            check(engine, batch)
    assert gpu.bytes == 0


def test_more_batch_sizes_than_an_executor_keeps_do_not_grow_memory(gpu: HostGpu) -> None:
    with load(gpu, contexts=1) as engine:
        check(engine, 1)
        before, graphs = gpu.bytes, []
        for turn in range(4):
            for batch in range(1, 33):
                check(engine, batch, turn)
            graphs.append(len(gpu._graphs))
        assert gpu.bytes == before
        assert graphs == [16] * 4


# --- an engine that is exchanged


def test_an_engine_is_exchanged_while_requests_run(gpu: HostGpu) -> None:
    served = ServedEngine(load(gpu))
    stop, exchanged = threading.Event(), 0

    def work(index: int) -> None:
        if index:
            while not stop.is_set():
                check(served, index)
            return
        nonlocal exchanged
        try:
            for _ in range(20):
                old = served.engine
                served.exchange(load(gpu))
                assert old.closed
                exchanged += 1
        finally:
            stop.set()

    from_threads(work)
    assert exchanged == 20
    served.close()
    assert gpu.bytes == 0
    with pytest.raises(EngineClosedError):
        served(images(1))


def test_a_call_that_waits_for_a_closed_engine_goes_to_the_new_one(gpu: HostGpu) -> None:
    with ServedEngine(load(gpu, contexts=1)) as served:
        old = served.engine
        held = old._wait_for_executor()
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(check, served, 3)
            exchanging = pool.submit(served.exchange, load(gpu, contexts=1))
            waiting.result(timeout=30)  # the old engine has still not ended
            assert not exchanging.done()
            old._return_executor(held)
            exchanging.result(timeout=30)


def test_another_kind_of_engine_and_a_closed_service_refuse(gpu: HostGpu) -> None:
    served, other = ServedEngine(load(gpu)), load(gpu)
    other.loaded.outputs = (TensorSpec("z", (-1, VALUES), "float32"),)
    with pytest.raises(UserError, match=r"the new engine has the outputs .*'z'.* start another service"):
        served.exchange(other)
    assert other.closed
    check(served, 3)
    served.close()
    late = load(gpu)
    with pytest.raises(EngineClosedError, match="the engine is closed"):
        served.exchange(late)
    assert late.closed
    assert gpu.bytes == 0


def test_other_batch_sizes_may_be_exchanged(gpu: HostGpu) -> None:
    with ServedEngine(load(gpu)) as served:
        served.exchange(load(gpu, batches=Profile(1, 8, 64)))
        check(served, 64)


def test_executors_that_cannot_be_made_leave_nothing(gpu: HostGpu) -> None:
    gpu.most_bytes = 2500
    with pytest.raises(UserError, match="out of GPU memory"):
        load(gpu, contexts=3)
    assert gpu.bytes == 0
