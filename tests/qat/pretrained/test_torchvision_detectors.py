"""torchvision's detectors: what their heads compute, the same as within the whole model, through export and engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from deploy import build
from export import export_onnx
from qat.base.artifact import read_sidecar
from qat.base.errors import UserError
from qat.calibrate import main as calibrate
from qat.graph.tracing import trace
from qat.models import ModelSpec, build_model
from qat.options import CalibrateOptions
from qat.pretrained.torchvision_detectors import HeadOutputs, as_torchvision, box_chooser, detector_names
from qat.weights import preset_of_weights

QUICK = "ssdlite320_mobilenet_v3_large"
OTHERS = ("fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn", "retinanet_resnet50_fpn", "ssd300_vgg16")


def whole(name: str) -> nn.Module:
    """torchvision's own model of five classes; normalizations have statistics that keep signals alive."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5).eval()
    with torch.no_grad():
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.backbone(torch.rand(2, 3, 320, 320))
    return model.eval()


def captured(model: nn.Module, image: Tensor) -> tuple[Tensor, object]:
    """What the model feeds its backbone for one image, and what its heads answer to that."""
    seen: dict[str, object] = {}
    model.backbone.register_forward_pre_hook(lambda _, given: seen.update(images=given[0]))
    head = model.rpn.head if hasattr(model, "rpn") else model.head
    head.register_forward_hook(lambda _, __, answer: seen.update(answer=answer))
    with torch.no_grad():
        model([image])
    return seen["images"], seen["answer"]  # type: ignore[return-value]


@pytest.mark.parametrize("name", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_the_heads_answer_as_within_torchvisions_model(name: str) -> None:
    model = whole(name)
    images, expected = captured(model, torch.rand(3, 320, 320))
    ours = build_model(ModelSpec(name, 5)).eval()
    ours.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = ours(images)
    if isinstance(expected, tuple):
        assert found.keys() == {"features", "objectness", "deltas"}
        expected = dict(zip(("objectness", "deltas"), expected, strict=True))
        assert all(torch.equal(a, b) for key in expected for a, b in zip(found[key], expected[key], strict=True))
    else:
        assert found.keys() == expected.keys() >= {"cls_logits", "bbox_regression"}
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert (type(ours).__name__, isinstance(ours, HeadOutputs)) == (type(model).__name__, True)


def boxes_and_labels() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images, and what is in them."""
    random = torch.Generator().manual_seed(3)
    images = [torch.rand(3, 320, 320, generator=random) for _ in range(2)]
    boxes = torch.tensor([[20.0, 30.0, 120.0, 140.0], [150.0, 100.0, 290.0, 310.0]])
    return images, [{"boxes": boxes + 5 * index, "labels": torch.tensor([1, 3])} for index in range(2)]


@pytest.mark.parametrize("name", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS[1:3])])
def test_a_prepared_network_is_trained_and_evaluated_by_torchvisions_own_code(name: str) -> None:
    model, (images, targets) = whole(name), boxes_and_labels()
    model.transform.fixed_size, model.transform.size_divisible = (320, 320), 1
    ours = build_model(ModelSpec(name, 5))
    ours.load_state_dict(model.state_dict())
    around = as_torchvision(trace(ours, (3, 320, 320)), name, 5)
    with torch.no_grad():
        expected, answered = model.eval()(images), around.eval()(images)
    for one, other in zip(answered, expected, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(one["boxes"], other["boxes"])
    losses = {}
    for one in (model, around):
        torch.manual_seed(0)
        found = one.train()(images, targets)
        sum(found.values()).backward()
        losses[one] = found
    assert losses[model].keys() == losses[around].keys()
    for key, loss in losses[model].items():
        torch.testing.assert_close(losses[around][key], loss, rtol=1e-5, atol=1e-6)
    gradients = {key: one.grad for key, one in model.named_parameters() if one.grad is not None}
    trained = {key.removeprefix("backbone.prepared."): one.grad for key, one in around.named_parameters()}
    assert len(gradients) > 50
    for key, gradient in gradients.items():
        torch.testing.assert_close(trained[key], gradient, rtol=1e-3, atol=1e-4)


def test_two_stages_are_not_trained_so() -> None:
    prepared = trace(nn.Sequential(nn.Conv2d(3, 4, 1)), (3, 8, 8))
    with pytest.raises(UserError, match="fasterrcnn_resnet50_fpn has two stages, of which only the first is a network"):
        as_torchvision(prepared, "fasterrcnn_resnet50_fpn", 5)
    with pytest.raises(UserError, match="resnet18 is not a detector of torchvision"):
        as_torchvision(prepared, "resnet18", 5)


ONE_STAGE = ("fcos_resnet50_fpn", "retinanet_resnet50_fpn", "ssd300_vgg16")


@pytest.mark.parametrize("name", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ONE_STAGE)])
def test_boxes_are_chosen_as_the_detector_itself_does(name: str) -> None:
    """Of the heads' outputs alone; with another size of the input afterwards, whose anchors are others."""
    model, limits = whole(name), {"score_thresh": 0.0, "nms_thresh": 0.4, "detections_per_img": 50}
    for key, value in limits.items():
        setattr(model, key, value)
    pixels = model.transform.fixed_size[0] if model.transform.fixed_size else 320
    model.transform.min_size, model.transform.max_size = (pixels,), pixels
    chooser = box_chooser(name, 5, {}, **limits)
    assert chooser.limits == (0.0, 0.4, 50)
    expected: dict[str, Tensor] = {}
    image = torch.rand(3, pixels, pixels)
    handle = model.register_forward_hook(lambda _, __, answer: expected.update(answer[0]))
    images, heads = captured(model, image)
    handle.remove()
    assert images.shape[2:] == (pixels, pixels)
    outputs = {key: value[0].numpy() for key, value in heads.items()}  # type: ignore[attr-defined]
    boxes, scores, labels = chooser(outputs, (pixels, pixels))
    assert len(scores) > 10
    np.testing.assert_array_equal(boxes, expected["boxes"].numpy())
    np.testing.assert_array_equal(scores, expected["scores"].numpy())
    np.testing.assert_array_equal(labels, expected["labels"].numpy())
    assert box_chooser(name, 5, {}).limits != chooser.limits


@pytest.mark.parametrize("name", ["ssd300_vgg16", QUICK])
def test_images_are_normalized_as_the_detector_does_itself(name: str) -> None:
    transform = torchvision.models.get_model(name, weights=None, weights_backbone=None).transform
    found = preset_of_weights(name, None)
    assert (found.size, found.size) == transform.fixed_size
    assert (list(found.mean), list(found.std)) == (transform.image_mean, transform.image_std)


def test_all_are_known() -> None:
    assert {QUICK, *OTHERS} < set(detector_names())
    assert len(detector_names()) >= 12


@pytest.mark.slow
def test_from_weights_to_engine(tmp_path: Path) -> None:
    """Of weights with another number of classes, which the rows of several heads, times anchors, tell."""
    name, random = QUICK, np.random.default_rng(0)
    for index in range(10):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        (tmp_path / "photos").mkdir(exist_ok=True)
        coarse.resize((96, 80)).save(tmp_path / "photos" / f"{index}.png")
    save_file(whole(name).state_dict(), tmp_path / "w.safetensors")
    calibrate(
        CalibrateOptions(
            model=name,
            weights=str(tmp_path / "w.safetensors"),
            data=str(tmp_path / "photos"),
            image_size=64,
            output=tmp_path / "m.qat",
            device="cpu",
        )
    )
    sidecar = read_sidecar(tmp_path / "m.qat", "checkpoint")
    assert sidecar.details["model"]["num_classes"] == 5
    ratios = {one["tensor"]: one["sqnr_db"] for one in sidecar.figures["agreement"]["outputs"]}
    assert ratios.keys() == {"cls_logits", "bbox_regression"}
    assert min(ratios.values()) > 5
    exported = export_onnx(tmp_path / "m.qat", parity_images=2)
    assert {spec.name: spec.shape[2] for spec in exported.outputs} == {"cls_logits": 5, "bbox_regression": 4}
    assert build.main(build.BuildOptions(model=tmp_path / "m.onnx")) == 0
    figures = read_sidecar(tmp_path / "m.engine", "engine").figures
    assert figures["convolutions_int8"] == figures["convolutions"] == 98
