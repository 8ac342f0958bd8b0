"""CUDA kernels of our own: compiled by torch, launched here.

torch's launch loads the driver's library anew each time: 136 microseconds of the CPU on an H200's host, where all
layers of ResNet50 are sent in 7 ms (benchmarks/gpu_training_step.txt).
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Kernels:
    """Kernels that take the same arguments and run one after the other on the same grid."""

    def __init__(
        self, file: str, constants: str, names: list[str], device: torch.device, threads: int, blocks: int
    ) -> None:
        """Compiles a ``file`` beside this one, behind ``constants``, for ``device``.

        ``names``: its kernels in the order in which they run; ``blocks`` of ``threads`` run on each processor.

        Raises OSError or RuntimeError where there is no compiler (NVRTC, and CUDA's folder, which torch wants to know).
        """
        self.device, self.threads = device, threads
        source = constants + Path(__file__).with_name(file).read_text(encoding="utf-8")
        self.blocks = blocks * torch.cuda.get_device_properties(device).multi_processor_count
        with torch.cuda.device(device):
            # Underscored, but there in every version that pyproject.toml admits.
            self.compiled = [torch.cuda._compile_kernel(source, name) for name in names]
        self.driver: Any = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")

    def launch(self, *arguments: Tensor | int) -> None:
        """On the device's current stream, without waiting; a tensor is given as its address, an int as an int."""
        values = [ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(a.data_ptr()) for a in arguments]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        grid, block, shared_bytes = (self.blocks, 1, 1), (self.threads, 1, 1), 0
        with torch.cuda.device(self.device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            for kernel in self.compiled:
                error = self.driver.cuLaunchKernel(kernel.func, *grid, *block, shared_bytes, stream, addresses, None)
                if error:
                    raise RuntimeError(f"a CUDA kernel could not be launched: error {error} of the driver")
