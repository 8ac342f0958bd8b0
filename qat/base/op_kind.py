"""Kinds of operations, as the placement rules tell them apart; qat/graph/operations.py says which operation is what."""

from __future__ import annotations

from typing import Literal

OpKind = Literal[
    "input",
    "output",
    "convolution",
    "transposed_convolution",
    "linear",  # matrix product with a constant matrix
    "matrix_product",  # of two activations
    "batch_norm",
    "activation",  # pointwise function of one tensor; fuses into the convolution before it
    "swish",  # such a one, x * sigmoid(x); not every kernel takes it in
    "unfused_activation",  # TensorRT computes it in several steps, which do not fuse into a convolution
    "add",
    "multiply",
    "concat",
    "max_pool",
    "average_pool",
    "global_pool",  # mean over all spatial positions
    "dropout",  # absent from the engine, but in training it scales up the values it keeps
    "data_movement",  # keeps values unchanged, or adds only zeros, so its output has the scale of its input
    "split",  # data movement with several outputs; "data_movement" operations select one of them
    "layer_norm",
    "softmax",  # over the last axis, as in an attention
    "softmax_across",  # over another one, such as the bins of a detector's boxes
    "mask",  # sets some values of a tensor to a constant
    "shape",  # reads no values: a size, or arithmetic on sizes
    "other",
]
