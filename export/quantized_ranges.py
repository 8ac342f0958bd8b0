"""The ranges that a quantized network has learned, for implicit INT8: of a Q/DQ ONNX file or a checkpoint of qat.

Tensors have the names of the same network's float file (``python -m export.onnx --precision float32``).
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from export.onnx_network import QUANTIZE
from export.qdq import DATA, SCALE, ZERO_POINT, QdqModel, code_type, input_of, size_of
from export.read import read_onnx
from qat.base.errors import UserError
from qat.base.number_format import INT8


def quantized_ranges(path: Path, *, trust_code: bool = False) -> dict[str, float]:
    """The amax of every activation that ``path`` (.onnx or .qat) quantizes, above 0, by the tensor's name.

    ``trust_code``: run the code that a stranger's checkpoint names (docs/trust.md).

    Raises UserError when the file cannot be read, quantizes nothing, or quantizes an activation by several scales or
    with a zero point, which no symmetric range can say.
    """
    model = read_onnx(path) if path.suffix == ".onnx" else _emitted(path, trust_code)
    found: dict[str, float] = {}
    qdq = QdqModel.from_ir(model, INT8)
    for node in qdq.nodes:
        tensor = node.inputs[DATA] if node.op_type == QUANTIZE else None
        if tensor is None or tensor in qdq.constants:
            continue
        zero_point = qdq.value(input_of(node, ZERO_POINT))
        if code_type(qdq, node) not in (qdq.codes, None) or (zero_point is not None and zero_point.any()):
            raise UserError(
                f"{path}: {tensor.name} is not quantized to {INT8.name} with zero point 0: a symmetric range cannot "
                "say that"
            )
        scale = qdq.value(node.inputs[SCALE])
        amax = INT8.high * float(scale.reshape(())) if scale is not None and size_of(scale) == 1 else None
        if amax is None or found.setdefault(str(tensor.name), amax) != amax:
            raise UserError(f"{path}: {tensor.name} is not quantized by one constant scale: a range cannot say that")
    if not found:
        raise UserError(f"{path} quantizes no activation: give a Q/DQ file or a checkpoint of qat.train")
    return found


def _emitted(checkpoint: Path, trust_code: bool) -> ir.Model:
    """The Q/DQ model of a checkpoint, as export.onnx writes it. Torch is imported here: Q/DQ files do not need it."""
    import torch

    from export.emit import emit, example_input, with_ends
    from export.fold import fold
    from export.tensor_names import names_of_inputs, names_of_outputs, output_shapes
    from export.trained_network import TrainedNetwork

    network = TrainedNetwork.from_checkpoint(checkpoint, trust_code=trust_code)
    network.check_exportable()
    folded, _ = fold(network.model)
    names = names_of_inputs(network.inputs, ())
    examples = {
        name: example_input(shape, "float32-nchw")
        for name, shape in zip(names, network.inputs.shapes.values(), strict=True)
    }
    ready = with_ends(folded, network.preprocessing, "float32-nchw", torch.float32)
    return emit(ready, examples, {}, names_of_outputs(folded, output_shapes(folded, network.inputs), ()))
