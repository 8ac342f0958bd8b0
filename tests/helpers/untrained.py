"""Networks that nobody trained, and a checkpoint of one without test images: for what only the layers decide."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx, nn

from qat.checkpoint import save_checkpoint
from qat.data.preprocessing import Preprocessing
from qat.fake_quantize.prepare import prepare
from qat.fake_quantize.quantizer import ActivationQuantizer
from qat.graph.tracing import Shapes
from qat.models import ModelSpec, build_model


def lively(model: nn.Module) -> nn.Module:
    """``model`` in evaluation, its batch normalizations with factors and shifts of their own."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.eval()


PREPROCESSING = Preprocessing(16, 16, (0.5,) * 3, (0.25,) * 3, resize=16)


def prepared(model: nn.Module, input_shape: Shapes = (3, PREPROCESSING.height, PREPROCESSING.width)) -> fx.GraphModule:
    """``model`` with quantizers, all of whose activations are in -3 to 3."""
    ready = prepare(model.eval(), input_shape=input_shape)
    for module in ready.modules():
        if isinstance(module, ActivationQuantizer):
            module.amax.fill_(3.0)
    return ready


def checkpoint_of(folder: Path, model: str) -> Path:
    """Writes a checkpoint of ``model``, FILE.py:FUNCTION of 10 classes, with all activations in -3 to 3."""
    spec = ModelSpec(model, 10)
    ready = prepared(build_model(spec))
    data = {"data": {"source": "none", "image_size": 16, "root": "."}, "seed": 0, "calibration_images": 16}
    save_checkpoint(folder / "model.qat", ready, spec, PREPROCESSING, tuple(map(str, range(10))), {}, data, seed=0)
    return folder / "model.qat"
