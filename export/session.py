"""ONNX Runtime as the reference for Q/DQ networks. This module does not need torch.

Its Q/DQ fusion is off: its fused INT8 kernels saturate on x86 processors without VNNI. Float arithmetic on the
dequantized codes is what TensorRT computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from qat.base.errors import UserError, one_line
from qat.base.onnx_structure import check_structure
from qat.base.sqnr import sqnr_db as ratio
from qat.base.supervised import native

# Pad_Fusion merges a zero padding into the max pool behind it, which then pads with minus infinity. ClipQuantRewrite
# leaves out a clip to 0..6 in front of a quantizer of scale 1e-10, because it takes -128 times the scale for 0.
_WRONG_OPTIMIZERS = ("Pad_Fusion", "ClipQuantRewrite")


def session(model: str | Path | bytes, *, threads: int = 0) -> onnxruntime.InferenceSession:
    """A CPU session of ONNX Runtime that computes Q/DQ networks as TensorRT does, with ``threads``; 0 for all cores.

    Raises UserError when ``model`` is a file that no parser should see (qat/base/onnx_structure.py).
    """
    if not isinstance(model, bytes):
        check_structure(Path(model))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(
        source, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(_WRONG_OPTIMIZERS)
    )


@contextmanager
def runs_in_onnx_runtime(model: Path) -> Iterator[None]:
    """Turns ONNX Runtime's errors about the user's file ``model`` while the block runs into UserError."""
    try:
        with native(f"ONNX Runtime running {model}"):
            yield
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise UserError(f"ONNX Runtime cannot run {model}: {one_line(error)}") from error


@contextmanager
def if_onnx_runtime_can() -> Iterator[None]:
    """Leaves the block where ONNX Runtime does not know an operator of the network."""
    try:
        yield
    except Exception as error:  # as above
        if not type(error).__module__.startswith("onnxruntime"):
            raise


def session_with_tensors(model: Path | onnx.ModelProto, names: Iterable[str]) -> onnxruntime.InferenceSession:
    """As ``session``, with the tensors ``names`` inside the network as outputs too. Changes a ModelProto in place."""
    if isinstance(model, Path):
        check_structure(model)
    proto = onnx.load(model) if isinstance(model, Path) else model
    known = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(set(names) - known))
    return session(proto.SerializeToString())


def run(model: onnxruntime.InferenceSession, inputs: np.ndarray | Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs ``model`` on its only input, or on inputs by name; returns all outputs by name."""
    names = [output.name for output in model.get_outputs()]
    feed = {model.get_inputs()[0].name: inputs} if isinstance(inputs, np.ndarray) else dict(inputs)
    return dict(zip(names, model.run(names, feed), strict=True))


def sqnr_db(signal: np.ndarray, noisy: np.ndarray) -> float | None:
    """The signal-to-noise ratio (qat/base/sqnr.py) of ``noisy``, in dB; None if equal, NaN after an overflow."""
    with np.errstate(invalid="ignore", over="ignore"):  # the ratio says it
        noise = float(np.square(signal.astype(np.float64) - noisy).sum())
        power = float(np.square(signal.astype(np.float64)).sum())
    return ratio(power, noise)
