"""How tests run command lines, and training that is the same to the last bit in any process."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

ROOT = Path(__file__).parents[2]


ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # networks as small as these wait for the second thread more than it helps


@contextmanager
def one_thread() -> Iterator[None]:
    """Training in this process, bit by bit as in those with ONE_THREAD; torch's settings are as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Run(Protocol):
    """Runs ``python -m module arguments``, from the root of the repository where nothing else is said."""

    def __call__(
        self,
        module: str,
        *arguments: object,
        environment: dict[str, str] | None = None,
        file_size: int | None = None,
        folder: Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        """``file_size``: the longest file, in bytes, that the command can write; ``folder``: where it runs."""
