"""What weakly typed networks have and strongly typed ones lack: precision by flags and by layer, and calibrators.

TensorRT 8.6 and 10.x have them, later versions and TensorRT-RTX do not: they refuse them, and name the explicit way.
Like deploy/trt.py, whose Toolkit is how the rest of deploy/ asks for all this, this file knows TensorRT's versions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qat.base.choices import Constraints, EnginePrecision, ImplicitCalibrator
from qat.base.console import warn
from qat.base.errors import UserError

if TYPE_CHECKING:
    import tensorrt as trt

    from deploy.settings import BuildSettings

# The builder flags that allow each precision.
_FLAGS: dict[EnginePrecision, tuple[str, ...]] = {
    "explicit": ("INT8", "FP16"),
    "int8": ("INT8", "FP16"),
    "fp16": ("FP16",),
    "bf16": ("BF16",),
}
# What to do instead in a version that has only strongly typed networks.
_REMEDY: dict[EnginePrecision, str] = {
    "int8": "python -m export.quantize makes a Q/DQ file of it, from images or a --calibration-cache; build that",
    "fp16": "python -m export.onnx --precision float16 writes the types into the file; build that",
    "bf16": "python -m export.onnx --precision float16 writes FP16 into the file; build that, or use --precision tf32",
}
# What the builder says of the GPU: whether it has units for a precision.
_PLATFORM = {"FP16": "platform_has_fast_fp16", "INT8": "platform_has_fast_int8", "TF32": "platform_has_tf32"}
_CALIBRATORS: dict[ImplicitCalibrator, str] = {
    "entropy2": "IInt8EntropyCalibrator2",
    "minmax": "IInt8MinMaxCalibrator",
    "entropy": "IInt8EntropyCalibrator",
    "legacy": "IInt8LegacyCalibrator",
}
_CONSTRAINTS: dict[Constraints, str] = {
    "obey": "OBEY_PRECISION_CONSTRAINTS",
    "prefer": "PREFER_PRECISION_CONSTRAINTS",
}


def check_precision(module: Any, title: str, precision: EnginePrecision) -> None:
    """Raises UserError when this version has no flags that give a float32 network ``precision``."""
    if missing := [flag for flag in _FLAGS.get(precision, ()) if not hasattr(module.BuilderFlag, flag)]:
        remedy = f": {_REMEDY[precision]}" if precision in _REMEDY else ""
        raise UserError(
            f"{title} cannot run a float32 ONNX file in {precision} (it has no {' and '.join(missing)} flag){remedy}"
        )


def allow_precision(module: Any, config: trt.IBuilderConfig, settings: BuildSettings, *, quantized: bool) -> None:
    """Sets the flags of ``settings.precision``.

    A network that is not ``quantized`` would need a calibrator for INT8, so explicitly it is not allowed that.
    """
    left_out = {"FP16"} if settings.strict else set()
    if settings.precision == "explicit" and not quantized:
        left_out.add("INT8")
    for name in set(_FLAGS.get(settings.precision, ())) - left_out:
        config.set_flag(getattr(module.BuilderFlag, name))


def units_of_platform(builder: trt.Builder) -> dict[str, bool]:
    """Whether the GPU has units for FP16, INT8 and TF32, as far as this version of the builder says it."""
    return {name: bool(getattr(builder, asked)) for name, asked in _PLATFORM.items() if hasattr(builder, asked)}


def check_platform(units: dict[str, bool], precision: EnginePrecision) -> None:
    """Raises UserError for implicit INT8 on a GPU without units for it; warns of others, which then gain nothing."""
    wanted = precision.upper()
    if units.get(wanted, True):
        return
    missing = f"this GPU has no units for {wanted}"
    if precision == "int8":
        raise UserError(f"{missing}: build it with --precision fp16 or fp32")
    warn(f"{missing}: the engine will hardly be faster than FP32")


def constrain(
    module: Any, title: str, config: trt.IBuilderConfig, constraints: Constraints, *, strongly_typed: bool
) -> None:
    """Says what the builder makes of precisions by layer. Raises UserError for a strongly typed network."""
    if strongly_typed:
        raise UserError(
            f"{title} takes the precision of every layer from the ONNX file: leave out --layer and --output-type, and "
            "write it there (qat.train, qat.calibrate and export.quantize have --keep-float)"
        )
    if constraints in _CONSTRAINTS:
        config.set_flag(getattr(module.BuilderFlag, _CONSTRAINTS[constraints]))


def calibrator_class(module: Any, title: str, calibrator: ImplicitCalibrator) -> type[Any]:
    """TensorRT's class of a calibrator. Raises UserError when this version has none."""
    found: type[Any] | None = getattr(module, _CALIBRATORS[calibrator], None)
    if found is None:
        raise UserError(f"{title} has no {_CALIBRATORS[calibrator]}: {_REMEDY['int8']}")
    return found


def calibrate_before_fusion(module: Any, title: str, config: trt.IBuilderConfig) -> None:
    """Lets calibration see the tensors that layers are fused over. Raises UserError when this version has no choice."""
    flag = getattr(getattr(module, "QuantizationFlag", None), "CALIBRATE_BEFORE_FUSION", None)
    if flag is None:
        raise UserError(f"{title} cannot choose when it calibrates: leave out --calibrate-before-fusion")
    config.set_quantization_flag(flag)


def warn_of_tf32_override(settings: Mapping[str, Any]) -> None:
    """Warns if an engine with these settings, as JSON, is to use TF32, and a variable switches that off."""
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0" and (settings.get("tf32") or settings.get("precision") == "tf32"):
        warn(
            "NVIDIA_TF32_OVERRIDE=0 is set in the environment, which switches TF32 off whatever an engine was built "
            "for: unset it where engines are built and where they run"
        )
