"""Models by name and their weights: what is built, what is loaded, and one line for everything else."""

from __future__ import annotations

import dataclasses
import json
import urllib.request
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from qat.base.errors import UserError
from qat.data.preprocessing import ImagePreset
from qat.models import ModelSpec, build_model, options_for_size, spec_for
from qat.weights import build_pretrained, load_weights, preset_of_weights

NET = """
from torch import nn
def net(num_classes, width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, num_classes))
def broken(num_classes):
    raise KeyError("oh")
def number(num_classes):
    return num_classes
"""


@pytest.fixture
def net_file(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def refused_model(name: str, *parts: str, **kwargs: object) -> None:
    with pytest.raises(UserError) as caught:
        build_model(ModelSpec(name, 4, kwargs))
    assert_line(caught.value, parts)


def refused_weights(model: nn.Module, weights: object, *parts: str) -> None:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(model, str(weights))
    assert_line(caught.value, parts)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def assert_line(error: UserError, parts: tuple[str, ...]) -> None:
    line = str(error)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def build_net(net_file: Path, classes: int = 4, **kwargs: object) -> nn.Module:
    return build_model(ModelSpec(f"{net_file}:net", classes, kwargs))


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# --- models


def test_torchvision_model_has_its_keys_and_zero_initialized_residuals() -> None:
    model = build_model(ModelSpec("resnet18", 7))
    assert model.state_dict().keys() == torchvision.models.resnet18(num_classes=7).state_dict().keys()
    assert model.get_parameter("fc.weight").shape == (7, 512)
    assert not model.get_parameter("layer1.0.bn2.weight").any()
    assert model.get_parameter("layer1.0.bn1.weight").all()
    assert (
        build_model(ModelSpec("resnet18", 7, {"zero_init_residual": False})).get_parameter("layer1.0.bn2.weight").all()
    )


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_off(name: str) -> None:
    model = build_model(ModelSpec(name, 5))
    assert not any("aux" in key.lower() for key in model.state_dict())
    assert model(torch.zeros(2, 3, 96, 96)).shape == (2, 5)  # in training mode too, logits and nothing else


@pytest.mark.parametrize("name", ["mobilenet_v2", "regnet_y_400mf", "squeezenet1_1"])
def test_other_families(name: str) -> None:
    assert build_model(ModelSpec(name, 5)).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_a_segmentation_model_is_built_without_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    model = build_model(ModelSpec("lraspp_mobilenet_v3_large", 5)).eval()
    assert model(torch.zeros(1, 3, 64, 64))["out"].shape == (1, 5, 64, 64)


def test_timm_model() -> None:
    pytest.importorskip("timm")
    assert build_model(ModelSpec("timm/resnet18", 5)).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    refused_model("timm/resnet5", "no model 'resnet5'", "did you mean resnet")


def test_function_of_a_file(net_file: Path) -> None:
    assert build_net(net_file, 6, width=8)(torch.zeros(2, 3, 3, 3)).shape == (2, 6)


def test_spec_goes_through_json() -> None:
    spec = ModelSpec("resnet18", 7, {"zero_init_residual": False})
    assert ModelSpec(**json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


def test_the_seed_decides_the_weights() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(build_model(ModelSpec("resnet18", 7)))
    assert equal(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize(
    ("name", "pixels", "options"),
    [
        ("timm/test_vit", 64, {"img_size": 64}),  # it is built for 160 pixels
        ("timm/test_vit", 160, {}),
        ("timm/test_vit", None, {}),
        ("timm/resnet18", 64, {}),  # of any size
        ("resnet18", 64, {}),
    ],
)
def test_networks_of_a_fixed_size_are_built_for_the_images(
    name: str, pixels: int | None, options: dict[str, int]
) -> None:
    assert options_for_size(name, pixels) == options
    model = build_model(spec_for(name, 3, 3, options)).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, pixels or 160, pixels or 160)).shape == (1, 3)


def test_unknown_models(net_file: Path) -> None:
    refused_model("resnet5", "unknown model 'resnet5'", "did you mean resnet50", "98 models")
    refused_model("r3d_18", "unknown model")
    refused_model("resnet18", "cannot be built", "width=3", width=3)
    refused_model(f"{net_file.parent}/absent.py:net", "no file", "absent.py")
    refused_model(f"{net_file}:nets", "no function 'nets'", "net, broken, number")
    refused_model(f"{net_file}:broken", "KeyError", "oh")
    refused_model(f"{net_file}:number", "returned a int", "torch.nn.Module")
    for text, part in (("import absent_module", "ModuleNotFoundError"), ("def net(:", "SyntaxError")):
        net_file.write_text(text)
        refused_model(f"{net_file}:net", "cannot be run", part)


# --- weights


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
def test_weights_from_a_file(net_file: Path, tmp_path: Path, suffix: str) -> None:
    given, model = build_net(net_file), build_net(net_file)
    path = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(given.state_dict(), path)
    assert str(path) in load_weights(model, str(path))[0]
    assert equal(given.state_dict(), model.state_dict())


@pytest.mark.parametrize("nest", ["state_dict", "model"])
def test_nested_state_dict_with_prefix_and_without_batch_counters(net_file: Path, tmp_path: Path, nest: str) -> None:
    given, model = build_net(net_file), build_net(net_file)
    state = {f"module.{key}": t for key, t in given.state_dict().items() if "num_batches" not in key}
    torch.save({nest: state, "epoch": 3}, tmp_path / "w.pth")
    load_weights(model, str(tmp_path / "w.pth"))
    assert equal(given.state_dict(), model.state_dict())


def test_classifier_of_another_class_count_stays_random(net_file: Path, tmp_path: Path) -> None:
    given, model = build_net(net_file, 10), build_net(net_file, 4)
    torch.save(given.state_dict(), tmp_path / "w.pth")
    head = model.get_parameter("3.weight").clone()
    note, _ = load_weights(model, str(tmp_path / "w.pth"))
    assert "except 3: it has 10 classes there and 4 here" in note
    assert torch.equal(model.get_parameter("3.weight"), head)
    assert torch.equal(model.get_parameter("0.weight"), given.get_parameter("0.weight"))


def test_auxiliary_heads_in_a_weight_file_are_skipped(tmp_path: Path) -> None:
    given = torchvision.models.googlenet(num_classes=5, init_weights=False)
    model = build_model(ModelSpec("googlenet", 5))
    torch.save(given.state_dict(), tmp_path / "w.pth")
    load_weights(model, str(tmp_path / "w.pth"))
    assert torch.equal(model.get_parameter("fc.weight"), given.get_parameter("fc.weight"))


def test_weights_by_name_come_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = torchvision.models.squeezenet1_1()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]  # as if downloaded before
    cached.parent.mkdir(parents=True)
    torch.save(given.state_dict(), cached)
    for weights in ("DEFAULT", "IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"):
        model = build_model(ModelSpec("squeezenet1_1", 4))
        assert "1000 classes there and 4 here" in load_weights(model, weights)[0]
        assert torch.equal(model.get_parameter("features.0.weight"), given.get_parameter("features.0.weight"))
    found = build_pretrained("squeezenet1_1", "IMAGENET1K_V1")
    assert equal(found.model.state_dict(), given.state_dict())
    assert (found.spec.num_classes, found.class_names[:2]) == (1000, ("tench", "goldfish"))


def test_the_classifier_in_the_weights_tells_the_number_of_classes(net_file: Path, tmp_path: Path) -> None:
    name, weights = f"{net_file}:net", str(tmp_path / "w.pth")
    given = build_net(net_file, 7)
    torch.save(given.state_dict(), weights)
    for classes in (None, 7):
        found = build_pretrained(name, weights, classes)
        assert (found.spec, found.class_names, found.ranges) == (ModelSpec(name, 7), (), {})
        assert equal(found.model.state_dict(), given.state_dict())
    with pytest.raises(UserError, match=r"w\.pth have 7 classes \(3\), not 8: leave out --classes"):
        build_pretrained(name, weights, 8)


def network_of_heads(folder: Path, heads: str) -> str:
    """The name of a network whose ``heads``, Python code, may use num_classes."""
    file = folder / "heads.py"
    file.write_text(f"from torch import nn\ndef net(num_classes):\n    return nn.ModuleDict({heads})")
    return f"{file}:net"


def test_two_classifiers_tell_the_number_of_classes_if_both_have_it(tmp_path: Path) -> None:
    name, weights = network_of_heads(tmp_path, "{n: nn.Linear(4, num_classes) for n in 'ab'}"), str(tmp_path / "w.pth")
    given = build_model(ModelSpec(name, 7))
    torch.save(given.state_dict(), weights)
    for classes in (None, 7):
        found = build_pretrained(name, weights, classes)
        assert found.spec.num_classes == 7
        assert equal(found.model.state_dict(), given.state_dict())
    torch.save(given.state_dict() | {"b.weight": torch.zeros(9, 4), "b.bias": torch.zeros(9)}, weights)
    with pytest.raises(UserError, match=r"do not fit .* or their --classes if they are not 1000"):
        build_pretrained(name, weights)


def test_a_detectors_head_has_rows_for_each_class_and_anchor(tmp_path: Path) -> None:
    heads, weights = "{'scores': nn.Conv2d(4, 9 * num_classes, 1), 'boxes': nn.Conv2d(4, 36, 1)}", tmp_path / "w.pth"
    given = build_model(ModelSpec(name := network_of_heads(tmp_path, heads), 7))
    torch.save(given.state_dict(), weights)
    found = build_pretrained(name, str(weights))
    assert found.spec.num_classes == 7
    assert equal(found.model.state_dict(), given.state_dict())


def test_one_head_of_two_that_ignores_the_number_of_classes(tmp_path: Path) -> None:
    name = network_of_heads(tmp_path, "{'a': nn.Linear(4, num_classes), 'b': nn.Linear(4, 1000)}")
    weights = str(tmp_path / "w.pth")
    both = {"a.weight": (10, 4), "a.bias": (10,), "b.weight": (10, 4), "b.bias": (10,)}
    torch.save({name: torch.zeros(shape) for name, shape in both.items()}, weights)
    with pytest.raises(UserError, match=r"have 10 classes, but .* has 1000 \(b\) when it is built for 10"):
        build_pretrained(name, weights)


def test_heads_that_only_train_are_ignored(tmp_path: Path) -> None:
    segmenter = partial(torchvision.models.get_model, "fcn_resnet50", weights_backbone=None, num_classes=5)
    torch.save(segmenter(aux_loss=True).state_dict(), tmp_path / "w.pth")
    found = build_pretrained("fcn_resnet50", str(tmp_path / "w.pth"))
    assert found.spec.num_classes == 5
    assert found.notes == ("8 entries ignored (aux_classifier.0.weight, aux_classifier.1.weight, ...)",)


def test_a_model_that_ignores_the_number_of_classes(tmp_path: Path) -> None:
    file, weights = tmp_path / "five.py", str(tmp_path / "w.pth")
    file.write_text("from torch import nn\ndef net(num_classes):\n    return nn.Sequential(nn.Linear(4, 5))")
    torch.save(torch.nn.Sequential(torch.nn.Linear(4, 7)).state_dict(), weights)
    with pytest.raises(
        UserError,
        match=r"have 7 classes, but .* has 5 \(0\) when it is built for 7: give weights of this model",
    ):
        build_pretrained(f"{file}:net", weights)


def test_weights_that_do_not_fit(net_file: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "w.pth", build_net(net_file)
    torch.save(build_net(net_file, width=8).state_dict(), path)
    refused_weights(model, path, "7 keys with another shape (0.weight [8, 3, 3, 3] for [4, 3, 3, 3], ", ", ...)")
    state = model.state_dict()
    state["extra"] = state.pop("0.bias")
    torch.save(state, path)
    refused_weights(model, path, "1 keys missing (0.bias)", "1 keys unexpected (extra)")
    torch.save(torchvision.models.squeezenet1_1(num_classes=4).state_dict(), path)
    refused_weights(build_model(ModelSpec("resnet18", 4)), path, "keys missing (conv1.weight, ", "keys unexpected")


def test_a_function_that_takes_no_number_of_classes(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from torch import nn\ndef none(): return nn.Sequential(nn.Linear(4, 7))\n"
        "def width(*, width=3): return nn.Sequential(nn.Linear(4, width))\n"
        "def passes(**options): return nn.Sequential(nn.Linear(4, options['num_classes']))\n"
        "def other(classes): return nn.Linear(4, classes)\n"
    )
    for function, kwargs, rows in (("none", {}, 7), ("width", {"width": 5}, 5), ("passes", {}, 2)):
        model = build_model(ModelSpec(f"{file}:{function}", 2, kwargs))
        assert len(model.get_parameter("0.weight")) == rows
    refused_model(f"{file}:other", "cannot be built with no arguments", "'classes'")
    torch.save(nn.Sequential(nn.Linear(4, 7)).state_dict(), tmp_path / "w.pth")
    assert build_pretrained(f"{file}:passes", str(tmp_path / "w.pth")).spec.num_classes == 7
    with pytest.raises(UserError, match=r"have 7 classes, but .*:width has 3 \(0\) when it is built for 7"):
        build_pretrained(f"{file}:width", str(tmp_path / "w.pth"))


def test_weights_files_without_weights(net_file: Path, tmp_path: Path) -> None:
    model = build_net(net_file)
    refused_weights(model, tmp_path / "absent.pth", "cannot read weights file", "No such file")
    refused_weights(model, tmp_path, "cannot read", "directory")
    torch.save({"epoch": 3, "args": {}}, tmp_path / "w.pth")
    refused_weights(model, tmp_path / "w.pth", "does not hold a state dict (found: epoch (int), args (dict))")
    torch.save([1, 2], tmp_path / "w.pth")
    refused_weights(model, tmp_path / "w.pth", "(found: list)")


def test_one_line_says_what_was_taken_and_what_was_not(net_file: Path, tmp_path: Path) -> None:
    given, model, path = build_net(net_file, 10), build_net(net_file, 4), tmp_path / "w.pth"
    average = {f"module.{key}": tensor for key, tensor in given.state_dict().items()}
    average |= {"n_averaged": torch.tensor(3), "module.0.total_ops": torch.zeros(1)}
    torch.save({"model": model.state_dict(), "model_ema": average, "epoch": 3}, path)
    line, _ = load_weights(model, str(path))
    assert line == (
        f"weights: {path}, entry 'model_ema' (a moving average of the weights; 'model' not taken), "
        "prefix 'module.' removed, 2 entries ignored (n_averaged, 0.total_ops), "
        "except 3: it has 10 classes there and 4 here, so it starts at random"
    )
    assert torch.equal(model.get_parameter("0.weight"), given.get_parameter("0.weight"))


def test_unknown_weight_names(net_file: Path) -> None:
    refused_weights(build_model(ModelSpec("resnet18", 4)), "IMAGENET1K_V9", "no weights", "IMAGENET1K_V1, DEFAULT")
    refused_weights(build_net(net_file), "DEFAULT", "only torchvision's models have weights by name")


def test_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of its first use
    model = build_model(ModelSpec("squeezenet1_1", 4))
    refused_weights(model, "DEFAULT", "cannot download weights", "check the network", "https://")


@pytest.mark.parametrize(
    ("name", "weights", "size", "short_side"),
    [
        ("resnet50", "IMAGENET1K_V2", 224, 232),
        ("resnet50", "ResNet50_Weights.IMAGENET1K_V1", 224, 256),
        ("efficientnet_b4", "DEFAULT", 380, 384),
        ("inception_v3", "DEFAULT", 299, 342),
        ("timm/inception_v3", "some.pth", 299, 341),
        ("resnet50", "some.pth", 224, 256),
        ("resnet50", None, 224, 256),
        ("resnet50", "UNKNOWN", 224, 256),
    ],
)
def test_weights_tell_how_they_take_photographs(name: str, weights: str | None, size: int, short_side: int) -> None:
    found = preset_of_weights(name, weights)
    assert (found.size, found.short_side) == (size, short_side)


def test_weights_tell_how_photographs_are_resampled() -> None:
    for name, weights, expected in (
        ("resnet50", "IMAGENET1K_V2", "bilinear"),
        ("efficientnet_b4", "DEFAULT", "bicubic"),
        ("swin_t", "DEFAULT", "bicubic"),
        ("timm/resnet50", "some.pth", "bicubic"),
        ("timm/inception_v3", "some.pth", "bicubic"),
        ("resnet50", None, "bilinear"),
    ):
        assert preset_of_weights(name, weights).interpolation == expected, name


def test_weights_tell_their_mean_and_deviation() -> None:
    assert preset_of_weights("efficientnet_v2_l", "DEFAULT").mean == (0.5, 0.5, 0.5)
    assert preset_of_weights("timm/vit_base_patch16_224", "some.pth").std == (0.5, 0.5, 0.5)
    assert preset_of_weights("resnet50", "DEFAULT").mean == ImagePreset().mean == (0.485, 0.456, 0.406)
