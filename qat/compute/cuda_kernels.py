"""Compiles our own CUDA kernels with torch, and launches them without it.

torch's own launch loads the driver's library each time, which takes 136 microseconds of CPU time on the host of an
H200, where all layers of ResNet50 are launched in 7 ms (benchmarks/gpu_training_step.txt).
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Kernels:
    """Kernels that take the same arguments and run one after another on the same grid."""

    def __init__(
        self, file: str, constants: str, names: list[str], device: torch.device, threads: int, blocks: int
    ) -> None:
        """Compiles ``constants`` followed by ``file``, which is in this folder, for ``device``.

        ``names``: the kernels in ``file``, in the order in which they run. ``blocks``: number of blocks of ``threads``
        threads that run on each multiprocessor.

        Raises OSError or RuntimeError when NVRTC or CUDA's folder, which torch asks for, is missing.
        """
        self.device, self.threads = device, threads
        source = constants + Path(__file__).with_name(file).read_text(encoding="utf-8")
        self.blocks = blocks * torch.cuda.get_device_properties(device).multi_processor_count
        with torch.cuda.device(device):
            # A private function, but every torch version that pyproject.toml allows has it.
            self.compiled = [torch.cuda._compile_kernel(source, name) for name in names]
        self.driver: Any = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")

    def launch(self, *arguments: Tensor | int) -> None:
        """Launches the kernels on the device's current stream, without waiting. A tensor is passed as its address."""
        values = [ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(a.data_ptr()) for a in arguments]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        grid, block, shared_bytes = (self.blocks, 1, 1), (self.threads, 1, 1), 0
        with torch.cuda.device(self.device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            for kernel in self.compiled:
                error = self.driver.cuLaunchKernel(kernel.func, *grid, *block, shared_bytes, stream, addresses, None)
                if error:
                    raise RuntimeError(f"a CUDA kernel could not be launched: the driver returned error {error}")
