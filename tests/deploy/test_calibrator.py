"""What TensorRT's calibrators are fed and answer, without TensorRT and without a GPU: batches, caches, failures."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploy import cuda
from deploy.calibration_inputs import CalibrationInputs
from deploy.calibrator import BatchFeed, Calibration, Calls, make_calibrator
from deploy.settings import CalibrationSettings
from qat.base.errors import UserError

SECONDS = 10  # after which a thread is taken to hang
CACHE = b"TRT-8600-EntropyCalibration2\ninput: 3caa1f6d\n"


class Memory:
    """Fake buffers: what was written into each, and which are open."""

    def __init__(self) -> None:
        self.content: dict[int, np.ndarray] = {}
        self.opened: list[int] = []
        self.closed: list[int] = []
        self.written = threading.Semaphore(0)
        self.room = 99

    def buffer(self, size: int) -> Any:
        if len(self.opened) == self.room:
            raise UserError("out of GPU memory")
        address = 4096 * (len(self.opened) + 1)
        self.opened.append(address)

        def write(batch: np.ndarray) -> None:
            assert batch.nbytes == size
            assert batch.flags.c_contiguous
            self.content[address] = batch.copy()
            self.written.release()

        return SimpleNamespace(address=address, write=write, close=lambda: self.closed.append(address))

    @property
    def all_closed(self) -> bool:
        return sorted(self.opened) == sorted(set(self.closed))


@pytest.fixture
def memory() -> Memory:
    return Memory()


def inputs_of(
    count: int, names: tuple[str, ...] = ("input",), on_read: Callable[[int, int], None] = lambda start, stop: None
) -> CalibrationInputs:
    """``count`` inputs; number i of input n is filled with 100 * n + i."""
    arrays = {
        name: np.repeat(np.float32(100 * number + np.arange(count))[:, None], 2 + number, axis=1)
        for number, name in enumerate(names)
    }

    def read(start: int, stop: int) -> dict[str, np.ndarray]:
        on_read(start, stop)
        return {name: array[start:stop] for name, array in arrays.items()}

    return CalibrationInputs("a test", count, "0" * 64, read)


def firsts(memory: Memory, address: int) -> list[float]:
    """The first value of each image of the batch at ``address``."""
    return [float(value) for value in memory.content[address][:, 0]]


# --- batches


def test_whole_batches_are_handed_out_in_order_and_then_none(memory: Memory) -> None:
    feed = BatchFeed(inputs_of(8), 3, memory.buffer)
    assert (feed.images, feed.images_given) == (6, 0)
    found = []
    while (addresses := feed.next(["input"])) is not None:
        assert len(addresses) == 1
        found.append(firsts(memory, addresses[0]))
        assert feed.images_given == 3 * len(found)
    assert found == [[0, 1, 2], [3, 4, 5]]  # 6 and 7 are no whole batch
    assert feed.next(["input"]) is None
    assert feed.images_given == 6
    feed.close()
    assert memory.all_closed


def test_addresses_are_in_the_order_of_the_names_that_are_asked_for(memory: Memory) -> None:
    feed = BatchFeed(inputs_of(4, ("a", "b", "c")), 2, memory.buffer)
    for number in range(2):
        addresses = feed.next(["c", "a", "b"])
        assert addresses is not None
        assert [firsts(memory, address)[0] for address in addresses] == [
            200 + 2 * number,
            2 * number,
            100 + 2 * number,
        ]
    feed.close()


@pytest.mark.parametrize("names", [("input",), ("a", "b")])
def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for(memory: Memory, names: tuple[str, ...]) -> None:
    batches = 5
    feed = BatchFeed(inputs_of(2 * batches, names), 2, memory.buffer)
    for number in range(batches):
        addresses = feed.next(names)
        assert addresses is not None
        for _ in names if number == 0 else ():  # what the first batch itself has written
            assert memory.written.acquire(timeout=SECONDS)
        for _ in names if number < batches - 1 else ():  # the next batch is complete now
            assert memory.written.acquire(timeout=SECONDS)
        assert not memory.written.acquire(blocking=False)  # and it is the only one
        for index, address in enumerate(addresses):
            assert firsts(memory, address) == [100 * index + 2 * number, 100 * index + 2 * number + 1]
    feed.close()


def test_the_next_batch_is_read_while_the_last_is_in_use(memory: Memory) -> None:
    reading, allowed = threading.Event(), threading.Event()

    def on_read(start: int, stop: int) -> None:
        if start == 2:
            reading.set()
            assert allowed.wait(SECONDS)

    feed = BatchFeed(inputs_of(6, on_read=on_read), 2, memory.buffer)
    assert not reading.is_set()
    addresses = feed.next(["input"])  # answers although the next batch is not there
    assert addresses is not None
    assert reading.wait(SECONDS)  # and nobody has asked for that
    assert firsts(memory, addresses[0]) == [0, 1]
    allowed.set()
    second = feed.next(["input"])
    assert second is not None
    assert firsts(memory, second[0]) == [2, 3]
    feed.close()


def test_the_thread_that_fills_is_set_up_first(memory: Memory) -> None:
    set_up, read_on = [], []
    feed = BatchFeed(
        inputs_of(4, on_read=lambda start, stop: read_on.append(threading.get_ident())),
        2,
        memory.buffer,
        on_thread=lambda: set_up.append(threading.get_ident()),
    )
    while feed.next(["input"]):
        pass
    feed.close()
    assert len(set_up) == 1
    assert set(read_on) == {threading.get_ident(), set_up[0]}  # this one asks for the sizes


def test_an_error_of_the_reader_is_raised_when_its_batch_is_asked_for(memory: Memory) -> None:
    def on_read(start: int, stop: int) -> None:
        if start == 2:
            raise UserError("the image is gone")

    feed = BatchFeed(inputs_of(6, on_read=on_read), 2, memory.buffer)
    assert feed.next(["input"]) is not None
    with pytest.raises(UserError, match="the image is gone"):
        feed.next(["input"])
    feed.close()
    assert memory.all_closed


def test_buffers_are_freed_while_a_batch_is_still_being_read(memory: Memory) -> None:
    reading, allowed = threading.Event(), threading.Event()

    def on_read(start: int, stop: int) -> None:
        if start == 2:
            reading.set()
            allowed.wait(SECONDS)

    feed = BatchFeed(inputs_of(4, on_read=on_read), 2, memory.buffer)
    feed.next(["input"])
    assert reading.wait(SECONDS)
    closing = threading.Thread(target=feed.close)
    closing.start()
    assert memory.closed == []  # it is still written to
    allowed.set()
    closing.join(SECONDS)
    assert memory.all_closed


@pytest.mark.parametrize("room", [0, 1, 3])
def test_memory_that_does_not_suffice_frees_what_was_taken(memory: Memory, room: int) -> None:
    memory.room = room
    with pytest.raises(UserError, match="out of GPU memory"):
        BatchFeed(inputs_of(4, ("a", "b")), 2, memory.buffer)
    assert len(memory.opened) == room
    assert memory.all_closed


# --- answers to TensorRT


def calls_of(memory: Memory, inputs: CalibrationInputs | None, cache: bytes = b"", batch: int = 2) -> Calls:
    feed = None if inputs is None else BatchFeed(inputs, batch, memory.buffer)
    return Calls(feed, cache, batch, lambda given, images: None)


@pytest.mark.parametrize("error", [UserError("gone"), ValueError("odd"), KeyboardInterrupt()])
def test_what_fails_is_kept_and_ends_the_calibration(memory: Memory, error: BaseException) -> None:
    def on_batch(given: int, images: int) -> None:
        raise error

    calls = Calls(BatchFeed(inputs_of(4), 2, memory.buffer), b"", 2, on_batch)
    assert calls.next_batch(["input"]) is None
    assert calls.failure is error
    assert calls.next_batch(["unknown"]) is None
    assert calls.failure is error  # the first one says why


def test_a_name_that_the_inputs_lack_is_kept_as_a_failure(memory: Memory) -> None:
    calls = calls_of(memory, inputs_of(4))
    assert calls.next_batch(["input", "other"]) is None
    assert calls.failure is not None


def test_what_was_fed_is_reported_after_each_batch(memory: Memory) -> None:
    reported = []
    calls = Calls(BatchFeed(inputs_of(7), 3, memory.buffer), b"", 3, lambda *counts: reported.append(counts))
    while calls.next_batch(["input"]):
        pass
    assert reported[:2] == [(3, 6), (6, 6)]
    assert calls.failure is None


def test_caches_pass_byte_by_byte(memory: Memory) -> None:
    odd = bytes(range(256)) + b"\r\n\0"
    calls = calls_of(memory, None, odd)
    assert calls.read_cache() == odd
    assert calls_of(memory, inputs_of(2)).read_cache() is None
    for given in (odd, bytearray(odd), memoryview(odd), np.frombuffer(odd, np.uint8)):
        calls.write_cache(given)
        assert calls.written == odd
        assert type(calls.written) is bytes


def test_a_cache_that_tensorrt_does_not_take_is_said(memory: Memory) -> None:
    calls = calls_of(memory, None, CACHE)
    assert calls.next_batch(["input"]) is None
    assert isinstance(calls.failure, UserError)
    assert "does not take the calibration cache" in str(calls.failure)
    assert "--data" in str(calls.failure)
    assert "\n" not in str(calls.failure)


class Base:
    """As TensorRT's classes: its constructor must be called."""

    constructed = False

    def __init__(self) -> None:
        self.constructed = True


def test_a_calibrator_has_all_that_tensorrt_calls(memory: Memory) -> None:
    calibrator = make_calibrator(Base, calls_of(memory, inputs_of(5), batch=4), 0.5, 0.25)
    assert isinstance(calibrator, Base)
    assert calibrator.constructed
    assert calibrator.get_batch_size() == 4
    assert calibrator.read_calibration_cache() is None
    addresses = calibrator.get_batch(["input"])
    assert firsts(memory, addresses[0]) == [0, 1, 2, 3]
    assert all(type(address) is int for address in addresses)
    assert calibrator.get_batch(["input"]) is None
    assert calibrator.write_calibration_cache(memoryview(CACHE)) is None
    assert calibrator.get_quantile() == 0.5
    assert calibrator.get_regression_cutoff() == 0.25
    assert calibrator.read_histogram_cache(9) is None
    assert calibrator.write_histogram_cache(object(), 9) is None
    kept = make_calibrator(Base, calls_of(memory, None, CACHE), 1, 1)
    assert kept.read_calibration_cache() == CACHE


# --- a build, with host memory instead of the GPU's


class HostMemory:
    """In place of GPU memory and pinned memory."""

    open = 0

    def __init__(self, size: int) -> None:
        self._bytes = ctypes.create_string_buffer(size)
        self.address = ctypes.addressof(self._bytes)
        HostMemory.open += 1

    def array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.frombuffer(self._bytes, dtype, count=int(np.prod(shape))).reshape(shape)

    def close(self) -> None:
        HostMemory.open -= 1


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Host memory for CUDA's; (thread, GPU) whenever a thread chooses its GPU. Everything must be freed."""
    chosen: list[tuple[int, int]] = []
    monkeypatch.setattr(HostMemory, "open", 0)
    monkeypatch.setattr(cuda, "DeviceMemory", HostMemory)
    monkeypatch.setattr(cuda, "PinnedMemory", HostMemory)
    stream = SimpleNamespace(handle=0, synchronize=lambda: None, close=lambda: None)
    monkeypatch.setattr(cuda, "Stream", lambda: stream)
    monkeypatch.setattr(cuda, "copy", lambda target, source, size, _: ctypes.memmove(target, source, size))
    monkeypatch.setattr(cuda, "current_device", lambda: 3)
    monkeypatch.setattr(cuda, "use_device", lambda number: chosen.append((threading.get_ident(), number)))
    yield chosen
    assert HostMemory.open == 0


class TensorRT:
    """A toolkit and a builder that calibrates as TensorRT does: what it was told and fed."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.asked_for: list[str] = []
        self.before_fusion = 0
        self.takes_caches = True

    def calibrator_class(self, name: str) -> type[Any]:
        self.asked_for.append(name)
        return Base

    def calibrate_before_fusion(self, config: Any) -> None:
        assert config.int8_calibrator is not None
        self.before_fusion += 1

    def build(self, config: Any) -> bytes | None:
        """The cache that it builds with, if calibration succeeds."""
        calibrator = config.int8_calibrator
        size = calibrator.get_batch_size()
        cache = calibrator.read_calibration_cache()
        if cache is not None and self.takes_caches:
            return bytes(cache)
        fed = 0
        while (addresses := calibrator.get_batch(["input"])) is not None:
            values = (ctypes.c_float * (2 * size)).from_address(addresses[0])
            self.batches.append(list(values)[::2])
            fed += 1
        if not fed:
            return None
        calibrator.write_calibration_cache(memoryview(CACHE))
        return CACHE


def calibrated(tensorrt: TensorRT, calibration: Calibration, batch: int = 2) -> bytes | None:
    config = SimpleNamespace(int8_calibrator=None)
    with calibration.during_build(tensorrt, config, batch, lambda given, images: None):
        return tensorrt.build(config)


def settings_of(**changes: Any) -> CalibrationSettings:
    return CalibrationSettings(data="a test", **changes)


def test_a_build_calibrates_once_and_then_takes_its_cache(devices: list[tuple[int, int]]) -> None:
    reads: list[int] = []
    inputs = inputs_of(5, on_read=lambda start, stop: reads.append(start))
    tensorrt, calibration = TensorRT(), Calibration(settings_of(calibrator="minmax"), inputs)
    assert (calibration.cache, calibration.calibrated) == (b"", False)
    assert calibrated(tensorrt, calibration) == CACHE
    assert tensorrt.batches == [[0, 1], [2, 3]]
    assert tensorrt.asked_for == ["minmax"]
    assert tensorrt.before_fusion == 0
    assert (calibration.cache, calibration.calibrated) == (CACHE, True)
    assert [number for _, number in devices] == [3]
    assert devices[0][0] != threading.get_ident()
    reads.clear()
    assert calibrated(tensorrt, calibration) == CACHE
    assert reads == []
    assert len(tensorrt.batches) == 2
    assert calibration.calibrated


def test_a_cache_that_was_given_is_used_without_inputs(devices: list[tuple[int, int]]) -> None:
    tensorrt, calibration = TensorRT(), Calibration(settings_of(), None, CACHE)
    assert calibrated(tensorrt, calibration) == CACHE
    assert (calibration.cache, calibration.calibrated) == (CACHE, False)
    assert tensorrt.batches == []


def test_a_cache_that_was_not_taken_is_an_error_after_the_build(devices: list[tuple[int, int]]) -> None:
    tensorrt, calibration = TensorRT(), Calibration(settings_of(), inputs_of(4), CACHE)
    tensorrt.takes_caches = False
    with pytest.raises(UserError, match="does not take the calibration cache"):
        calibrated(tensorrt, calibration)
    assert not calibration.calibrated


def test_calibration_before_fusion_is_asked_for(devices: list[tuple[int, int]]) -> None:
    tensorrt = TensorRT()
    calibrated(tensorrt, Calibration(settings_of(calibrator="legacy", calibrate_before_fusion=True), inputs_of(4)))
    assert tensorrt.before_fusion == 1


def test_what_failed_inside_is_raised_after_the_block(devices: list[tuple[int, int]]) -> None:
    def on_read(start: int, stop: int) -> None:
        if start == 2:
            raise UserError("the image is gone")

    tensorrt, calibration = TensorRT(), Calibration(settings_of(), inputs_of(6, on_read=on_read))
    config, after = SimpleNamespace(int8_calibrator=None), []
    with (  # noqa: PT012
        pytest.raises(UserError, match="the image is gone"),
        calibration.during_build(tensorrt, config, 2, lambda given, images: None),
    ):
        tensorrt.build(config)  # raises nothing: no exception may pass through TensorRT
        after.append(True)
    assert after
    assert tensorrt.batches == [[0, 1]]
    assert (calibration.cache, calibration.calibrated) == (b"", False)


def test_a_calibration_outlives_the_build_that_fails_after_it(devices: list[tuple[int, int]]) -> None:
    tensorrt, calibration = TensorRT(), Calibration(settings_of(), inputs_of(5))
    config = SimpleNamespace(int8_calibrator=None)
    with (  # noqa: PT012
        pytest.raises(RuntimeError, match="the build"),
        calibration.during_build(tensorrt, config, 2, lambda given, images: None),
    ):
        tensorrt.build(config)
        raise RuntimeError("the build")
    assert calibration.calibrated
    assert calibration.cache
    assert calibration.images == 4  # the fifth is in no whole batch


def test_a_build_that_fails_frees_the_memory_and_keeps_no_cache(devices: list[tuple[int, int]]) -> None:
    calibration = Calibration(settings_of(), inputs_of(4))
    with (
        pytest.raises(RuntimeError, match="the build"),
        calibration.during_build(TensorRT(), SimpleNamespace(), 2, lambda given, images: None),
    ):
        raise RuntimeError("the build")
    assert (calibration.cache, calibration.calibrated) == (b"", False)


@pytest.mark.parametrize("missing", ["DeviceMemory", "PinnedMemory", "Stream"])
def test_a_buffer_that_cannot_be_made_frees_its_parts(
    devices: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def refused(*size: int) -> None:
        raise UserError(f"no {missing}")

    monkeypatch.setattr(cuda, missing, refused)
    with pytest.raises(UserError, match=f"no {missing}"):
        calibrated(TensorRT(), Calibration(settings_of(), inputs_of(4)))


def test_a_version_without_the_calibrator_frees_the_memory(devices: list[tuple[int, int]]) -> None:
    class Older(TensorRT):
        def calibrator_class(self, name: str) -> type[Any]:
            raise UserError(f"there is no {name}")

    with pytest.raises(UserError, match="there is no entropy2"):
        calibrated(Older(), Calibration(settings_of(), inputs_of(4)))


def test_a_version_that_cannot_choose_when_it_calibrates_frees_the_memory(devices: list[tuple[int, int]]) -> None:
    class Older(TensorRT):
        def calibrate_before_fusion(self, config: Any) -> None:
            raise UserError("there is no choice")

    with pytest.raises(UserError, match="there is no choice"):
        calibrated(Older(), Calibration(settings_of(calibrate_before_fusion=True), inputs_of(4)))


def test_a_dynamic_batch_takes_at_most_as_many_images_as_there_are() -> None:
    assert Calibration(settings_of(calibration_batch=8), inputs_of(5)).batch == 5
    assert Calibration(settings_of(calibration_batch=4), inputs_of(5)).batch == 4
    assert Calibration(settings_of(), None, CACHE).batch == 1


def test_fewer_images_than_a_fixed_batch_are_refused_before_anything_is_built(devices: list[tuple[int, int]]) -> None:
    tensorrt = TensorRT()
    with pytest.raises(UserError, match="a test has 3 images, and a batch of calibration takes 4") as caught:
        calibrated(tensorrt, Calibration(settings_of(), inputs_of(3)), batch=4)
    assert "\n" not in str(caught.value)
    assert tensorrt.batches == []


def test_few_images_and_those_that_are_left_over_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    inputs_of(99).check_batch(10)
    said = capsys.readouterr()
    assert "warning: 99 calibration images are few" in said.err
    assert "9 of the 99 calibration images are left out" in said.out
    inputs_of(100).check_batch(10)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
