"""What CUDA's errors become: one line with a remedy for what a user can mend, an internal error for the rest."""

from __future__ import annotations

import pytest

from deploy import cuda
from qat.base.errors import UserError

runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is a package of Linux")


def explained(name: str) -> Exception:
    return cuda._error_for(getattr(runtime.cudaError_t, name), "cudaSomething")


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("cudaErrorMemoryAllocation", "out of GPU memory: use a smaller batch"),
        ("cudaErrorSystemDriverMismatch", "restart the machine"),
        ("cudaErrorDevicesUnavailable", "another program uses the GPU exclusively"),
        ("cudaErrorInitializationError", "check that nvidia-smi works"),
        ("cudaErrorStubLibrary", "LD_LIBRARY_PATH"),
        ("cudaErrorCompatNotSupportedOnDevice", "update the driver"),
    ],
)
def test_what_a_user_can_mend(code, remedy):
    error = explained(code)
    assert isinstance(error, UserError)
    assert remedy in str(error)
    assert "\n" not in str(error)


def test_every_remedy_is_for_an_error_that_exists():
    assert {name for name in cuda._REMEDIES if not hasattr(runtime.cudaError_t, name)} == set()


def test_a_fault_of_the_program_stays_one():
    error = explained("cudaErrorIllegalAddress")
    assert isinstance(error, RuntimeError)
    assert not isinstance(error, UserError)
    assert str(error).startswith("cudaSomething: cudaErrorIllegalAddress, ")


def test_calls_return_values_or_raise():
    ok, bad = runtime.cudaError_t.cudaSuccess, runtime.cudaError_t.cudaErrorIllegalAddress
    assert cuda.call(lambda: (ok,)) is None
    assert cuda.call(lambda value: (ok, value), 7) == 7
    assert cuda.call(lambda: (ok, 1, 2)) == (1, 2)
    with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
        cuda.call(lambda: (bad, None))


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (0, "there is no NVIDIA driver"),
        (11080, "the NVIDIA driver is too old: it runs CUDA 11.8, cuda-python needs"),
    ],
)
def test_a_driver_that_is_missing_or_too_old(driver, message, monkeypatch):
    monkeypatch.setattr(runtime, "cudaDriverGetVersion", lambda: (runtime.cudaError_t.cudaSuccess, driver))
    assert message in str(explained("cudaErrorInsufficientDriver"))


def test_a_driver_without_gpu(monkeypatch):
    monkeypatch.setattr(runtime, "cudaDriverGetVersion", lambda: (runtime.cudaError_t.cudaSuccess, 13000))
    assert "the NVIDIA driver finds no GPU" in str(explained("cudaErrorNoDevice"))


def test_versions_are_written_as_people_do():
    assert cuda._cuda_version(13020) == "13.2"
    assert cuda._cuda_version(12090) == "12.9"
