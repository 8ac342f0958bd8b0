"""Images of a camera's size in, resized within the network: against the preprocessing of training, and to an engine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, fx, nn

from deploy.builder import build
from deploy.fitting import fitted
from deploy.installed import find_toolkit
from deploy.reference import network_input, read_reference
from deploy.settings import BuildSettings
from export.from_checkpoint import export_onnx
from export.linter import lint_onnx
from export.session import run, session
from export.source_images import SourceImages, size_of
from qat.base.errors import UserError
from qat.calibration.activation_ranges import calibrate_ranges
from qat.data.preprocessing import Preprocessing
from qat.fake_quantize.prepare import prepare

ONES = ((0.0,) * 3, (1.0,) * 3)
LETTERBOX = Preprocessing(32, 32, *ONES, resize=32, letterbox=True)
CROP = Preprocessing(32, 32, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), resize=36)
CUBIC = Preprocessing(32, 32, *ONES, resize=36, interpolation="bicubic")
GREY = Preprocessing(32, 32, (0.5,), (0.25,), resize=32, color="grey", letterbox=True)
WAYS = {"letterbox": LETTERBOX, "crop": CROP, "cubic": CUBIC, "grey": GREY}


def photos(height: int, width: int, channels: int = 3, count: int = 3) -> Tensor:
    """Smooth random images, uint8 [N, C, H, W]."""
    coarse = torch.rand(count, channels, 5, 7, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)
    return (255 * smooth).round().to(torch.uint8)


def network(channels: int = 3) -> fx.GraphModule:
    """Calibrated, for 32x32."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).eval()
    prepared = prepare(model, input_shape=(channels, 32, 32))
    with torch.no_grad():
        calibrate_ranges(prepared, [torch.randn(8, channels, 32, 32)], "max")
    return prepared


@pytest.mark.parametrize("size", [(48, 80), (80, 48), (20, 24), (33, 57), (32, 50), (64, 64)])
@pytest.mark.parametrize("way", ["letterbox", "grey"])
def test_a_letterbox_differs_by_rounding_alone(way: str, size: tuple[int, int]) -> None:
    preprocessing = WAYS[way]
    images = photos(*size, preprocessing.channels)
    gap = (SourceImages(*size, preprocessing).fit(images) - preprocessing.fit(images).float()).abs()
    assert gap.shape[-2:] == (32, 32)
    assert gap.max() <= 1.001  # torch cuts levels off, where this does not round


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (36, 36), (36, 51), (37, 90), (39, 39)])
@pytest.mark.parametrize("way", ["crop", "cubic"])
def test_a_crop_takes_the_same_pixels(way: str, size: tuple[int, int]) -> None:
    preprocessing = WAYS[way]
    images = photos(*size)
    found = SourceImages(*size, preprocessing).fit(images)
    assert found.shape == (3, 3, 32, 32)
    gap = (found - preprocessing.fit(images).float()).abs()
    assert gap.mean() < 1
    if min(size) == 36:  # which is not resized
        assert gap.max() == 0
    elsewhere = preprocessing.fit(images.roll(1, -1)).float()
    assert gap.mean() < 0.5 * (found - elsewhere).abs().mean()


def test_where_an_image_is_put_is_said_in_numbers() -> None:
    assert LETTERBOX.places(1080, 1920) == ([18, 32], [0, 7, 0, 7])
    assert LETTERBOX.places(50, 31) == ([32, 20], [6, 0, 6, 0])
    assert LETTERBOX.places(50, 33) == ([32, 21], [5, 0, 6, 0])
    assert CROP.places(1080, 1920) == ([36, 64], [-16, -2, -16, -2])
    assert CROP.places(36, 51) == ([36, 51], [-10, -2, -9, -2])


@pytest.mark.parametrize(
    ("way", "kind"),
    [(way, "uint8-nhwc") for way in ("letterbox", "crop", "cubic")]
    + [(way, "uint8-nchw") for way in ("letterbox", "grey")],
)
def test_the_file_and_its_engine_take_what_a_camera_gives(way: str, kind: Any, tmp_path: Path) -> None:
    preprocessing, path = WAYS[way], tmp_path / "m.onnx"
    model, images = network(preprocessing.channels), photos(54, 96, preprocessing.channels)
    sidecar = export_onnx(model, path, input=kind, source_size=(54, 96), preprocessing=preprocessing, images=images)
    shape = (54, 96, 3) if kind == "uint8-nhwc" else (preprocessing.channels, 54, 96)
    assert (sidecar.inputs[0].dtype, sidecar.inputs[0].shape) == ("uint8", (-1, *shape))
    assert sidecar.preprocessing["source_size"] == [54, 96]
    assert sidecar.figures["parity"]["outputs"][0]["sqnr_db"] > 60
    given = images.permute(0, 2, 3, 1).numpy()
    fed = network_input(given, sidecar)
    (found,) = run(session(path), fed).values()
    fitted = preprocessing.normalize(preprocessing.fit(images))
    with torch.no_grad():
        expected = model(fitted).numpy()
    assert np.square(found - expected).sum() < 1e-2 * np.square(expected).sum()
    assert np.array_equal(read_reference(path, sidecar).images, given)
    (resize,) = (node for node in onnx.load(path).graph.node if node.op_type == "Resize")
    stated = {one.name: onnx.helper.get_attribute_value(one) for one in resize.attribute}
    assert stated["mode"] == (b"cubic" if way == "cubic" else b"linear")
    assert stated["coordinate_transformation_mode"] in (b"half_pixel", b"pytorch_half_pixel")
    assert stated.get("antialias", 0) == 0
    assert lint_onnx(path) == []
    built = build(find_toolkit("tensorrt-rtx"), path, BuildSettings(capabilities=("8.9",)))
    assert not built.audit.broken
    in_int8, of = built.audit.count("convolution")
    assert in_int8 == of > 0


def test_an_image_file_of_another_size_is_refused(tmp_path: Path) -> None:
    stated = asdict(LETTERBOX) | {"source_size": [54, 96]}
    for size in ((96, 54), (54, 96)):
        Image.new("RGB", size, (1, 2, 3)).save(tmp_path / f"{size[0]}.png")
    assert np.array_equal(fitted(str(tmp_path / "96.png"), stated), np.full((54, 96, 3), (1, 2, 3)))
    with pytest.raises(UserError, match=r"has 96x54 pixels .* takes images of 54x96"):
        fitted(str(tmp_path / "54.png"), stated)


def test_random_images_are_enlarged(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    sidecar = export_onnx(network(), path, input="uint8-nhwc", source_size=(54, 96), preprocessing=LETTERBOX)
    assert sidecar.figures["parity"]["source"] == "random images, resized to 54x96"
    assert read_reference(path, sidecar).images.shape == (8, 54, 96, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source_size": (0, 96)}, "--source-size 0x96: height and width must be at least 1"),
        ({"source_size": (54, -1)}, "--source-size 54x-1: height and width must be at least 1"),
        ({"source_size": (32, 32)}, "is the size of the network's input, which needs no resizing: leave it out"),
        ({"input": "float32-nchw"}, "give --input uint8-nhwc or uint8-nchw"),
        ({"input": "int8-nchw"}, "give --input uint8-nhwc or uint8-nchw"),
        ({"preprocessing": None}, "and the network has none: give preprocessing"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"input": "uint8-nhwc", "source_size": (54, 96), "preprocessing": LETTERBOX} | options
    with pytest.raises(UserError) as error:
        export_onnx(network(), tmp_path / "m.onnx", **given)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["1080", "1080x", "0x5", "5x-3", "1080x1920x3", "axb", "1080 x 1920"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be height x width in pixels, each at least 1"):
        size_of(text)
    assert size_of("1080x1920") == (1080, 1920)
