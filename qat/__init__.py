"""The PyTorch side: quantizer placement, fake quantization, calibration, training. The names below are the library.

    import qat

    prepared = qat.prepare(model, input_shape=(3, 224, 224))
    qat.calibrate_ranges(prepared, batches)
    ...                                             # train it in your own loop, like any other module
    qat.save_checkpoint("model.qat", prepared, qat.ModelSpec("resnet50", 1000), preprocessing, class_names)

Each name is loaded on first use: ``import qat`` itself does not import torch.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.base.errors import UserError
    from qat.calibration.activation_ranges import calibrate_ranges
    from qat.calibration.adaround import adaround
    from qat.calibration.explain import explain_calibration
    from qat.calibration.explain_page import draw_explanations
    from qat.calibration.smoothquant import smoothquant
    from qat.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from qat.compute.device import compile_for_training
    from qat.data.preprocessing import Preprocessing
    from qat.fake_quantize.prepare import placement_of, prepare
    from qat.fake_quantize.weight_ranges import fix_weight_ranges, learn_ranges
    from qat.models import ModelSpec, build_model
    from qat.placement_view import view_placement
    from qat.rules.drawing import draw

    __version__: str

_HOME = {
    "Checkpoint": "qat.checkpoint",
    "ModelSpec": "qat.models",
    "Preprocessing": "qat.data.preprocessing",
    "UserError": "qat.base.errors",
    "adaround": "qat.calibration.adaround",
    "build_model": "qat.models",
    "calibrate_ranges": "qat.calibration.activation_ranges",
    "compile_for_training": "qat.compute.device",
    "draw": "qat.rules.drawing",
    "draw_explanations": "qat.calibration.explain_page",
    "explain_calibration": "qat.calibration.explain",
    "fix_weight_ranges": "qat.fake_quantize.weight_ranges",
    "learn_ranges": "qat.fake_quantize.weight_ranges",
    "load_checkpoint": "qat.checkpoint",
    "placement_of": "qat.fake_quantize.prepare",
    "prepare": "qat.fake_quantize.prepare",
    "save_checkpoint": "qat.checkpoint",
    "smoothquant": "qat.calibration.smoothquant",
    "view_placement": "qat.placement_view",
}
__all__ = [
    "Checkpoint",
    "ModelSpec",
    "Preprocessing",
    "UserError",
    "__version__",
    "adaround",
    "build_model",
    "calibrate_ranges",
    "compile_for_training",
    "draw",
    "draw_explanations",
    "explain_calibration",
    "fix_weight_ranges",
    "learn_ranges",
    "load_checkpoint",
    "placement_of",
    "prepare",
    "save_checkpoint",
    "smoothquant",
    "view_placement",
]


if not TYPE_CHECKING:  # with __getattr__ a type checker would accept any name

    def __getattr__(name: str) -> Any:
        """Loads a public name."""
        if name == "__version__":
            return metadata.version("int8-qat-pipeline")
        if name not in _HOME:
            raise AttributeError(f"module 'qat' has no attribute {name!r}; it has {', '.join(__all__)}")
        return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
