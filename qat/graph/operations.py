"""Every operation that placement knows, with its names in PyTorch and in ONNX. Add a new operation here and only here.

Each operation has one kind, and the rules (qat/rules/place.py) see only the kind. An operation that is not in the table
has the kind "other": it computes in float, and nothing is assumed about it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qat.base.op_kind import OpKind as OpKind

WEIGHTED: tuple[OpKind, ...] = ("convolution", "transposed_convolution", "linear")
POOLS: tuple[OpKind, ...] = ("average_pool", "global_pool")
FUSED_ACTIVATIONS: tuple[OpKind, ...] = ("activation", "swish")
ACTIVATIONS: tuple[OpKind, ...] = (*FUSED_ACTIVATIONS, "unfused_activation")
# Each value of their output depends on the values at the same place alone.
POINTWISE: tuple[OpKind, ...] = (*ACTIVATIONS, "batch_norm", "dropout", "multiply")
FLOAT_ONLY: tuple[OpKind, ...] = ("layer_norm", "softmax", "softmax_across", "mask", "other")
# TensorRT moves Q and DQ across these, because the codes of the input are the codes of the output.
COMMUTING: tuple[OpKind, ...] = ("max_pool", "dropout", "data_movement", "split")


@dataclass(frozen=True)
class Operation:
    """Names of operations of one kind.

    ``modules`` are classes of torch.nn and torchvision.ops; ``functions`` are functions of torch, torch.nn.functional
    and operator, and methods of Tensor; ``onnx`` are operators of ONNX. ``where`` decides from the attributes of an
    operation whether this entry applies; if it does not, the next entry with the same name is tried.
    """

    kind: OpKind
    modules: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    onnx: tuple[str, ...] = ()
    where: Callable[[dict[str, Any]], bool] = field(default=lambda attributes: True)


def _copies_pixels(attributes: dict[str, Any]) -> bool:
    """Nearest-neighbour resizing only repeats values; other interpolation computes new ones."""
    return attributes.get("mode", "nearest") in ("nearest", "nearest-exact", b"nearest")


def _pads_with_known_values(attributes: dict[str, Any]) -> bool:
    """Padding with zeros, reflection or replication: zero has an exact code, and the others repeat values."""
    return attributes.get("mode", "constant") != "constant" or not attributes.get("value", 0)


def _between_floats(attributes: dict[str, Any]) -> bool:
    """A cast between float types only rounds, less than quantization does; 1, 10 and 16 are ONNX's codes of them."""
    return {attributes.get("from"), attributes.get("to")} <= {1, 10, 16}


def _keeps_floats(attributes: dict[str, Any]) -> bool:
    """x.to(...) with a floating-point type or a device; nothing is known about a type that is computed."""
    target = str(attributes.get("dtype", attributes.get("device", ""))).removeprefix("torch.").partition(":")[0]
    return target in ("float16", "bfloat16", "float32", "float64", "cpu", "cuda")


def _over_space(attributes: dict[str, Any]) -> bool:
    """A mean over height and width of [N, C, H, W]. Negative axes are not taken: at another rank they mean others."""
    axes = attributes.get("dim", attributes.get("axes"))
    return isinstance(axes, (tuple, list)) and sorted(axes) == [2, 3] and attributes.get("rank", 4) == 4


def _over_the_last_axis(attributes: dict[str, Any]) -> bool:
    """Where an axis is counted from the front and the rank is not known, images and heads are taken to come first."""
    axis = attributes.get("dim", attributes.get("axis", -1))
    return isinstance(axis, int) and (axis == -1 or axis == attributes.get("rank", max(axis, 2) + 1) - 1)


def _plain_sum(attributes: dict[str, Any]) -> bool:
    return bool(attributes.get("alpha", 1) == 1)


def _states_a_size(attributes: dict[str, Any]) -> bool:
    return attributes.get("name") in ("shape", "ndim", "dtype", "device", "is_cuda")


def _to_one_pixel(attributes: dict[str, Any]) -> bool:
    size = attributes.get("output_size")
    return size == 1 or (isinstance(size, (tuple, list)) and set(size) == {1})


OPERATIONS = (
    Operation("convolution", ("Conv1d", "Conv2d", "Conv3d"), ("conv1d", "conv2d", "conv3d"), ("Conv",)),
    Operation(
        "transposed_convolution",
        ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        ("ConvTranspose",),
    ),
    Operation("linear", ("Linear",), ("linear",), ("Gemm",)),
    # With one constant factor it becomes "linear" (qat/graph/fx_network.py, export/onnx_network.py).
    Operation("matrix_product", (), ("matmul", "bmm", "mm", "baddbmm", "einsum"), ("MatMul", "Einsum")),
    Operation("matrix_product", ("MultiheadAttention",), ("scaled_dot_product_attention",), ("Attention",)),
    Operation("batch_norm", ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), ("batch_norm",), ("BatchNormalization",)),
    Operation("batch_norm", ("SyncBatchNorm", "FrozenBatchNorm2d")),
    Operation("activation", ("ReLU", "ReLU6", "Hardtanh"), ("relu", "relu6", "hardtanh"), ("Relu", "Clip")),
    Operation("activation", (), ("clamp", "clip", "clamp_min", "clamp_max"), ()),
    Operation("activation", ("LeakyReLU", "PReLU"), ("leaky_relu", "prelu"), ("LeakyRelu", "PRelu")),
    Operation("swish", ("SiLU",), ("silu",), ("Swish",)),
    Operation("activation", ("Mish",), ("mish",), ("Mish",)),
    Operation("unfused_activation", ("Hardswish",), ("hardswish",), ("HardSwish",)),
    Operation("activation", ("Sigmoid", "Hardsigmoid"), ("sigmoid", "hardsigmoid"), ("Sigmoid", "HardSigmoid")),
    Operation("activation", ("GELU", "Tanh", "ELU"), ("gelu", "tanh", "elu"), ("Gelu", "Erf", "Tanh", "Elu")),
    Operation("activation", ("Softplus", "SELU", "CELU"), ("softplus", "selu", "celu"), ("Softplus", "Selu", "Celu")),
    Operation("add", (), ("add", "iadd"), ("Add", "Sum"), _plain_sum),
    Operation("multiply", (), ("mul", "imul", "multiply"), ("Mul",)),
    Operation("concat", (), ("cat", "concat", "concatenate"), ("Concat",)),
    Operation("max_pool", ("MaxPool1d", "MaxPool2d", "MaxPool3d"), ("max_pool1d", "max_pool2d"), ("MaxPool",)),
    Operation("max_pool", ("AdaptiveMaxPool2d",), ("max_pool3d", "adaptive_max_pool2d"), ("GlobalMaxPool",)),
    Operation(
        "global_pool",
        ("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"),
        ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        ("GlobalAveragePool",),
        lambda attributes: "output_size" not in attributes or _to_one_pixel(attributes),
    ),
    Operation("global_pool", (), ("mean",), ("ReduceMean",), _over_space),
    Operation(
        "average_pool",
        ("AvgPool1d", "AvgPool2d", "AvgPool3d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"),
        ("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        ("AveragePool",),
    ),
    Operation("dropout", ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d"), ("dropout",), ("Dropout",)),
    Operation("dropout", ("StochasticDepth",), ("stochastic_depth",), ()),
    Operation("split", (), ("split", "chunk", "unbind", "tensor_split"), ("Split",)),
    Operation("data_movement", ("Identity", "Flatten"), ("contiguous", "flatten"), ("Identity", "Flatten")),
    Operation("data_movement", ("Unflatten",), ("unflatten", "view", "reshape"), ("Reshape",)),
    Operation("data_movement", (), ("squeeze", "unsqueeze"), ("Squeeze", "Unsqueeze")),
    Operation("data_movement", ("Permute",), ("permute", "transpose", "swapaxes", "movedim"), ("Transpose",)),
    Operation("data_movement", (), ("getitem", "narrow", "index_select"), ("Slice", "Gather")),
    Operation("data_movement", (), ("roll", "flip", "expand", "repeat", "tile"), ("Expand", "Tile")),
    Operation("data_movement", (), (), ("Cast",), _between_floats),
    Operation("data_movement", ("ChannelShuffle",), ("channel_shuffle",), ()),
    Operation("data_movement", ("PixelShuffle",), ("pixel_shuffle",), ("DepthToSpace",)),
    Operation("data_movement", ("PixelUnshuffle",), ("pixel_unshuffle",), ("SpaceToDepth",)),
    Operation("data_movement", ("Upsample",), ("interpolate", "upsample"), ("Resize", "Upsample"), _copies_pixels),
    Operation("data_movement", ("UpsamplingNearest2d",), ("upsample_nearest",), ()),
    Operation(
        "data_movement", ("ZeroPad1d", "ZeroPad2d", "ConstantPad2d"), ("pad",), ("Pad",), _pads_with_known_values
    ),
    Operation("data_movement", ("ReflectionPad2d", "ReplicationPad2d"), (), ()),
    Operation(
        "data_movement", (), ("clone", "detach", "float", "view_as", "reshape_as", "expand_as", "select", "t"), ()
    ),
    Operation("data_movement", (), ("to",), (), _keeps_floats),
    Operation("layer_norm", ("LayerNorm",), ("layer_norm",), ("LayerNormalization",)),
    Operation("softmax", ("Softmax",), ("softmax",), ("Softmax",), _over_the_last_axis),
    Operation("softmax_across", ("Softmax", "Softmax2d"), ("softmax",), ("Softmax",)),
    Operation("data_movement", (), ("type_as",), ()),
    Operation("mask", (), ("masked_fill", "where"), ("Where",)),
    Operation("shape", (), ("size", "dim", "numel"), ("Shape", "Size")),
    Operation("shape", (), ("getattr",), (), _states_a_size),
    Operation("data_movement", (), ("getattr",), (), lambda attributes: attributes.get("name") in ("T", "mT", "data")),
)


def _by_name(names: Callable[[Operation], tuple[str, ...]]) -> dict[str, list[Operation]]:
    found: dict[str, list[Operation]] = {}
    for operation in OPERATIONS:
        for name in names(operation):
            found.setdefault(name, []).append(operation)
    return found


_MODULES = _by_name(lambda operation: operation.modules)
_FUNCTIONS = _by_name(lambda operation: operation.functions)
_ONNX = _by_name(lambda operation: operation.onnx)


def kind_of_module(name: str, attributes: dict[str, Any]) -> OpKind:
    """The kind of a module of class ``name``; ``attributes`` are the attributes of the module."""
    return _first(_MODULES, name, attributes)


def kind_of_function(name: str, attributes: dict[str, Any]) -> OpKind:
    """The kind of a function or method; ``attributes`` are its arguments by name. 'relu_' is 'relu' in place."""
    return _first(_FUNCTIONS, name if name in _FUNCTIONS else name.removesuffix("_"), attributes)


def kind_of_onnx(op_type: str, attributes: dict[str, Any]) -> OpKind:
    """The kind of an ONNX operator; ``attributes`` include constant inputs that act as attributes."""
    return _first(_ONNX, op_type, attributes)


def _first(table: dict[str, list[Operation]], name: str, attributes: dict[str, Any]) -> OpKind:
    found = (operation.kind for operation in table.get(name, ()) if operation.where(attributes))
    return next(found, "other")
