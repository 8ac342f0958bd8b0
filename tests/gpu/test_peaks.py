"""What the GPU can do at most: figures that a GPU can have, and INT8 above FP16."""

from __future__ import annotations

from deploy.installed import find_toolkit
from deploy.peaks import measure_peaks


def test_peaks_are_those_of_a_gpu() -> None:
    found = measure_peaks(find_toolkit("tensorrt"))
    assert 5e10 < found.bytes_per_s < 2e13
    assert 1e12 < found.fp16_per_s < found.int8_per_s < 1e16
