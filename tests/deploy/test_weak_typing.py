"""What a version of TensorRT lacks is refused with what to do instead; fake modules stand for the versions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deploy import weak_typing
from deploy.settings import BuildSettings
from qat.base.errors import UserError

ALL_FLAGS = ("INT8", "FP16", "BF16", "TF32", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")
CALIBRATORS = {
    "entropy2": "IInt8EntropyCalibrator2",
    "minmax": "IInt8MinMaxCalibrator",
    "entropy": "IInt8EntropyCalibrator",
    "legacy": "IInt8LegacyCalibrator",
}


def module_of(*flags: str, **more: Any) -> Any:
    return SimpleNamespace(BuilderFlag=SimpleNamespace(**{flag: flag for flag in flags}), **more)


class Config:
    def __init__(self) -> None:
        self.flags: list[str] = []
        self.quantization_flags: list[str] = []
        self.set_flag, self.set_quantization_flag = self.flags.append, self.quantization_flags.append


def refused(function: Any, *given: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        function(*given, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("precision", "flags", "lacks", "remedy"),
    [
        ("int8", ("FP16",), "no INT8 flag", "python -m export.quantize"),
        ("int8", (), "no INT8 and FP16 flag", "python -m export.quantize"),
        ("fp16", ("INT8",), "no FP16 flag", "export.onnx --precision float16"),
        ("bf16", ("INT8", "FP16"), "no BF16 flag", "--precision tf32"),
    ],
)
def test_a_version_without_the_flags_names_the_remedy(
    precision: Any, flags: tuple[str, ...], lacks: str, remedy: str
) -> None:
    message = refused(weak_typing.check_precision, module_of(*flags), "TensorRT 9", precision)
    assert message.startswith("TensorRT 9 cannot run a float32 ONNX file in " + precision)
    assert lacks in message
    assert remedy in message


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "int8", "explicit"])
def test_a_version_with_all_flags_has_every_precision(precision: Any) -> None:
    weak_typing.check_precision(module_of(*ALL_FLAGS), "TensorRT 9", precision)


@pytest.mark.parametrize(
    ("precision", "strict", "quantized", "flags"),
    [
        ("explicit", False, True, {"INT8", "FP16"}),
        ("explicit", False, False, {"FP16"}),
        ("int8", False, False, {"INT8", "FP16"}),
        ("int8", True, False, {"INT8"}),
        ("fp16", False, False, {"FP16"}),
        ("bf16", False, False, {"BF16"}),
        ("fp32", False, False, set()),
        ("tf32", False, False, set()),
    ],
)
def test_the_flags_of_a_precision(precision: Any, strict: bool, quantized: bool, flags: set[str]) -> None:
    config, settings = Config(), BuildSettings(precision=precision, strict=strict)
    weak_typing.allow_precision(module_of(*ALL_FLAGS), config, settings, quantized=quantized)  # type: ignore[arg-type]
    assert set(config.flags) == flags


def test_a_gpu_without_units_is_refused_for_int8_and_warned_of_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    builder: Any = SimpleNamespace(platform_has_fast_fp16=False, platform_has_fast_int8=False)
    units = weak_typing.units_of_platform(builder)
    assert units == {"FP16": False, "INT8": False}
    assert "no units for INT8" in refused(weak_typing.check_platform, units, "int8")
    weak_typing.check_platform(units, "fp16")
    assert "warning: this GPU has no units for FP16" in capsys.readouterr().err
    for precision in ("explicit", "fp32", "tf32", "bf16"):  # of TF32 this version says nothing
        weak_typing.check_platform(units, precision)
    for precision in ("int8", "fp16"):
        weak_typing.check_platform({"FP16": True, "INT8": True}, precision)
        weak_typing.check_platform({}, precision)
    assert capsys.readouterr().err == ""


def test_types_of_layers_are_refused_in_a_strongly_typed_network() -> None:
    config: Any = Config()
    message = refused(weak_typing.constrain, module_of(), "TensorRT 11", config, "obey", strongly_typed=True)
    assert "leave out --layer and --output-type" in message
    assert "--keep-float" in message
    assert config.flags == []


@pytest.mark.parametrize(
    ("constraints", "flags"),
    [("obey", ["OBEY_PRECISION_CONSTRAINTS"]), ("prefer", ["PREFER_PRECISION_CONSTRAINTS"]), ("none", [])],
)
def test_constraints_are_a_flag_of_the_builder(constraints: Any, flags: list[str]) -> None:
    config: Any = Config()
    weak_typing.constrain(module_of(*ALL_FLAGS), "TensorRT 9", config, constraints, strongly_typed=False)
    assert config.flags == flags


@pytest.mark.parametrize("name", CALIBRATORS)
def test_each_calibrator_is_a_class_of_tensorrt(name: Any) -> None:
    classes = {known: type(known, (), {}) for known in CALIBRATORS.values()}
    assert weak_typing.calibrator_class(module_of(**classes), "TensorRT 9", name) is classes[CALIBRATORS[name]]
    del classes[CALIBRATORS[name]]
    message = refused(weak_typing.calibrator_class, module_of(**classes), "TensorRT 11", name)
    assert f"TensorRT 11 has no {CALIBRATORS[name]}:" in message
    assert "python -m export.quantize" in message


@pytest.mark.parametrize("more", [{}, {"QuantizationFlag": SimpleNamespace()}])
def test_a_version_that_cannot_choose_when_it_calibrates(more: dict[str, Any]) -> None:
    config: Any = Config()
    message = refused(weak_typing.calibrate_before_fusion, module_of(**more), "TensorRT 11", config)
    assert "leave out --calibrate-before-fusion" in message
    flags = SimpleNamespace(CALIBRATE_BEFORE_FUSION="before")
    weak_typing.calibrate_before_fusion(module_of(QuantizationFlag=flags), "TensorRT 9", config)
    assert config.quantization_flags == ["before"]
