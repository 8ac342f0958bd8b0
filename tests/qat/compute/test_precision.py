"""How float32 is computed is a setting of the process, which is as before afterwards."""

from __future__ import annotations

import pytest
import torch

from qat.compute.precision import denormals_flushed


def tiny() -> float:
    return float((torch.tensor(1e-40) * 1).item())


@pytest.mark.parametrize("before", [False, True])
def test_denormals_count_as_zero_inside_and_as_before_afterwards(before: bool) -> None:
    torch.set_flush_denormal(before)
    try:
        found = tiny()
        with denormals_flushed():
            assert tiny() == 0
        assert tiny() == found
        assert (found == 0) == before
    finally:
        torch.set_flush_denormal(False)
