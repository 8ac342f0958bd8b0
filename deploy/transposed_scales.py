"""States the one scale of an INT8 transposed convolution's weight as this version of TensorRT wants it.

A file states it as a vector of equal values along the output channels. A version that wants the vector along the input
channels gets it so: the parsed network is changed, not the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.parsed_network import ParsedNetwork
from deploy.tensor_types import sizes
from deploy.trt import Toolkit
from qat.base.errors import UserError

if TYPE_CHECKING:
    import tensorrt as trt


def state_transposed_scales(network: trt.INetworkDefinition, toolkit: Toolkit, model: Path, axis: int) -> None:
    """Lets the scales of every transposed convolution's weight lie along ``axis`` of the weight, in place.

    Raises UserError when a weight of the file ``model`` has several scales along another axis, or, where axis 0 is
    needed, a scale without an axis.
    """
    parsed = ParsedNetwork(network)
    for layer in parsed.layers:
        weight = layer.get_input(1) if layer.type.name == "DECONVOLUTION" and layer.num_inputs > 1 else None
        for kind in ("DEQUANTIZE", "QUANTIZE"):  # the latter where the file stores float weights
            maker = None if weight is None else parsed.makers.get(weight.name)
            if maker is None or maker.type.name != kind:
                break
            maker.__class__ = getattr(toolkit.module, f"I{kind.title()}Layer")
            if not _state(network, toolkit.module, maker, parsed.makers, axis):
                raise UserError(
                    f"{model}: {toolkit.title} takes the scales of the weight of {layer.name}, which is transposed, "
                    f"along axis {axis}: give the weight one scale, as a vector of equal values along its axis 1"
                )
            weight = maker.get_input(0)


def _state(network: Any, module: Any, quantizer: Any, makers: dict[str, Any], axis: int) -> bool:
    """Lets the scales of ``quantizer`` lie along ``axis``; False if that cannot be."""
    extent = sizes(quantizer.get_output(0).shape)[axis]
    inputs = range(1, quantizer.num_inputs)  # the scale, and the zero point if there is one
    constants: list[Any] = [makers.get(quantizer.get_input(index).name) for index in inputs]
    if any(constant is None or constant.type.name != "CONSTANT" for constant in constants):
        return True
    for constant in constants:
        constant.__class__ = module.IConstantLayer
    vectors = [np.array(constant.weights).reshape(-1) for constant in constants]
    if len(vectors[0]) == extent and quantizer.axis == axis:
        return True
    if len(vectors[0]) == 1:  # a layer cannot change to several; 8.6 was seen to refuse it, newer versions were not run
        return axis == 1
    if not all((vector == vector[0]).all() for vector in vectors):
        return False
    for index, vector in zip(inputs, vectors, strict=True):
        stated = network.add_constant((extent,), np.full(extent, vector[0], vector.dtype))
        stated.name = f"{quantizer.name}/{('scale', 'zero point')[index - 1]} along axis {axis}"
        quantizer.set_input(index, stated.get_output(0))
    quantizer.axis = axis
    return True
