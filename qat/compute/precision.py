"""Exact float32, as ONNX Runtime and the engine compute it; and without numbers that are slow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Inside this context, convolutions and matrix products do not use TF32, as in ONNX Runtime and the engine."""
    cudnn: Any = torch.backends.cudnn
    backends = (cudnn.conv, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextlib.contextmanager
def denormals_flushed() -> Iterator[None]:
    """In this thread float32 below 1.2e-38 counts as 0 while the block runs, and then again as before.

    Gradients of small networks become so small, and a CPU computes with such numbers ten times as slowly.
    """
    before = not (torch.tensor(1e-40) * 1).item()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
