"""Exact float32, as ONNX Runtime and the engine compute it."""

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
