"""In which form a trained network is written: what the options of export.onnx say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qat.base.artifact import sidecar_path
from qat.base.choices import ExportPrecision, FloatType, InputKind, WeightStorage
from qat.base.errors import UserError


def reference_path(onnx: Path) -> Path:
    """``model.onnx`` -> ``model.reference.npz``."""
    return onnx.with_name(onnx.name.removesuffix(".onnx") + ".reference.npz")


def quantized_path(model: Path) -> Path:
    """``model.onnx`` -> ``model.int8.onnx``: what export.quantize makes of a float file."""
    return model.with_name(model.name.removesuffix(".onnx") + ".int8.onnx")


def files_beside(onnx: Path, options: object = None) -> tuple[Path, ...]:
    """What is written with an ONNX file: its sidecar and its reference file."""
    return sidecar_path(onnx), reference_path(onnx)


@dataclass(frozen=True, kw_only=True)
class FileForm:
    """The form of an ONNX file (the arguments of export.from_checkpoint.export_onnx explain each).

    Raises UserError when options of INT8 are given for a float file.
    """

    input: InputKind
    source_size: tuple[int, int] | None = None
    precision: ExportPrecision
    weights: WeightStorage
    float_type: FloatType
    pad_channels: bool
    merge_shortcuts: bool

    def __post_init__(self) -> None:
        needless = {
            "--pad-channels": self.pad_channels,
            "--merge-shortcuts": self.merge_shortcuts,
            "--weights": self.weights == "float",
            "--float-type": self.float_type != "float32",
            "--input int8-nchw": self.input == "int8-nchw",
        }
        if not self.quantized and any(needless.values()):
            given = " and ".join(name for name, is_given in needless.items() if is_given)
            raise UserError(f"--precision {self.precision} computes nothing in INT8: leave out {given}")

        if self.source_size is not None and not self.input.startswith("uint8"):
            raise UserError(
                f"--source-size is for bytes as a camera gives them, not for --input {self.input}: give --input "
                "uint8-nhwc or uint8-nchw"
            )
        if self.source_size is not None and min(self.source_size) < 1:
            height, width = self.source_size
            raise UserError(f"--source-size {height}x{width}: height and width must be at least 1")
        if self.float_type == "bfloat16" and self.weights == "float":
            raise UserError("--weights float has no bfloat16: leave out one of --weights and --float-type")

    @property
    def quantized(self) -> bool:
        """Whether the file has quantizers."""
        return self.precision == "int8"

    def path_beside(self, checkpoint: Path) -> Path:
        """``model.qat`` -> ``model.merged-padded.onnx``: where the file is written when no name is given."""
        return checkpoint.with_suffix(f"{self.suffix}.onnx")

    @property
    def suffix(self) -> str:
        """What stands before .onnx in the file's name: the options that are not the defaults."""
        chosen = {
            self.precision: not self.quantized,
            "merged": self.merge_shortcuts,
            "padded": self.pad_channels,
            "float-weights": self.weights == "float",
            f"with-{self.float_type}": self.float_type != "float32",
            self.input: self.input != "float32-nchw",
            "from-{}x{}".format(*self.source_size or (0, 0)): self.source_size is not None,
        }
        names = "-".join(name for name, wanted in chosen.items() if wanted)
        return f".{names}" if names else ""
