"""Spoiled files: every reader takes one, or refuses it in one line that names it, within seconds.

``FUZZ_CASES`` says how many for each reader; ``scripts/fuzz`` tries ten thousand in all, with another seed each time.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fuzz_readers import READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qat.base.errors import UserError

CASES = int(os.environ.get("FUZZ_CASES", "12"))
SECONDS = 10


@contextmanager
def within_seconds() -> Iterator[None]:
    """Ends what takes longer than a file of a few kilobytes may."""

    def late(*_: object) -> None:
        raise AssertionError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")  # of Pillow and NumPy, about what they then read all the same
def test_a_spoiled_file_is_taken_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    whole = tmp_path / "whole"
    whole.mkdir()
    seeds = [path.relative_to(whole) for path in reader.make(whole)]
    for seed in seeds:
        reader.read(whole / seed)

    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        derandomize="FUZZ_CASES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(seeds), reader.mutation)
    def spoil(seed: Path, mutation: object) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            place = Path(folder) / "set"
            shutil.copytree(whole, place)
            path = place / seed
            path.write_bytes(mutation(path.read_bytes()))
            try:
                with within_seconds():
                    reader.read(path)
            except UserError as error:
                line = str(error)
                assert "\n" not in line
                assert str(place) in line, line
                assert len(line) < 2000

    spoil()
