"""Running engines: the answers, GPU arrays, overlapping, threads, memory, and every mistake."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from deploy import cuda
from deploy.arrays import DeviceArray, read_inputs
from deploy.executor import GRAPHS_PER_EXECUTOR
from deploy.runtime import Engine
from qat.base.artifact import read_sidecar, sidecar_path, write_artifact
from qat.base.errors import UserError


def on_gpu(array: np.ndarray) -> DeviceArray:
    copied, stream = DeviceArray(array.shape, str(array.dtype)), cuda.Stream()
    stream.wait(waiting := cuda.Event().record(cuda.LEGACY_STREAM))  # the memory comes from that stream's pool
    cuda.copy(copied.memory.address, array.ctypes.data, array.nbytes, stream.handle)
    stream.synchronize()
    stream.close()
    waiting.close()
    return copied


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Nearly all codes are the same: one rounded the other way changes a logit by little."""
    return found.shape == expected.shape and bool(np.abs(found - expected).max() < 0.05 * np.abs(expected).max())


@pytest.mark.parametrize("batch", [1, 4, 8, 9, 20, 32])
def test_answers_of_both_profiles_are_onnx_runtimes(engine, images, expected, batch):
    assert close(engine(images[:batch]), expected[:batch])
    with engine.all_executors() as executors:
        assert executors[0].bind(batch).uses_graph


def test_what_the_engine_says_of_itself(engine):
    assert [(spec.name, spec.shape, spec.dtype) for spec in engine.inputs] == [("input", (-1, 3, 32, 32), "float32")]
    assert [(spec.name, spec.shape) for spec in engine.outputs] == [("logits", (-1, 10))]
    assert [str(profile) for profile in engine.profiles] == ["1,4,8", "9,32,32"]
    assert engine.max_batch == 32
    assert [engine.loaded.profile_for(batch) for batch in (1, 8, 9, 32)] == [0, 0, 1, 1]


def test_a_dict_of_inputs(engine, images, expected):
    assert close(engine({"input": images[:3]}), expected[:3])


def test_arrays_that_are_not_contiguous_are_copied_on_the_host(engine, images, expected):
    turned = np.asfortranarray(images[:4])
    assert not turned.flags.c_contiguous
    assert np.array_equal(engine(turned), engine(images[:4]))


def test_arrays_on_the_gpu_stay_there(engine, images):
    found = engine(on_gpu(images[:5]))
    assert isinstance(found, DeviceArray)
    assert found.__cuda_array_interface__["shape"] == (5, 10)
    assert np.array_equal(found.numpy(), engine(images[:5]))


def test_arrays_of_pycuda_go_through_without_the_host(engine, images, monkeypatch):
    pytest.importorskip("pycuda.autoprimaryctx", reason="pycuda is not installed", exc_type=ImportError)
    from pycuda import gpuarray

    given = gpuarray.to_gpu(images[:5])
    assert read_inputs(given, engine.inputs).arrays[0].address == int(given.gpudata)
    monkeypatch.setattr(cuda, "PinnedMemory", lambda *_: pytest.fail("it goes through the host"))
    found = engine(given)
    monkeypatch.undo()
    assert isinstance(found, DeviceArray)
    assert np.array_equal(found.numpy(), engine(images[:5]))


def test_results_on_the_gpu_are_the_callers_own(engine, images):
    first = engine(on_gpu(images[:2]))
    before = first.numpy()
    for start in range(4, 12, 2):
        engine(on_gpu(images[start : start + 2]))
    assert np.array_equal(first.numpy(), before)


def test_a_stream_that_is_still_computing_is_waited_for(engine, images):
    stream = cuda.Stream()
    pinned = engine.pinned_input(4)
    pinned[...] = images[:4]
    target, zeros = on_gpu(np.zeros_like(images[:4])), on_gpu(np.zeros_like(images[:4]))
    for _ in range(500):  # keeps the stream busy, the right values come last
        cuda.copy(target.memory.address, zeros.memory.address, target.size, stream.handle)
    cuda.copy(target.memory.address, pinned.ctypes.data, target.size, stream.handle)
    interface = {**target.__cuda_array_interface__, "stream": stream.handle}
    found = engine(SimpleNamespace(__cuda_array_interface__=interface)).numpy()
    assert np.array_equal(found, engine(images[:4]))
    stream.close()


def test_map_keeps_order_over_many_batch_sizes(engine, images):
    sizes = [1, 8, 3, 32, 1, 9, 2, 2, 30]
    batches = [images[:size] for size in sizes]
    alone = [engine(batch) for batch in batches]
    for found, wanted in zip(engine.map(iter(batches)), alone, strict=True):
        assert np.array_equal(found, wanted)


def test_map_from_pinned_memory(engine, images):
    given = []
    for start in range(0, 32, 8):
        array = engine.pinned_input(8)
        assert cuda.is_pinned(array.ctypes.data)
        array[...] = images[start : start + 8]
        given.append(array)
    assert not cuda.is_pinned(images.ctypes.data)
    found = np.concatenate(list(engine.map(given)))
    assert np.array_equal(found, np.concatenate([engine(images[start : start + 8]) for start in range(0, 32, 8)]))


def test_a_map_that_is_left_early_gives_its_executors_back(engine, images):
    for _ in range(3):
        for _found in engine.map([images[:2]] * 8):
            break
    assert engine(images[:2]).shape == (2, 10)


def test_more_batch_sizes_than_graphs_are_kept(engine, images):
    wanted = {batch: engine(images[:batch]) for batch in range(1, GRAPHS_PER_EXECUTOR + 9)}
    for batch, found in wanted.items():
        assert np.array_equal(engine(images[:batch]), found)


def test_threads_share_an_engine(engine, images):
    alone = {batch: engine(images[:batch]) for batch in range(1, 9)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for batch in np.random.default_rng(seed).integers(1, 9, 60):
            if not np.array_equal(engine(images[:batch]), alone[int(batch)]):
                wrong.append(int(batch))
        for found in engine.map([images[:4]] * 10):
            if not np.array_equal(found, alone[4]):
                wrong.append(4)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []


def test_a_map_that_is_still_held_ends_when_the_engine_is_closed(engine_path, images):
    with Engine.load(engine_path, contexts=2) as engine:
        running = engine.map([images[:4]] * 6)
        next(running)
    with pytest.raises(ValueError, match="the engine is closed"):
        next(running)


def test_gpu_results_are_read_while_another_thread_captures(engine_path, images):
    with Engine.load(engine_path, contexts=2) as engine:
        given, stop = on_gpu(images[:2]), threading.Event()

        def read() -> None:
            while not stop.is_set():
                engine(given).numpy()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for batch in range(1, GRAPHS_PER_EXECUTOR):
                engine(images[:batch])
        finally:
            stop.set()
            reader.join(30)
        with engine.all_executors() as executors:
            assert all(executor.bind(batch).uses_graph for executor in executors for batch in (1, 2, 5, 8, 12))


def test_closing_waits_for_running_calls_and_refuses_later_ones(engine_path, images):
    engine = Engine.load(engine_path, contexts=1)
    answers: list[str] = []

    def work() -> None:
        try:
            while True:
                engine(images[:8])
                answers.append("answered")
        except ValueError as error:
            answers.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(answers) < 10:
        pass
    engine.close()
    for thread in threads:
        thread.join(30)
    assert answers.count("the engine is closed") == 3
    engine.close()


def test_all_memory_is_freed(engine_path, images):
    def use() -> None:
        with Engine.load(engine_path, contexts=3) as engine:
            for batch in (1, 8, 32):
                engine(images[:batch])
                engine(on_gpu(images[:batch]))

    use()  # CUDA keeps its kernels from the first use on
    before = cuda.free_memory()
    for _ in range(5):
        use()
    assert before - cuda.free_memory() < 8 * 2**20


# --- mistakes


def refused(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_inputs_that_do_not_fit(engine, images):
    assert "batch of 40 is outside what the engine takes (1 to 8 or 9 to 32)" in refused(lambda: engine(images))
    assert "batch of 0 is outside" in refused(lambda: engine(images[:0]))
    assert "has shape [4, 3, 32, 16]; the engine takes [N, 3, 32, 32]" in refused(lambda: engine(images[:4, :, :, :16]))
    assert "is float64; the engine takes float32" in refused(lambda: engine(images[:4].astype(np.float64)))
    assert "the engine has the inputs input; given: x" in refused(lambda: engine({"x": images[:4]}))
    assert "is a list" in refused(lambda: engine([1, 2]))
    given = on_gpu(images[:4])
    interface = {**given.__cuda_array_interface__, "strides": (4, 8, 16, 32)}
    strided = SimpleNamespace(__cuda_array_interface__=interface)
    assert "not C-contiguous on the GPU" in refused(lambda: engine(strided))
    assert engine(images[:4]).shape == (4, 10)  # and goes on working


@pytest.fixture
def copied(engine_path, tmp_path) -> Path:
    target = tmp_path / "copy.engine"
    sidecar = read_sidecar(engine_path, "engine")
    write_artifact(target, sidecar, lambda path: path.write_bytes(engine_path.read_bytes()) and None)
    return target


def rewrite(path: Path, **details: object) -> None:
    sidecar = read_sidecar(path, "engine")
    content = path.read_bytes()
    changed = dataclasses.replace(sidecar, details={**sidecar.details, **details})
    write_artifact(path, changed, lambda temporary: temporary.write_bytes(content) and None)


def test_a_truncated_engine(copied):
    copied.write_bytes(copied.read_bytes()[:-1000])
    assert "is truncated or is another one" in refused(lambda: Engine.load(copied))
    assert "cannot load the engine" in refused(lambda: Engine.load(copied, trust=True))
    copied.write_bytes(b"")
    assert "cannot load the engine" in refused(lambda: Engine.load(copied, trust=True))


def test_an_engine_without_sidecar_is_loaded_only_when_trusted(copied, images, expected):
    sidecar_path(copied).unlink()
    assert "no sidecar" in refused(lambda: Engine.load(copied))
    with Engine.load(copied, trust=True) as engine:
        assert close(engine(images[:8]), expected[:8])


def test_an_engine_of_another_version_or_gpu(copied, toolkit):
    rewrite(copied, builder={"name": "tensorrt", "version": "10.13.0"})
    assert f"was built by version 10.13.0, here is {toolkit.title}" in refused(lambda: Engine.load(copied))
    rewrite(copied, builder={"name": "tensorrt", "version": toolkit.version}, gpu="NVIDIA L4")
    assert "was built for NVIDIA L4, this GPU is " in refused(lambda: Engine.load(copied))


def test_out_of_memory_frees_everything(engine_path, images):
    cuda.device()
    before = cuda.free_memory()
    hog = cuda.DeviceMemory(before - 64 * 2**20)
    try:
        held = cuda.free_memory()
        assert "out of GPU memory" in refused(lambda: Engine.load(engine_path, contexts=400))
        assert held - cuda.free_memory() < 8 * 2**20
    finally:
        hog.close()
    with Engine.load(engine_path) as engine:
        assert engine(images[:2]).shape == (2, 10)


def test_no_context_at_all(engine_path):
    assert "0 contexts" in refused(lambda: Engine.load(engine_path, contexts=0))


def test_the_sidecar_names_gpu_driver_and_version(engine_path, toolkit):
    details = read_sidecar(engine_path, "engine").details
    assert details["builder"] == {"name": "tensorrt", "version": toolkit.version}
    assert details["device"]["name"] == details["gpu"] == toolkit.device.name
    assert details["device"]["driver"][0].isdigit()
    assert details["profiles"] == [{"min": 1, "opt": 4, "max": 8}, {"min": 9, "opt": 32, "max": 32}]
    assert any(line.startswith("INFO: ") for line in details["log"])
    assert json.dumps(details)
