"""What a driver of CUDA gets of a launch; the kernels themselves run in tests/gpu."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qat.compute.cuda_kernels import Kernels


class Driver:
    """Reads the arguments of (const float*, int) where a kernel would."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.error = 0

    def cuLaunchKernel(self, function: str, *about: Any) -> int:  # noqa: N802 (the driver's name)
        *sizes, stream, addresses, extra = about
        pointer = ctypes.cast(addresses[0], ctypes.POINTER(ctypes.c_void_p))[0]
        number = ctypes.cast(addresses[1], ctypes.POINTER(ctypes.c_int))[0]
        self.launched.append((function, *sizes, stream.value, pointer, number, extra))
        return self.error


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=2**40))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=7))
    monkeypatch.setattr(torch.cuda, "_compile_kernel", lambda source, name: SimpleNamespace(func=name))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    return driver


def test_all_kernels_are_launched_with_the_same_arguments(driver: Driver) -> None:
    x = torch.zeros(5)
    Kernels("histogram.cu", "", ["first", "second"], torch.device("cuda"), threads=64, blocks=2).launch(x, 5)
    given = (14, 1, 1, 64, 1, 1, 0, 2**40, x.data_ptr(), 5, None)
    assert driver.launched == [("first", *given), ("second", *given)]


def test_a_launch_that_fails_is_an_error(driver: Driver) -> None:
    driver.error = 719
    with pytest.raises(RuntimeError, match="719"):
        Kernels("histogram.cu", "", ["first"], torch.device("cuda"), threads=64, blocks=2).launch(torch.zeros(5), 5)
