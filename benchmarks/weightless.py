"""Takes the weights out of ONNX files, which speed does not depend on, and puts random ones in: less to carry to a GPU.

    python benchmarks/weightless.py strip FOLDER OUTPUT [NAME ...]      FOLDER/NAME/*.onnx -> OUTPUT/NAME/*.onnx
    python benchmarks/weightless.py fill FOLDER                         FOLDER/*/*.onnx, in place

Scales and other small constants stay as they are. Needs onnx and NumPy alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

SMALL = 4096  # elements of a constant that stays
TYPES = (TensorProto.INT8, TensorProto.FLOAT, TensorProto.FLOAT16)


def strip(model: onnx.ModelProto) -> None:
    """Takes out the values of large initializers; type and shape stay."""
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims) > SMALL and tensor.data_type in TYPES:
            for field in ("raw_data", "float_data", "int32_data"):
                tensor.ClearField(field)


def fill(model: onnx.ModelProto) -> None:
    """Puts random values where none are: INT8 codes of the whole range, floats of the size that keeps signals alive."""
    random = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if (
            np.prod(tensor.dims) > SMALL
            and tensor.data_type in TYPES
            and not (tensor.raw_data or tensor.float_data or tensor.int32_data)
        ):
            if tensor.data_type == TensorProto.INT8:
                values = random.integers(-127, 128, tensor.dims).astype(np.int8)
            else:
                kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
                inputs = max(1, int(np.prod(tensor.dims[1:])))
                values = (random.standard_normal(tensor.dims) * np.sqrt(2 / inputs)).astype(kind)
            tensor.raw_data = values.tobytes()


def main() -> None:
    command, folder, *rest = sys.argv[1:]
    if command == "fill":
        for path in Path(folder).glob("*/*.onnx"):
            model = onnx.load(path)
            fill(model)
            onnx.save(model, path)
        return
    output, *names = rest
    for path in Path(folder).glob("*/*.onnx"):
        if not names or path.parent.name in names:
            model = onnx.load(path)
            strip(model)
            stripped = Path(output) / path.parent.name / path.name
            stripped.parent.mkdir(parents=True, exist_ok=True)
            onnx.save(model, stripped)


if __name__ == "__main__":
    main()
