"""Feeds TensorRT's calibrators: batches in GPU memory, the next one prepared while the last is used.

A calibrator is called back from inside a build, through C++, where no exception may pass: what fails is kept, and
raised when the build has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from deploy import cuda
from deploy.calibration_inputs import CalibrationInputs
from deploy.settings import CalibrationSettings
from qat.base.errors import UserError

if TYPE_CHECKING:
    import tensorrt as trt

    from deploy.trt import Toolkit

OnBatch = Callable[[int, int], None]
"""Called with how many images were fed, and how many there are."""


class Buffer(Protocol):
    """Memory for one batch of one input, at ``address``."""

    address: int

    def write(self, batch: np.ndarray) -> None:
        """Copies ``batch``; it is there when this returns."""

    def close(self) -> None:
        """Frees the memory."""


class GpuBuffer:
    """GPU memory that is filled through pinned host memory, on a stream of its own."""

    def __init__(self, size: int) -> None:
        with ExitStack() as made:  # what was made before a failure is freed
            memory = cuda.DeviceMemory(size)
            made.callback(memory.close)
            self._pinned = cuda.PinnedMemory(size)
            made.callback(self._pinned.close)
            self._stream = cuda.Stream()
            made.callback(self._stream.close)
            self.address, self._owned = memory.address, made.pop_all()

    def write(self, batch: np.ndarray) -> None:
        """Copies ``batch`` and waits for the copy."""
        self._pinned.array(batch.shape, str(batch.dtype))[...] = batch
        cuda.copy(self.address, self._pinned.address, batch.nbytes, self._stream.handle)
        self._stream.synchronize()

    def close(self) -> None:
        """Frees all of it."""
        self._owned.close()


class BatchFeed:
    """Whole batches of ``inputs``, one after the other, in two buffers for each input.

    The memory of a batch stays as it is until the next batch is asked for: TensorRT has used it by then.
    """

    def __init__(
        self,
        inputs: CalibrationInputs,
        batch: int,
        buffer: Callable[[int], Buffer] = GpuBuffer,
        on_thread: Callable[[], None] = lambda: None,
    ) -> None:
        """``buffer(size)`` makes memory of ``size`` bytes; ``on_thread`` is called first on the thread that fills."""
        self._inputs, self.batch, self._batches = inputs, batch, inputs.count // batch
        first = inputs.read(0, batch)
        self._buffers: tuple[dict[str, Buffer], dict[str, Buffer]] = ({}, {})
        with ExitStack() as made:  # what was made before a failure is freed
            for buffers in self._buffers:
                for name, array in first.items():
                    buffers[name] = buffer(array.nbytes)
                    made.callback(buffers[name].close)
            self._owned = made.pop_all()
        self._pool = ThreadPoolExecutor(1, initializer=on_thread)
        self._given, self._next = 0, self._fill(0)

    @property
    def images_given(self) -> int:
        """How many images were handed out."""
        return self._given * self.batch

    @property
    def images(self) -> int:
        """How many there are in whole batches."""
        return self._batches * self.batch

    def next(self, names: Sequence[str]) -> list[int] | None:
        """Addresses of the next batch, for the inputs ``names``; None after the last."""
        if self._next is None:
            return None
        filled = self._next.result()
        self._given += 1
        self._next = self._fill(self._given)
        return [filled[name].address for name in names]

    def close(self) -> None:
        """Waits for the thread and frees the memory."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._owned.close()

    def _fill(self, index: int) -> Future[Mapping[str, Buffer]] | None:
        if index >= self._batches:
            return None

        def fill() -> Mapping[str, Buffer]:
            buffers = self._buffers[index % 2]
            for name, array in self._inputs.read(index * self.batch, (index + 1) * self.batch).items():
                buffers[name].write(np.ascontiguousarray(array))
            return buffers

        return self._pool.submit(fill)


class Calibration:
    """What implicit INT8 is calibrated with: inputs, or what TensorRT has calibrated before.

    Attributes:
        cache: the calibration cache that was given or that a build has written; b"" before.
        calibrated: whether a build has calibrated.
        images: how many inputs it has used: those in whole batches.
    """

    def __init__(self, settings: CalibrationSettings, inputs: CalibrationInputs | None, cache: bytes = b"") -> None:
        self.settings, self._inputs, self.cache, self.calibrated, self.images = settings, inputs, cache, False, 0

    @property
    def batch(self) -> int:
        """Images in a batch, for a network with a dynamic batch; at most as many as there are."""
        return min(self.settings.calibration_batch, self._inputs.count) if self._inputs else 1

    @contextmanager
    def during_build(
        self, toolkit: Toolkit, config: trt.IBuilderConfig, batch: int, on_batch: OnBatch
    ) -> Iterator[None]:
        """While the block builds, ``config`` has a calibrator for batches of ``batch`` images.

        Raises UserError when this version has no such calibrator, and afterwards what failed inside of it.
        """
        base = toolkit.calibrator_class(self.settings.calibrator)
        with ExitStack() as stack:
            feed = None
            if not self.cache:
                assert self._inputs is not None
                self._inputs.check_batch(batch)
                device = cuda.current_device()
                feed = BatchFeed(self._inputs, batch, on_thread=lambda: cuda.use_device(device))
                stack.callback(feed.close)
            calls = Calls(feed, self.cache, batch, on_batch)
            calibrator = make_calibrator(base, calls, self.settings.quantile, self.settings.regression_cutoff)
            config.int8_calibrator = calibrator
            if self.settings.calibrate_before_fusion:
                toolkit.calibrate_before_fusion(config)
            try:
                yield
            finally:
                if calls.failure:
                    raise calls.failure
                if calls.written:  # kept although the build may fail
                    self.cache, self.calibrated = calls.written, True
                    self.images = feed.images_given if feed else 0


class Calls:
    """What a calibrator answers to TensorRT. What fails is kept in ``failure``, and ends the calibration."""

    def __init__(self, feed: BatchFeed | None, cache: bytes, batch: int, on_batch: OnBatch) -> None:
        self._feed, self._cache, self._on_batch = feed, cache, on_batch
        self.batch, self.written = batch, b""
        self.failure: BaseException | None = None

    def next_batch(self, names: Sequence[str]) -> list[int] | None:
        """Addresses of the next batch; None if there is none."""
        try:
            if self._feed is None:
                raise UserError(
                    "TensorRT does not take the calibration cache, which another calibrator or version wrote: give "
                    "--data to calibrate again, or --trust-cache"
                )
            addresses = self._feed.next(names)
            self._on_batch(self._feed.images_given, self._feed.images)
            return addresses
        except BaseException as error:
            self.failure = self.failure or error
            return None

    def read_cache(self) -> bytes | None:
        """The cache that was given, if one was."""
        return self._cache or None

    def write_cache(self, content: Any) -> None:
        """Keeps what TensorRT has calibrated."""
        self.written = bytes(content)


def make_calibrator(base: type[Any], calls: Calls, quantile: float, regression_cutoff: float) -> Any:
    """A calibrator that passes everything on to ``calls``; ``base`` is TensorRT's class of it."""

    class Calibrator(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def get_batch_size(self) -> int:
            return calls.batch

        def get_batch(self, names: Sequence[str]) -> list[int] | None:
            return calls.next_batch(names)

        def read_calibration_cache(self) -> bytes | None:
            return calls.read_cache()

        def write_calibration_cache(self, cache: Any) -> None:
            calls.write_cache(cache)

        # Only the legacy calibrator is asked for these.

        def get_quantile(self) -> float:
            return quantile

        def get_regression_cutoff(self) -> float:
            return regression_cutoff

        def read_histogram_cache(self, length: int) -> None:
            return None

        def write_histogram_cache(self, data: Any, length: int) -> None:
            return None

    return Calibrator()
