"""benchmarks/soak.py on a GPU in host memory: what it must find, it finds. On a real GPU it is run by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from host_gpu import HostGpu, install, load

from benchmarks import soak as benchmark
from benchmarks.soak import Found, report, soak

OFTEN: dict[str, Any] = {"requests": 2000, "break_every": 100, "exchange_every": 400, "sample_every": 20}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> HostGpu:
    return install(monkeypatch)


def test_a_right_runtime_has_no_faults(gpu: HostGpu) -> None:
    found = soak(lambda: load(gpu, contexts=3), **OFTEN)
    assert (found.requests, found.wrong, found.exchanged) == (2000, 0, 5)
    assert 1 <= found.broken <= 20
    assert 1 <= len(found.failed) <= found.broken
    assert set(found.failed) == {"RuntimeError: broken on purpose"}
    assert len(found.memory) == 100
    assert found.faults() == []
    assert "wrong answers: 0" in report(found)
    assert gpu.bytes == 0


def test_wrong_answers_are_found(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = gpu.cudaGraphLaunch, iter(range(100_000))

    def sometimes_none(graph: int, stream: int) -> Any:
        return real(graph, stream) if next(count) % 50 else (gpu._ok(),)  # the last answer is left in the buffer

    monkeypatch.setattr(gpu, "cudaGraphLaunch", sometimes_none)
    found = soak(lambda: load(gpu), **OFTEN | {"break_every": 0})
    assert found.wrong > 0
    assert found.faults() == [f"{found.wrong} wrong answers"]


def test_a_context_that_is_not_replaced_is_found(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.runtime.Engine._made_anew", lambda engine, failed: failed)
    found = soak(lambda: load(gpu), **OFTEN | {"exchange_every": 0})
    assert len(found.failed) > found.broken
    assert "requests failed" in found.faults()[0]
    assert "FAULT: " in report(found)


def test_memory_that_grows_is_found(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "FLAT_BYTES", 10_000)
    monkeypatch.setattr(benchmark, "used_by_process", lambda: 0)
    kept = []

    def leaking() -> Any:
        kept.append(gpu.cudaMalloc(20_000))
        return load(gpu)

    found = soak(leaking, **OFTEN)
    assert found.faults() == ["the memory of the GPU grew by 0 MiB"]
    assert found.growth()[0] >= 20_000


def test_growth_is_what_the_end_has_more_than_the_beginning() -> None:
    rising = [(index * 10, 1000) for index in range(100)]
    assert Found(memory=rising).growth() == (800, 0)
    assert Found(memory=[(5, 7)] * 30).growth() == (0, 0)
    assert np.isclose(Found(memory=rising[::-1]).growth()[0], -800)
