"""``python -m qat.placement``: what it prints, its JSON, its picture, and one line for every mistake."""

from __future__ import annotations

import itertools
import json
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from commands import Run
from sidecars import edit

from qat.base.artifact import sidecar_path
from qat.checkpoint import load_checkpoint
from qat.fake_quantize.prepare import placement_of
from qat.graph.network import Network
from qat.graph.tracing import network_of, trace
from qat.models import ModelSpec, build_model
from qat.placement import PlacementOptions, main
from qat.placement_view import view_placement
from qat.rules.describe import PlacementView, texts_of
from qat.rules.drawing import draw
from qat.rules.graph_layout import Wire, lay_out
from qat.rules.place import RULES, place
from qat.rules.placement import Placement

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.few, self.norm, self.head = nn.Conv2d(32, 9, 3), nn.LocalResponseNorm(2), nn.Conv2d(9, num_classes, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.head(self.norm(self.few(x))).mean((2, 3))

def net(num_classes):
    return Net(num_classes)

class Branching(Net):
    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return super().forward(x)
"""
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def net(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(NET)
    return f"{path}:net"


def printed(capsys: pytest.CaptureFixture[str], model: object, **options: Any) -> str:
    main(PlacementOptions(model=str(model), **options))
    return capsys.readouterr().out


def network(model: str, size: int = 224) -> Network:
    return network_of(trace(build_model(ModelSpec(model, 1000)), (3, size, size)))


def as_read(placement: Placement) -> Any:
    return json.loads(json.dumps(placement.to_json()))


# --- what is printed


def test_the_whole_page_of_a_small_network(capsys: pytest.CaptureFixture[str], net: str) -> None:
    page = printed(capsys, net, image_size=32, num_classes=10, keep_float=("he[a]d",))
    assert page.splitlines() == [
        f"{net}, input 3x32x32",
        "INT8: 4 of 5 convolutions and linear layers, 1 of 1 concatenations, 0 of 1 average pools; "
        "5 tensors quantized, 1 groups that share a scale",
        "kept in float on request: --keep-float 'he[a]d'",
        "",
        "INT8 by weighted_input (4 convolution)",
        "  stem left right few",
        "",
        "INT8 by shared_concat_scale (1 concat)",
        "  cat",
        "",
        "float by kept_float: kept in float (1 convolution)",
        "  head",
        "",
        "float by pool_input: nothing after it reads INT8 (1 global pool)",
        "  mean",
        "",
        "float, because no rule makes these operations INT8 (1)",
        "  norm",
        "",
        "shared scales",
        "  1. cat: relu_1 relu_2 cat",
        "",
        f"rules from {RULES['weighted_input'].source}",
        f"  weighted_input: {RULES['weighted_input'].sentence}",
        f"  shared_concat_scale: {RULES['shared_concat_scale'].sentence}",
        f"  pool_input: {RULES['pool_input'].sentence}",
        "",
        "rules from the user",
        "  kept_float: kept in float on request",
    ]


def test_a_resnet_fits_on_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, "resnet50")
    assert len(page.splitlines()) < 40
    assert "INT8: 54 of 54 convolutions and linear layers, 16 of 16 additions, 1 of 1 average pools; 55 tensors" in page
    assert "  layer1: 0.conv1 0.conv2 0.conv3 0.downsample.0 1.conv1" in page
    assert "float" not in page


def test_a_module_of_many_operations_is_listed_by_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, "mobilenet_v2", image_size=64)
    assert "\n  features.3.conv: 0.0 1.0 2\n" in page
    assert "features.0.0 features.18.0\n" in page


def test_segmentation_models_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, "fcn_resnet50", image_size=64, num_classes=21)
    assert "INT8: 55 of 55 convolutions and linear layers" in page
    assert "float, because no rule makes these operations INT8 (1)\n  interpolate" in page


def test_a_checkpoint_is_shown_as_it_was_trained(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    """The saved decisions and sentences, not those of today's rules."""
    sidecar = json.loads(sidecar_path(checkpoint).read_text())
    (add,) = (entry for entry in sidecar["details"]["placement"]["decisions"] if entry["kind"] == "add")
    add["reason"] = "as in the old days"
    add["rule"] = "abandoned"
    sidecar["details"]["rules"] |= {"abandoned": "what was believed then", "weighted_input": "said otherwise"}
    edit(checkpoint, lambda content: content.update(sidecar))
    page = printed(capsys, checkpoint, json=tmp_path / "p.json")
    assert page.startswith(f"{checkpoint} ({sidecar['details']['model']['name']}), input 3x16x16\n")
    assert "by abandoned: as in the old days (1 add)\n  add\n" in page
    assert "\nrules from the version that trained the checkpoint\n  abandoned: what was believed then\n" in page
    assert "  weighted_input: said otherwise\n" in page
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["placement"] == as_read(placement_of(load_checkpoint(checkpoint).model))


# --- JSON


@pytest.mark.parametrize("keep_float", [(), ("layer2.0.*", "fc")])
def test_json_is_what_the_rules_say(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, keep_float: tuple[str, ...]
) -> None:
    page = printed(capsys, "resnet18", image_size=64, keep_float=keep_float, json=tmp_path / "new" / "p.json")
    placement = place(network("resnet18", 64), keep_float)
    content = json.loads((tmp_path / "new" / "p.json").read_text())
    assert content["placement"] == as_read(placement)
    assert Placement.from_json(content["placement"]) == placement
    assert content["scale_groups"] == placement.scale_groups()
    named = {d.rule for d in placement.decisions} | {rule for _, _, rule in placement.reads()}
    assert content["rules"].keys() == named
    assert ("kept_float" in named) is bool(keep_float)
    rule = RULES["residual_add"]
    assert content["rules"]["residual_add"] == {"sentence": rule.sentence, "source": rule.source}
    assert "\n".join(content["summary"]) in page
    assert content["input_shape"] == [3, 64, 64]


def test_nothing_is_written_unasked(capsys: pytest.CaptureFixture[str], net: str, tmp_path: Path) -> None:
    printed(capsys, net)
    assert {path.name for path in tmp_path.iterdir()} <= {"net.py", "__pycache__"}


# --- the picture


def elements(root: ElementTree.Element, tag: str, word: str) -> list[ElementTree.Element]:
    return [element for element in root.iter(SVG + tag) if word in element.get("class", "").split()]


def tip(element: ElementTree.Element) -> str:
    return element.findtext(f"{SVG}title") or ""


def picture(view: Network, placement: Placement) -> ElementTree.Element:
    return ElementTree.fromstring(draw(PlacementView("title", (3, 224, 224), view, placement, texts_of(placement))))


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "model",
    ["googlenet", "shufflenet_v2_x0_5", "efficientnet_b0", *(slow(name) for name in ("densenet121", "vit_b_16"))],
)
def test_a_box_for_every_operation_and_a_dot_for_every_quantizer(model: str) -> None:
    view = network(model)
    placement = place(view)
    root = picture(view, placement)
    boxes = elements(root, "g", "box")
    assert [tip(box).splitlines()[0] for box in boxes] == [f"{op.label} ({op.name})" for op in view]
    assert len(elements(root, "g", "int8")) - 1 == sum(d.quantized for d in placement.decisions)  # one in the legend
    dots = elements(root, "g", "dot")
    assert [tip(dot).splitlines()[0] for dot in dots] == [f"Q/DQ of {t.tensor}" for t in placement.tensors]
    for dot, tensor in zip(dots, placement.tensors, strict=True):
        reads = [f"{view[read.reader].label}: {read.rule}: {RULES[read.rule].sentence}" for read in tensor.reads]
        assert tip(dot).splitlines()[1:-1] == reads
    shared = [(dot.findtext(f"{SVG}text"), dot[1].get("fill")) for dot in dots if dot.find(f"{SVG}text") is not None]
    groups = placement.scale_groups()
    assert len(shared) == sum(map(len, groups.values()))
    assert len(set(shared)) == len(groups)


def test_states_and_reasons(net: str) -> None:
    view = network(net, 32)
    root = picture(view, place(view, ["head"]))
    states = {tip(box).split()[0]: box.get("class", "").split()[1] for box in elements(root, "g", "box")}
    assert states == {
        "x": "neutral",
        "stem": "int8",
        "relu": "neutral",
        "left": "int8",
        "right": "int8",
        "cat": "int8",
        "few": "int8",
        "norm": "float",
        "head": "kept",
        "mean": "float",
        "output": "neutral",
    }
    tips = {tip(box).split()[0]: tip(box) for box in elements(root, "g", "box")}
    assert tips["stem"] == (
        f"stem (stem)\nconvolution, output 16x32x32\nINT8 by weighted_input: {RULES['weighted_input'].sentence}"
    )
    assert tips["head"].endswith("float by kept_float: kept in float on request\nkept in float")
    assert tips["mean"].endswith("\nnothing after it reads INT8")
    assert tips["norm"].endswith("float: no rule knows this operation")


def test_lines_say_who_reads_codes(net: str) -> None:
    view = network(net, 32)
    lines = {
        tip(path): path.get("class") for path in picture(view, place(view, ["right"])).iter(SVG + "path") if tip(path)
    }
    assert lines["relu, read as INT8 by left"] == "codes"
    assert lines["relu, read in float by right"] is None
    assert lines["cat, read as INT8 by few"] == "codes"
    assert lines["norm, read as INT8 by head"] == "codes"
    assert lines["mean, read in float by output"] is None


def test_codes_that_are_moved_stay_codes() -> None:
    """A max pool beside convolutions reads codes, so what the next layer reads of it are codes, without a Q/DQ."""
    view = network("timm/inception_v4", 96)
    placement = place(view)
    (concat,) = (op for op in view if op.label == "features.3.cat")
    pool = next(name for name in concat.inputs if view[name].kind == "max_pool")
    moved = {tip(path): path.get("class") for path in picture(view, placement).iter(SVG + "path")}
    assert moved[f"{view[pool].label}, read as INT8 by features.3.cat"] == "codes"


def test_the_command_writes_the_picture(command: Run, net: str, tmp_path: Path) -> None:
    done = command("qat.placement", net, "--image-size", 32, "--svg", tmp_path / "p.svg", "--keep-float", "few", "head")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"picture: {tmp_path / 'p.svg'}\n")
    root = ElementTree.parse(tmp_path / "p.svg").getroot()
    assert [tip(box).split()[0] for box in elements(root, "g", "kept")[1:]] == ["few", "head"]
    words = [text.text for text in root.iter(SVG + "text")]
    assert net in words
    assert any(word and word.startswith("INT8: 3 of 5 convolutions") for word in words)
    assert "kept in float on request: --keep-float few head" in words


# --- the layout


def test_a_wire_runs_beside_the_boxes_that_it_passes() -> None:
    wires = [Wire("a", ("b", "d")), Wire("b", ("c",)), Wire("c", ("d",))]
    layout = lay_out(dict.fromkeys("abcd", (80.0, 20.0)), wires)
    heights = [layout.boxes[name][1] for name in "abcd"]
    assert heights == sorted(set(heights))
    assert layout.boxes["a"][0] == pytest.approx(layout.boxes["d"][0], abs=1)
    lane = {x for (x, y), _ in layout.wires[0] if layout.boxes["b"][1] < y < layout.boxes["c"][1]}
    assert all(abs(x - layout.boxes["b"][0]) > 40 for x in lane)
    assert lane


def test_branches_do_not_cross() -> None:
    wires = [Wire("in", tuple("abc")), *(Wire(name, (name.upper(),)) for name in "abc"), Wire("B", ("out",))]
    sizes = dict.fromkeys(("in", "a", "b", "c", "C", "A", "B", "out"), (30.0, 10.0))
    boxes = lay_out(sizes, wires).boxes
    assert [boxes[name][0] for name in "abc"] == pytest.approx([boxes[name.upper()][0] for name in "abc"])


@pytest.mark.parametrize("model", ["googlenet", slow("densenet121"), slow("vit_b_16")])
def test_boxes_stand_clear_of_each_other(model: str) -> None:
    view = network(model)
    root = picture(view, place(view))
    rows: dict[float, list[tuple[float, float]]] = {}
    for box in elements(root, "g", "box"):
        x, y, width, height = (float(box[1].get(name, "")) for name in ("x", "y", "width", "height"))
        rows.setdefault(round(y + height / 2, 0), []).append((x, x + width))
    assert len(rows) > 20
    for spans in rows.values():
        for (_, end), (start, _) in itertools.pairwise(sorted(spans)):
            assert end < start


# --- mistakes


def refused(done: subprocess.CompletedProcess[str], *parts: object) -> None:
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert str(part) in line, line
    assert done.returncode == 2
    assert "Traceback" not in done.stdout


def test_a_pattern_that_matches_nothing(command: Run, net: str, tmp_path: Path) -> None:
    given = ("--json", tmp_path / "p.json", "--keep-float", "head", "hed")
    refused(command("qat.placement", net, *given), "--keep-float hed matches none of the", "head")
    assert not (tmp_path / "p.json").exists()


def test_no_such_model(command: Run, tmp_path: Path) -> None:
    refused(command("qat.placement", "resnet5"), "unknown model 'resnet5'", "did you mean resnet50")
    refused(command("qat.placement", tmp_path / "no.qat"), f"no file {tmp_path / 'no.qat'}", "check the path")
    refused(command("qat.placement", tmp_path / "no.py:net"), "no file", "no.py", "check the path")


def test_the_line_that_stops_the_trace(command: Run, net: str) -> None:
    line = 1 + NET.splitlines().index("        if x.sum() > 0:")
    refused(
        command("qat.placement", net.replace(":net", ":Branching")),
        f"stopped by {net.removesuffix(':net')}:{line}: if x.sum() > 0:",
        "make that line independent of it",
    )


def test_images_that_the_model_does_not_take(command: Run, net: str) -> None:
    done = command("qat.placement", net, "--image-size", 2)
    refused(done, "does not take one image of 3x2x2: it was stopped by", "give another --image-size")
    for size in (0, -1):
        done = command("qat.placement", net, "--image-size", size)
        refused(done, f"(3, {size}, {size}) is not the shape of an input: give positive extents")


@pytest.mark.parametrize("option", [("--keep-float", "fc"), ("--image-size", "32"), ("--num-classes", "3")])
def test_what_a_checkpoint_has_fixed(command: Run, trained: Path, option: tuple[str, str]) -> None:
    path = trained / "model.qat"
    refused(command("qat.placement", path, *option), f"{option[0]} was fixed when {path} was trained", "leave it out")


def test_a_file_that_is_no_checkpoint(command: Run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"nonsense")
    refused(command("qat.placement", tmp_path / "weights.pth"), "weights.pth has no sidecar")


@pytest.mark.parametrize("option", ["--json", "--svg"])
def test_an_output_that_cannot_be_written(command: Run, net: str, tmp_path: Path, option: str) -> None:
    done = command("qat.placement", net, option, tmp_path)
    refused(done, f"cannot write {tmp_path}: that is a folder")
    assert done.stdout == ""
    refused(command("qat.placement", net, option, tmp_path / "net.py" / "p"), "a part of the path is a file")


def test_the_view_that_is_shown_is_the_one_that_is_trained(trained: Path) -> None:
    shown = view_placement(f"{trained / 'net.py'}:net", image_size=16, num_classes=3)
    assert shown.placement == placement_of(load_checkpoint(trained / "model.qat").model)
