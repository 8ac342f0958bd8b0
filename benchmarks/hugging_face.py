"""Vision networks of Hugging Face's transformers, small, with random weights: what goes from trace to engine.

    python -m benchmarks.hugging_face FOLDER [NAME ...]

Each is prepared, calibrated on random images, exported, run in ONNX Runtime and built with TensorRT-RTX. SQNR is that
of the quantized network's worst output against the float one's; what is refused is shown with its message.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from deploy.builder import build
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings
from export import export_onnx
from qat.base.console import table
from qat.base.errors import UserError, one_line
from qat.base.sqnr import sqnr_db
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import placement_of, prepare
from qat.graph.outputs import leaves

Made = tuple[nn.Module, int]
"""A network, and the height and width of its images."""
_VIT: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 128}
_PATCHES: dict[str, Any] = {"image_size": 64, "patch_size": 16}
_STAGES: dict[str, Any] = {"hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1]}
_OUT = ["stage1", "stage2", "stage3", "stage4"]
_DETR: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 64, "num_queries": 10, "num_labels": 5}


def _detr() -> nn.Module:
    sizes = {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    backbone = hf.ResNetConfig(**_STAGES, embedding_size=32, out_features=["stage4"])
    plain = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
    return hf.DetrForObjectDetection(hf.DetrConfig(**plain, backbone_config=backbone, **_DETR, **sizes))


def _rt_detr() -> nn.Module:
    backbone = hf.RTDetrResNetConfig(**_STAGES, embedding_size=32, layer_type="basic", out_features=_OUT[1:])
    channels = {"encoder_in_channels": [64, 64, 64], "decoder_in_channels": [64, 64, 64], "encoder_hidden_dim": 64}
    sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    return hf.RTDetrForObjectDetection(hf.RTDetrConfig(backbone_config=backbone, **_DETR, **channels, **sizes))


def _depth_anything() -> nn.Module:
    backbone = hf.Dinov2Config(
        **(_VIT | {"num_hidden_layers": 4}), image_size=56, patch_size=14, out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    neck = {"reassemble_hidden_size": 64, "neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 32}
    return hf.DepthAnythingForDepthEstimation(hf.DepthAnythingConfig(backbone_config=backbone, **neck, patch_size=14))


def _dpt() -> nn.Module:
    neck = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 32}
    config = hf.DPTConfig(**(_VIT | {"num_hidden_layers": 4}), **_PATCHES, **neck, is_hybrid=False)
    return hf.DPTForDepthEstimation(config)


def _sam() -> nn.Module:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "mlp_dim": 128, "output_channels": 32}
    return hf.SamVisionModel(hf.SamVisionConfig(**sizes, **_PATCHES, window_size=2, global_attn_indexes=[1]))


def _upernet() -> nn.Module:
    backbone = hf.ConvNextConfig(**_STAGES, out_features=_OUT)
    config = hf.UperNetConfig(backbone_config=backbone, hidden_size=32, num_labels=5, use_auxiliary_head=False)
    return hf.UperNetForSemanticSegmentation(config)


def _swinv2() -> nn.Module:
    sizes = {"image_size": 64, "embed_dim": 32, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    return hf.Swinv2ForImageClassification(hf.Swinv2Config(**sizes, num_labels=5))


def _pvt() -> nn.Module:
    sizes = {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
    return hf.PvtV2ForImageClassification(hf.PvtV2Config(**sizes, image_size=64, num_labels=5))


NETWORKS: dict[str, Callable[[], Made]] = {
    "segformer": lambda: (hf.SegformerForSemanticSegmentation(hf.SegformerConfig(num_labels=5)), 64),
    "upernet": lambda: (_upernet(), 64),
    "detr": lambda: (_detr(), 64),
    "rt_detr": lambda: (_rt_detr(), 64),
    "yolos": lambda: (hf.YolosForObjectDetection(hf.YolosConfig(**_VIT, image_size=[64, 64], num_labels=5)), 64),
    "dpt": lambda: (_dpt(), 64),
    "depth_anything": lambda: (_depth_anything(), 56),
    "sam": lambda: (_sam(), 64),
    "clip": lambda: (hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**_VIT, **_PATCHES, projection_dim=32)), 64),
    "siglip": lambda: (hf.SiglipVisionModel(hf.SiglipVisionConfig(**_VIT, **_PATCHES)), 64),
    "vit": lambda: (hf.ViTForImageClassification(hf.ViTConfig(**_VIT, **_PATCHES, num_labels=5)), 64),
    "deit": lambda: (hf.DeiTForImageClassification(hf.DeiTConfig(**_VIT, **_PATCHES, num_labels=5)), 64),
    "beit": lambda: (hf.BeitForImageClassification(hf.BeitConfig(**_VIT, **_PATCHES, num_labels=5)), 64),
    "dinov2": lambda: (hf.Dinov2ForImageClassification(hf.Dinov2Config(**_VIT, image_size=56, patch_size=14)), 56),
    "dinov3": lambda: (hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**_VIT, **_PATCHES)), 64),
    "swinv2": lambda: (_swinv2(), 64),
    "pvt_v2": lambda: (_pvt(), 64),
    "convnextv2": lambda: (hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config(**_STAGES, num_labels=5)), 64),
    "regnet": lambda: (hf.RegNetForImageClassification(hf.RegNetConfig(num_labels=5)), 64),
    "mobilenet_v2": lambda: (hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(num_labels=5)), 64),
}


def follow(name: str, folder: Path) -> tuple[str, ...]:
    """A row: layers in INT8, the worst output's SQNR in dB, INT8 layers of the engine, and what stopped it."""
    torch.manual_seed(0)
    model, pixels = NETWORKS[name]()
    model.eval()
    x, found = torch.randn(4, 3, pixels, pixels), ["-", "-", "-"]
    try:
        prepared = prepare(model, input_shape=x.shape[1:])
        weights = placement_of(prepared).weights
        found[0] = f"{sum(weight.quantized for weight in weights)} of {len(weights)}"
        with torch.no_grad():
            calibrate_ranges(prepared, [x])
            before, after = (dict(leaves(network(x))) for network in (model, prepared))
        found[1] = f"{min(_ratio(before[key], after[key]) for key in after if isinstance(after[key], Tensor)):.1f}"
        export_onnx(prepared, folder / f"{name}.onnx", parity_images=4)
        audit = build(find_toolkit("tensorrt-rtx"), folder / f"{name}.onnx", BuildSettings()).audit
        declared = [finding for finding in audit.findings if finding.declared_int8]
        found[2] = f"{len(declared) - len(audit.broken)} of {len(declared)}"
    except UserError as error:
        return (name, *found, one_line(error))
    return (name, *found, "")


def _ratio(exact: Tensor, other: Tensor) -> float:
    ratio = sqnr_db(float(exact.double().square().sum()), float((exact - other).double().square().sum()))
    return float("inf") if ratio is None else ratio


def main() -> None:
    warnings.simplefilter("ignore")
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(NETWORKS)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [follow(name, folder) for name in names]
    print(f"transformers {hf.__version__}, torch {torch.__version__}")
    table(
        "Networks of transformers", ("network", "INT8 by placement", "SQNR, dB", "INT8 in the engine", "refused"), rows
    )


if __name__ == "__main__":
    main()
