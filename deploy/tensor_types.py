"""TensorRT's shapes and data types as Python's and NumPy's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt as trt

_NUMPY_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


def sizes(shape: trt.Dims) -> tuple[int, ...]:
    """A shape as a tuple; -1 is a dynamic size."""
    return tuple(shape[index] for index in range(len(shape)))


def numpy_name(data_type: Any) -> str:
    """NumPy's name of TensorRT's data type: ``DataType.FLOAT`` -> ``float32``."""
    return _NUMPY_NAMES.get(data_type.name, str(data_type.name).lower())
