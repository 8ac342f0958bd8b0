"""A long run of an engine on a GPU: many threads, mixed batch sizes, contexts that are made to fail, engines exchanged.

    python -m benchmarks.soak runs/model.engine                        # a million requests from 8 threads
    python -m benchmarks.soak runs/model.engine --requests 20000

Every answer is compared, bit by bit, with what the engine answered to the same request alone before. Memory of the GPU
and of this process is sampled all the time; after the first tenth it must stay flat. A request may fail only because a
context was broken on purpose, one request for each. Exit code 1 if anything of that is not so.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from deploy import Engine, ServedEngine, cuda
from deploy.arrays import shape_for_batch
from deploy.executor import GRAPHS_PER_EXECUTOR
from qat.base.choices import BuilderName

FLAT_BYTES = 32 << 20
"""How much memory may differ between the first tenth of a run and its end: an engine may just be exchanged."""


@dataclass(frozen=True)
class Asked:
    """One of the requests that are asked again and again, and its answer: arrays by name; how often, relatively."""

    inputs: dict[str, np.ndarray]
    answer: dict[str, np.ndarray]
    share: float


@dataclass
class Found:
    """What a soak found. Memory in bytes, one sample each time: of the GPU, of the process."""

    requests: int = 0
    wrong: int = 0
    failed: list[str] = field(default_factory=list)
    broken: int = 0
    exchanged: int = 0
    seconds: float = 0.0
    memory: list[tuple[int, int]] = field(default_factory=list)

    def growth(self) -> tuple[int, int]:
        """How many bytes more the last tenth of the samples has than the second tenth, in the median: GPU, process."""
        samples = np.array(self.memory)
        tenth = max(1, len(samples) // 10)
        more = np.median(samples[-tenth:], 0) - np.median(samples[tenth : 2 * tenth], 0)
        return int(more[0]), int(more[1])

    def faults(self) -> list[str]:
        """What must not be, one line each."""
        lines = [f"{self.wrong} wrong answers"] if self.wrong else []
        if len(self.failed) > self.broken:
            lines.append(f"{len(self.failed)} requests failed, {self.broken} were made to; the last: {self.failed[-1]}")
        for where, more in zip(("the GPU", "the process"), self.growth(), strict=True):
            if more > FLAT_BYTES:
                lines.append(f"the memory of {where} grew by {more >> 20} MiB")
        return lines


def make_requests(engine: Engine, count: int = 64) -> list[Asked]:
    """``count`` requests of random values with batches of all sizes that the engine takes, and their answers."""
    random = np.random.default_rng(0)
    sizes = sorted({size for p in engine.profiles for size in (p.min, p.opt, p.max, *range(p.min, p.max + 1))})
    # Some twenty sizes, more than an executor keeps contexts for, so that contexts are dropped and made again; some of
    # the sizes are rare, because that takes much longer than a request.
    sizes = sizes if len(sizes) <= 20 else [sizes[round(i)] for i in np.linspace(0, len(sizes) - 1, 20)]
    shares = [1.0 if index < GRAPHS_PER_EXECUTOR - 2 else 0.003 for index in range(len(sizes))]
    asked = []
    for index in range(count):
        inputs = {}
        for spec in engine.inputs:
            shape = shape_for_batch(spec, sizes[index % len(sizes)])
            whole = np.dtype(spec.dtype).kind in "iub"
            values = (
                random.integers(0, 2 if spec.dtype == "bool" else 100, shape) if whole else random.normal(size=shape)
            )
            inputs[spec.name] = values.astype(spec.dtype)
        asked.append(Asked(inputs, _by_name(engine(inputs), engine), shares[index % len(sizes)]))
    return asked


def soak(
    open_engine: Callable[[], Engine],
    *,
    requests: int,
    threads: int = 8,
    break_every: int = 10_000,
    exchange_every: int = 50_000,
    sample_every: int = 1000,
    break_context: Callable[[Engine], bool] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Found:
    """Asks ``requests`` times from ``threads`` threads; breaks a context and exchanges the engine now and then.

    Args:
        open_engine: loads the engine; each exchange loads it again.
        requests: how many requests there are in all.
        threads: how many ask at the same time.
        break_every: after how many requests a context is broken; 0 for never.
        exchange_every: after how many requests the engine is exchanged; 0 for never.
        sample_every: after how many requests memory is looked at.
        break_context: breaks a context of an engine; returns whether there was one.
        say: takes a line about every tenth of the run.
    """
    found, lock = Found(), threading.Lock()
    start = time.perf_counter()
    break_one = break_context or break_a_context
    with ExitStack() as stack:
        served = stack.enter_context(ServedEngine(open_engine()))
        asked = make_requests(served.engine)
        until = np.cumsum([one.share for one in asked])
        names = served.engine

        def ask(index: int) -> None:
            random = np.random.default_rng(index)
            while True:
                with lock:
                    if found.requests == requests:
                        return
                    found.requests += 1
                    number = found.requests
                if break_every and number % break_every == 0 and break_one(served.engine):
                    with lock:
                        found.broken += 1
                if exchange_every and number % exchange_every == 0:
                    served.exchange(open_engine())
                    with lock:
                        found.exchanged += 1
                one = asked[int(np.searchsorted(until, random.random() * until[-1], side="right"))]
                try:
                    answer = _by_name(served(one.inputs), names)
                    wrong = any(not np.array_equal(answer[name], wanted) for name, wanted in one.answer.items())
                    with lock:
                        found.wrong += wrong
                except Exception as error:
                    with lock:
                        found.failed.append(f"{type(error).__name__}: {error}")
                if number % sample_every == 0:
                    with lock:
                        found.memory.append((used_on_gpu(), used_by_process()))
                if number % max(1, requests // 10) == 0:
                    say(f"{number} requests, {found.wrong} wrong, {len(found.failed)} failed")

        workers = [threading.Thread(target=ask, args=(index,)) for index in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    found.seconds = time.perf_counter() - start
    return found


def break_a_context(engine: Engine) -> bool:
    """Makes a context of a free executor fail in its next inference and all later ones. False if none is free."""
    executor = engine._take_executor(wait=False)
    if executor is None:
        return False
    try:
        contexts: Sequence[Any] = list(executor._contexts.values())
        for context in contexts:
            context.launch = _fail
        return bool(contexts)
    finally:
        engine._return_executor(executor)


def used_on_gpu() -> int:
    """Bytes of the GPU's memory that are not free; other processes' too."""
    return cuda.total_memory() - cuda.free_memory()


def used_by_process() -> int:
    """Bytes of this process in the host's memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no VmRSS")


def report(found: Found) -> str:
    """The result in a few lines."""
    on_gpu, in_process = found.growth()
    most = np.array(found.memory).max(0)
    return "\n".join(
        [
            f"{found.requests} requests in {found.seconds:.0f} s, {found.requests / found.seconds:.0f} requests/s",
            f"wrong answers: {found.wrong}; failed: {len(found.failed)}, contexts broken on purpose: {found.broken}; "
            f"engines exchanged: {found.exchanged}",
            f"memory, most and growth in MiB: GPU {most[0] >> 20}, {on_gpu / 2**20:+.1f}; "
            f"process {most[1] >> 20}, {in_process / 2**20:+.1f}",
            *(f"FAULT: {line}" for line in found.faults()),
        ]
    )


def _fail() -> None:
    raise RuntimeError("broken on purpose")


def _by_name(answer: Any, engine: Engine) -> dict[str, np.ndarray]:
    return answer if isinstance(answer, dict) else {engine.outputs[0].name: answer}


def main(engine: tyro.conf.Positional[Path], requests: int = 1_000_000, threads: int = 8, contexts: int = 3) -> int:
    """Soaks an engine, and prints what was found."""
    with Engine.load(engine, contexts=1) as one:
        builder: BuilderName = one.toolkit.name
        print(f"{engine}, {builder} {one.toolkit.version}, {cuda.device().name}", flush=True)
    found = soak(
        lambda: Engine.load(engine, contexts=contexts),
        requests=requests,
        threads=threads,
        say=lambda line: print(line, flush=True),
    )
    print(report(found))
    return 1 if found.faults() else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
