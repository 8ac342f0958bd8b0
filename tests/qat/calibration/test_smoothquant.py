"""SmoothQuant: the float network stays what it is, the factors are the formula's, and what must be left alone is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from commands import one_thread
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torchvision.models import SwinTransformer, VisionTransformer

from export import export_onnx
from qat.base.artifact import read_sidecar
from qat.base.errors import UserError
from qat.base.sqnr import sqnr_db
from qat.calibrate import main as calibrate
from qat.calibration import layer_norms
from qat.calibration.activation_ranges import calibrate_ranges
from qat.calibration.settings import CalibrationSettings
from qat.calibration.smoothquant import LIMITS, Smoothed, say_smoothed, smoothing_factors, smoothquant
from qat.checkpoint import load_state
from qat.fake_quantize.prepare import activation_quantizers, copy_for_evaluation, prepare
from qat.models import ModelSpec, build_model
from qat.options import CalibrateOptions, TrainOptions
from qat.train import main as train

C = 16  # channels of the small networks

VIT = f"""
from torchvision.models import VisionTransformer

def net(num_classes):
    return VisionTransformer(16, 4, 1, 2, {2 * C}, {4 * C}, dropout=0.1, attention_dropout=0.1, num_classes=num_classes)
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def randomized(model: nn.Module) -> nn.Module:
    """``model`` in evaluation, in which every channel of a normalization has a size of its own, and no weight is 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln" in name:
                scale = torch.randn(parameter.shape).exp()
                parameter.copy_(scale if name.endswith("weight") else scale * torch.randn(parameter.shape))
            elif not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def in_float(prepared: fx.GraphModule, x: Tensor) -> Tensor:
    with torch.no_grad():
        answer: Tensor = copy_for_evaluation(prepared, quantized=False)(x)
    return answer


def in_numpy(tensor: Tensor) -> Any:
    return tensor.detach().double().numpy()


def images(size: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_alike(found: Tensor, expected: Tensor, error: float) -> None:
    assert float((found - expected).norm() / expected.norm()) < error


# --- the float network computes the same


def vit() -> nn.Module:
    return VisionTransformer(16, 4, 2, 2, 32, 64, num_classes=8)


def swin() -> nn.Module:
    """4x4 and 2x2 tokens in windows of 3x3: padded, and every second block shifted."""
    return SwinTransformer([2, 2], 32, [2, 2], [1, 2], [3, 3], num_classes=8)


def timm_vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    made: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=8, **sizes)
    return made


SWIN = [*["attn.linear", "mlp.0"] * 2, "reduction", *["attn.linear", "mlp.0"] * 2]


@pytest.mark.parametrize(
    ("build", "size", "layers", "alone"),
    [
        (vit, 16, ["self_attention.linear", "mlp.0"] * 2 + ["heads.head"], []),
        (swin, 8, SWIN, ["features.0.2", "norm"]),
        (timm_vit, 16, ["attn.qkv", "mlp.fc1"] * 2 + ["head"], []),
    ],
)
def test_transformers_compute_the_same(
    build: Callable[[], nn.Module], size: int, layers: list[str], alone: list[str]
) -> None:
    before = prepare(randomized(build()), input_shape=(3, size, size))
    for form, error in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        prepared, x = copy.deepcopy(before).to(form), images(size).to(form)
        expected = in_float(prepared, x)
        found = smoothquant(prepared, [x], 0.5)
        assert_alike(in_float(prepared, x), expected, error)
        read = [layer for one in found for layer in one.layers]
        assert len(read) == len(layers)
        for label, end in zip(read, layers, strict=True):
            assert label.endswith(end)
        assert [one.norm for one in found if not one.layers] == alone
        then, now = (dict(model.to(torch.float64).named_parameters()) for model in (before, prepared))
        changed = [name for name in then if not torch.equal(then[name], now[name])]
        assert len(changed) == 3 * len(layers)  # weight and bias of each LayerNorm, the weight of its layer


# --- the formula


class Block(nn.Module):
    """[N, 3, 8, 8] -> [N, 8]: tokens, a LayerNorm, and two linear layers that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, C, 2, 2), nn.LayerNorm(C)
        self.one, self.two, self.head = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, 8)

    def tokens(self, x: Tensor) -> Tensor:
        """[N, 16, C]."""
        return self.embed(x).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.tokens(x))
        return self.head((self.one(y).relu() + self.two(y)).relu().mean(1))


def prepared_block(model: nn.Module | None = None) -> fx.GraphModule:
    return prepare(randomized(model or Block()), input_shape=(3, 8, 8))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_factors_are_those_of_the_formula(alpha: float) -> None:
    model = randomized(Block())
    with torch.no_grad():
        model.norm.weight[3], model.norm.bias[3] = 0, 0  # type: ignore[index]
        model.one.weight[:, 5], model.two.weight[:, 5] = 0, 0  # type: ignore[index]
        batches = images(8, 12).split(5)
        y = in_numpy(model.norm(model.tokens(torch.cat(batches))))  # type: ignore[operator]
    weights = [in_numpy(layer.weight) for layer in (model.one, model.two)]
    x = np.abs(y).max((0, 1))
    w = np.abs(np.concatenate(weights)).max(0)
    s = np.array([1.0 if 0 in (a, b) else a**alpha / b ** (1 - alpha) for a, b in zip(x, w, strict=True)])

    prepared = prepare(model, input_shape=(3, 8, 8))
    assert smoothquant(prepared, batches, alpha) == [Smoothed("norm", ("one", "two"))]
    found = prepared.state_dict()
    for name in ("weight", "bias"):
        np.testing.assert_allclose(in_numpy(found[f"norm.{name}"]), in_numpy(getattr(model.norm, name)) / s, rtol=1e-6)
    for name, weight in zip(("one", "two"), weights, strict=True):
        np.testing.assert_allclose(in_numpy(found[f"{name}.weight"]), weight * s, rtol=1e-6)
        assert torch.equal(found[f"{name}.bias"], getattr(model, name).bias)


def test_ranges_are_those_of_the_smoothed_network() -> None:
    prepared = prepared_block()
    smoothquant(prepared, [images(8)], 1.0)
    calibrate_ranges(prepared, [images(8)], "max")
    assert float(activation_quantizers(prepared)["norm"].amax) == pytest.approx(1.0)


def test_factors_are_1_for_dead_channels_and_never_overflow() -> None:
    x = torch.tensor([0.0, 1.0, 0.0, 4.0, 1e-30, 1e30, 1e-44])
    w = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1e-44])
    assert smoothing_factors(x, w, 0.5).tolist() == pytest.approx([1, 1, 1, 2, LIMITS[0], LIMITS[1], 1])
    assert smoothing_factors(x, w, 0.0).tolist() == pytest.approx([1, 1, 1, 1, 1, 1, LIMITS[1]])


def test_outliers_cost_less() -> None:
    """Two channels are 50 times as large as the others, and are read by weights that are as much smaller."""
    model = randomized(vit())
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
                module.weight[:2] *= 50
            elif name.endswith(("self_attention", "mlp.0", "head")):
                weight = module.in_proj_weight if name.endswith("attention") else module.weight
                weight[:, :2] /= 50
    x, unseen = images(16, 32).split(16)
    found = {}
    for alpha in (None, 0.5):
        prepared = prepare(model, input_shape=(3, 16, 16))
        if alpha is not None:
            smoothquant(prepared, [x], alpha)
        calibrate_ranges(prepared, [x])
        with torch.no_grad():
            exact, answer = model(unseen).double(), prepared(unseen).double()
        found[alpha] = sqnr_db(float(exact.square().sum()), float((answer - exact).square().sum()))
    assert found[None] is not None
    assert found[0.5] is not None
    assert found[0.5] > found[None] + 6


# --- which LayerNorms


def _through(move: Callable[[Tensor], Tensor]) -> type[Block]:
    class Moved(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.tokens(x))
            z = move(y)
            return self.head(self.one(z).flatten(1, -2).mean(1) + self.two(y).mean(1))

    return Moved


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda y: y[:, 1:5],
    "token": lambda y: y[:, :1],
    "split": lambda y: y.split(8, 1)[1],
    "window": lambda y: y.view(-1, 2, 2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, C),
    "roll": lambda y: y.view(-1, 4, 4, C).roll((1, -1), (1, 2)),
    "pad": lambda y: F.pad(y, (0, 0, 1, 2)),
    "image and back": lambda y: y.transpose(1, 2).reshape(-1, C, 4, 4).flatten(2).transpose(1, 2),
    "dropout": lambda y: F.dropout(y, 0.1, training=False).unsqueeze(1),
    "size": lambda y: y.reshape(y.shape[0], y.size(1), C),
}


@pytest.mark.parametrize("name", MOVES)
def test_channels_that_stay_last_are_followed(name: str) -> None:
    prepared = prepared_block(_through(MOVES[name])())
    expected = in_float(prepared, images(8))
    assert smoothquant(prepared, [images(8)], 0.7) == [Smoothed("norm", ("one", "two"))]
    assert_alike(in_float(prepared, images(8)), expected, 1e-6)


LOSES = {
    "channels rolled": lambda y: y.roll(1, -1),
    "tokens last": lambda y: y.transpose(1, 2),
    "channels flipped": lambda y: y.flip(-1),
    "half of the channels": lambda y: y[..., :8].repeat(1, 1, 2),
    "channels mixed": lambda y: y.reshape(-1, C, 16).transpose(1, 2).reshape(-1, 16, C),
    "channels padded": lambda y: F.pad(y, (1, 0))[..., :C],
}


class Residual(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.tokens(x))
        return self.head((self.one(y) + y + self.two(y)).mean(1))


class Pooled(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.tokens(x))
        return self.head(self.one(y).mean(1) + y.mean(1))


class Answered(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.tokens(x))
        return self.head(self.one(y).mean(1)), y


class Twice(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.tokens(x))
        return self.head(self.two(self.norm(self.one(y))).mean(1))


class SharedLayer(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.tokens(x))
        return self.head(self.one(y).mean(1) + self.one(self.tokens(x)).mean(1))


class Tied(Block):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.LayerNorm(C)
        self.other.weight = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.tokens(x))
        return self.head(self.two(self.other(self.one(y))).mean(1))


class Plain(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C, elementwise_affine=False)


class Wide(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((16, C))


class Computed(Block):
    """Its first layer's weight is computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.one)


class Cross(Block):
    """Queries of one tensor, keys and values of another: parts of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(C, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.tokens(x))
        z = self.one(self.tokens(x))
        return self.head(self.attention(y, z, z, need_weights=False)[0].mean(1))


READ, SHARED, NO_PARAMETER = layer_norms.READ, layer_norms.SHARED, layer_norms.NO_PARAMETER
LEFT_ALONE: dict[str, tuple[type[Block], list[str]]] = {
    "residual": (Residual, [READ]),
    "pooled": (Pooled, [READ]),
    "an output": (Answered, [READ]),
    "called twice": (Twice, [SHARED, SHARED]),
    "a layer called twice": (SharedLayer, [SHARED]),
    "a weight of two": (Tied, [SHARED, SHARED]),
    "no weight": (Plain, [layer_norms.NO_WEIGHT]),
    "of several dimensions": (Wide, [layer_norms.NO_WEIGHT]),
    "a weight that is computed": (Computed, [NO_PARAMETER]),
    "cross attention": (Cross, [NO_PARAMETER]),
    **{name: (_through(move), [layer_norms.NOT_LAST]) for name, move in LOSES.items()},
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_others_are_left_alone(name: str) -> None:
    build, reasons = LEFT_ALONE[name]
    prepared = prepared_block(build())
    before = copy.deepcopy(prepared.state_dict())
    found = smoothquant(prepared, [images(8)], 0.7)
    assert [one.reason for one in found] == reasons
    for key, tensor in prepared.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


def test_a_layer_that_stays_in_float_is_another_reader() -> None:
    prepared = prepare(randomized(Block()), input_shape=(3, 8, 8), keep_float=["two"])
    assert [one.reason for one in smoothquant(prepared, [images(8)])] == [READ]


def test_a_product_with_a_matrix_and_a_norm_without_bias() -> None:
    class Product(Block):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(C, bias=False)
            self.matrix = nn.Parameter(torch.randn(C, C))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.layer_norm(self.tokens(x), (C,), self.norm.weight, None)
            return self.head((y @ self.matrix).mean(1))

    prepared = prepared_block(Product())
    expected, matrix = in_float(prepared, images(8)), prepared.state_dict()["matrix"].clone()
    (found,) = smoothquant(prepared, [images(8)])
    assert len(found.layers) == 1
    assert_alike(in_float(prepared, images(8)), expected, 1e-6)
    factors = prepared.state_dict()["matrix"] / matrix
    torch.testing.assert_close(factors, factors[:, :1].expand(C, C))  # [C, O]: one for each row


# --- what is refused


def test_what_cannot_be_smoothed_is_refused_and_nothing_changes() -> None:
    prepared = prepared_block()
    before = copy.deepcopy(prepared.state_dict())
    with pytest.raises(ValueError, match=r"alpha is 1\.1: it must be within 0 to 1"):
        smoothquant(prepared, [images(8)], 1.1)
    with pytest.raises(UserError, match="SmoothQuant got no images"):
        smoothquant(prepared, [])
    with pytest.raises(UserError, match="the output of norm has NaN or infinity"):
        smoothquant(prepared, [images(8), images(8) * float("nan")])
    for name, tensor in prepared.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    calibrate_ranges(prepared, [images(8)])
    with pytest.raises(UserError, match=r"the model has ranges, .* call qat\.smoothquant before they are set"):
        smoothquant(prepared, [images(8)])


def test_a_network_without_layer_norms() -> None:
    assert smoothquant(prepare(nn.Sequential(nn.Conv2d(3, 8, 3)), input_shape=(3, 8, 8)), []) == []


@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan")])
def test_the_option_is_out_of_range(alpha: float) -> None:
    with pytest.raises(UserError, match=f"--smoothquant {alpha} is out of range: it must be within 0 to 1"):
        CalibrationSettings(smoothquant=alpha)


# --- the commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision transformer in net.py, its weights in net.safetensors, and images of 16 px in images.npz."""
    folder = tmp_path_factory.mktemp("smooth")
    (folder / "net.py").write_text(VIT)
    tiny.write_images(folder / "images.npz")
    model = randomized(build_model(ModelSpec(f"{folder / 'net.py'}:net", 3)))
    save_file(model.state_dict(), folder / "net.safetensors")
    return folder


def calibrated(folder: Path, output: Path, **changes: Any) -> dict[str, Tensor]:
    given = tiny.options(folder, **{"output": output, "weights": str(folder / "net.safetensors")} | changes)
    options = {name: value for name, value in given.items() if "epochs" not in name and not name.endswith("_lr")}
    calibrate(CalibrateOptions(**options))
    return load_file(output)


def test_calibrate_smooths_before_it_calibrates(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = calibrated(folder, tmp_path / "model.qat", smoothquant=0.5)
    assert "SmoothQuant: 3 LayerNorms smoothed, which 3 linear layers read\n" in capsys.readouterr().out
    sidecar = read_sidecar(tmp_path / "model.qat", "checkpoint")
    assert sidecar.details["smoothquant"] == 0.5
    weights = load_file(folder / "net.safetensors")
    changed = {name for name in weights if not torch.equal(weights[name], found[name])}
    assert len(changed) == 9
    # Without the option, the smoothed weights get the same ranges.
    save_file({name: found[name] for name in weights}, tmp_path / "smoothed.safetensors")
    again = calibrated(folder, tmp_path / "again.qat", weights=str(tmp_path / "smoothed.safetensors"))
    assert read_sidecar(tmp_path / "again.qat", "checkpoint").details["smoothquant"] is None
    assert found.keys() == again.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, again[name], rtol=0, atol=0)
    exported = export_onnx(tmp_path / "model.qat")
    assert exported.figures["parity"]["other_top1"] == 0
    assert exported.figures["parity"]["worst_layer"]["sqnr_db"] > 60


def test_ranges_of_a_checkpoint_are_refused(folder: Path, tmp_path: Path) -> None:
    state = {**load_file(folder / "net.safetensors"), "heads.head._input_quantizer._amax": torch.tensor(3.0)}
    torch.save(state, tmp_path / "ranges.pth")
    for command in (calibrated, trained):
        with pytest.raises(UserError, match="come with ranges, which --smoothquant would invalidate: leave it out, or"):
            command(folder, tmp_path / "m.qat", smoothquant=0.5, weights=str(tmp_path / "ranges.pth"), float_epochs=0)


def trained(folder: Path, output: Path, **changes: Any) -> dict[str, Tensor]:
    train(TrainOptions(**tiny.options(folder, output=output, **changes)))
    return load_file(output)


def test_a_network_without_layer_norms_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, tmp_path / "m.qat", smoothquant=0.5, float_epochs=0, qat_epochs=0)  # of convolutions
    line = "warning: --smoothquant changes nothing: this network has no LayerNorms\n"
    assert capsys.readouterr().err == line


def test_those_left_alone_are_counted_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    alone = [Smoothed(f"n{i}", reason=READ) for i in range(6)]
    say_smoothed([Smoothed("a", ("b", "c")), *alone, Smoothed("d", reason=SHARED)])
    say_smoothed(alone[:1])
    said = capsys.readouterr()
    assert said.out == (
        "SmoothQuant: 1 LayerNorms smoothed, which 2 linear layers read; "
        f"6 left alone, {READ}: n0, n1, n2, n3 and 2 others; 1 left alone, {SHARED}: d\n"
    )
    assert said.err == f"warning: --smoothquant changes nothing: 1 left alone, {READ}: n0\n"


def test_training_smooths_the_teacher_too_and_resumes_to_the_same_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"smoothquant": 0.5, "float_epochs": 1, "float_lr": 1e-3, "qat_epochs": 1, "distill_features": 1.0}
    whole = trained(folder, tmp_path / "whole.qat", **chosen)
    assert read_sidecar(tmp_path / "whole.qat", "checkpoint").details["smoothquant"] == 0.5
    output = tmp_path / "model.qat"
    with monkeypatch.context() as patch:
        tiny.stop_in_steps(patch, lambda step: step == tiny.STEPS + 1)  # the first of the fine-tuning
        with pytest.raises(tiny.Stopped):
            trained(folder, output, **chosen)
    state, details = load_state(output.with_name("model.qat.state"))
    assert (details["phase"], details["options"]["smoothquant"]) == ("qat", 0.5)
    for name in load_file(folder / "net.safetensors"):
        assert torch.equal(state[f"teacher.{name}"], state[f"model.{name}"])
    with pytest.raises(UserError, match=r"smoothquant was 0\.5, now None"):
        trained(folder, output, **(chosen | {"smoothquant": None}), resume=True)
    resumed = trained(folder, output, **chosen, resume=True)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


@pytest.mark.slow
def test_two_processes_smooth_as_one_does(folder: Path, tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        output = tmp_path / f"{count}.qat"
        chosen = {"weights": str(folder / "net.safetensors"), "float_epochs": 0, "qat_epochs": 0, "smoothquant": 0.5}
        done = processes.train(folder, count, output=output, **chosen)
        assert done.returncode == 0, done.stderr
        found.append(load_file(output))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-7)
