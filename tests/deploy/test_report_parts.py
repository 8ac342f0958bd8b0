"""Parts of the report page: blocks, the verdict, charts and the picture."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from deploy.engine_layers import EngineLayer
from deploy.report_page.answers import writing_fp32
from deploy.report_page.artifacts import Artifacts
from deploy.report_page.change import changes
from deploy.report_page.charts import Series, histogram, line_chart, ticks
from deploy.report_page.layers import Block, Layer, block_of, blocks_of, layers_of
from deploy.report_page.picture import draw
from deploy.report_page.roofline import roofline
from deploy.report_page.verdict import Speed, Stage, judge
from qat.base.artifact import Sidecar
from qat.base.ranges_file import ActivationDistribution, Divergence, RangeChoice

ENGINE = Sidecar(kind="engine", details={"gpu": "NVIDIA Test"})
RUN = Artifacts(Path("runs"), engine=ENGINE, paths={"engine": Path("runs/m.engine")})


def layer(label: str, state: Any = "int8", kind: str = "convolution", **more: Any) -> Layer:
    return Layer(label.replace(".", "_"), label, label, kind, block_of(label), state, **more)


@pytest.mark.parametrize(
    ("label", "block"),
    [
        ("conv1", "conv1"),
        ("layer1.0.conv1", "layer1.0"),
        ("layer1.0.downsample.0", "layer1.0"),
        ("layer2.10.add", "layer2.10"),
        ("features.denseblock1.denselayer3.conv1", "features.denseblock1.denselayer3"),
        ("encoder.layers.encoder_layer_3.self_attention.linear", "encoder.layers.encoder_layer_3"),
        ("encoder.layers.encoder_layer_3.mlp.0", "encoder.layers.encoder_layer_3"),
        ("blocks.5.mlp.fc1", "blocks.5"),
        ("features.1.0.block.3", "features.1.0"),
        ("stages.2.blocks.4.conv_dw", "stages.2.blocks.4"),
        ("features.3.conv.0.0", "features.3"),
        ("blocks.1.0.conv_pw", "blocks.1.0"),
        ("blocks.0.norm1.layer_norm", "blocks.0"),
        ("head.fc", "head"),
    ],
)
def test_the_block_of_an_operation(label: str, block: str) -> None:
    assert block_of(label) == block


@pytest.mark.parametrize(
    ("layers", "summary", "worst"),
    [
        ([layer("a.0.x"), layer("a.0.y"), layer("a.0.z", kind="sum")], "2 convolutions, 1 sum: all INT8", "int8"),
        ([layer("a.0.x"), layer("a.0.y", "float")], "2 convolutions: 1 INT8, 1 float", "float"),
        ([layer("a.0.x", "fp32")], "1 convolution: FP32", "fp32"),
        ([layer("a.0.x", "broken"), layer("a.0.m", "moves")], "1 convolution: declared INT8, is not", "broken"),
        ([layer("d", "moves", kind="dropout")], "only moves data", "moves"),
        ([layer("p", kind="max pool"), layer("p", kind="max pool")], "2 max pools: all INT8", "int8"),
    ],
)
def test_a_block_is_one_line(layers: list[Layer], summary: str, worst: str) -> None:
    block = Block("b", tuple(layers))
    assert (block.summary, block.worst) == (summary, worst)


def test_blocks_keep_the_order_of_the_network_and_add_times() -> None:
    layers = [
        layer("stem"),
        layer("s.1.a", milliseconds=0.25),
        layer("s.0.a"),
        layer("s.1.b", milliseconds=0.5),
    ]
    found = blocks_of(layers)
    assert [(block.name, len(block.layers), block.milliseconds) for block in found] == [
        ("stem", 1, None),
        ("s.1", 2, 0.75),
        ("s.0", 1, None),
    ]


FLOAT = Stage.of("float", 90.0, 1000, None)


def judged(change: float | None, factor: float | None, broken: bool = False, run: Artifacts = RUN) -> tuple[str, str]:
    stages = [FLOAT] if change is None else [FLOAT, Stage.of("INT8, trained", 90.0 + change, 1000, 90.0)]
    speeds = [] if factor is None else [Speed(32, 1.0, factor, "NVIDIA Test", factor > 1, factor < 1)]
    found = judge(run, stages, speeds, [layer("a", "broken" if broken else "int8")])
    return found.answer, found.sentence


@pytest.mark.parametrize(
    ("change", "factor", "broken", "answer", "says"),
    [
        (-0.5, 1.5, False, "ship", "Ship it: 89.50 % of 1000 test images are right, against 90.00 % in float"),
        (0.0, 1.5, False, "ship", "as the float network"),
        (-0.5, 1.5, False, "ship", "it is 1.50 times as fast as FP16 at batch 32 on NVIDIA Test"),
        (-5.0, 1.5, False, "do not ship", "85.00 % of the test images are right, 5.00 points less than in float"),
        (0.0, 0.8, False, "do not ship", "it takes 1.25 times as long as FP16 at batch 32: deploy FP16"),
        (0.0, 1.5, True, "do not ship", "1 layer is declared INT8 and not INT8 in the engine, first a"),
        (0.0, None, False, "not known yet", "its speed was not measured"),
        (None, 1.5, False, "not known yet", "no accuracy was measured"),
    ],
)
def test_the_verdict(change: float | None, factor: float | None, broken: bool, answer: str, says: str) -> None:
    found, sentence = judged(change, factor, broken)
    assert found == answer
    assert says in sentence


def test_the_verdict_without_an_engine() -> None:
    run = Artifacts(Path("runs"), paths={"onnx": Path("runs/m.onnx")})
    assert judged(0.0, None, run=run)[0] == "not known yet"
    assert judged(0.0, None, run=run)[1].startswith("There is no engine yet; ")


def test_few_images_tell_nothing() -> None:
    stages = [Stage.of("float", 80.0, 5, None), Stage.of("INT8, trained", 60.0, 5, 80.0)]
    found = judge(RUN, stages, [Speed(32, 1.0, 2.0, "NVIDIA Test", True, False)], [layer("a")])
    assert found.answer == "not known yet"
    assert "60.00 % of 5 test images are right, and so few cannot tell a loss of less than" in found.sentence


def test_a_tie_is_no_win_and_one_win_is_named() -> None:
    stages = [FLOAT, Stage.of("INT8, trained", 90.0, 1000, 90.0)]
    tie, win = (Speed(batch, 1.0, 1.01 * batch, "NVIDIA Test", batch > 1, False) for batch in (1, 32))
    found = judge(RUN, stages, [tie], [layer("a")])
    assert found.sentence == "Do not ship it: it is not faster than FP16 beyond the spread: deploy FP16."
    found = judge(RUN, stages, [tie, win], [layer("a")])
    assert found.answer == "ship"
    assert (
        "1.01 times as fast as FP16 at batch 1, within the spread, 32.32 times as fast as FP16 at batch 32"
        in found.sentence
    )


def test_a_network_at_chance_is_not_shipped() -> None:
    checkpoint = Sidecar(kind="checkpoint", class_names=tuple("0123456789"))
    run = Artifacts(Path("runs"), engine=ENGINE, checkpoint=checkpoint, paths={"engine": Path("runs/m.engine")})
    stages = [Stage.of("float", 10.5, 1000, None), Stage.of("INT8, trained", 10.5, 1000, 10.5)]
    found = judge(run, stages, [Speed(32, 1.0, 2.0, "NVIDIA Test", True, False)], [layer("a")])
    assert "the float network itself is hardly better than chance, 10.50 % with 10 classes" in found.sentence


def test_all_that_speaks_against_it_is_listed() -> None:
    stages = [FLOAT, Stage.of("INT8, trained", 80.0, 1000, 90.0)]
    found = judge(RUN, stages, [Speed(32, 1.0, 0.5, "NVIDIA Test", False, True)], [layer("a", "broken")])
    assert len(found.against) == 3


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (96.1, 99.0, [97.0, 98.0, 99.0]),
        (12.0, 100.0, [20.0, 40.0, 60.0, 80.0, 100.0]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_a_chart_of_lines() -> None:
    chart = line_chart("Loss", "epoch", "loss", [Series("float", "--orange", [(1, 2.0), (2, 1.0), (3, 0.0)])])
    assert chart is not None
    left, top, right, bottom = chart.box
    assert chart.lines[0].points == [(left, top), ((left + right) / 2, (top + bottom) / 2), (right, bottom)]
    assert [text for _, text in chart.x_ticks] == ["1", "2", "3"]
    assert line_chart("Loss", "epoch", "loss", [Series("float", "--orange", [(1, 2.0)])]) is None


def test_a_logarithmic_axis() -> None:
    series = [Series("a", "--blue", [(1, 0.1), (2, 0.01), (3, 0.001), (4, 0.0)])]
    chart = line_chart("a", "epoch", "rate", series, logarithmic=True)
    assert chart is not None
    heights = [y for _, y in chart.lines[0].points]
    assert len(heights) == 3
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert {"0.1", "0.01", "0.001"} <= {text for _, text in chart.y_ticks}


def measured(state: str, milliseconds: float) -> Layer:
    return layer("conv" if state == "int8" else "fc", state, milliseconds=milliseconds)


def test_the_roofline_says_how_far_layers_are_from_the_limit() -> None:
    network = [
        op("x", "input", []) | {"shape": [1, 64, 28, 28], "weight": None},
        op("conv", "convolution", ["x"]) | {"shape": [1, 128, 28, 28], "weight": [128, 64, 3, 3]},
        op("fc", "linear", ["conv"]) | {"shape": [1, 10], "weight": [10, 128]},
    ]
    peaks = {"bytes_per_s": 4e12, "int8_per_s": 1e15, "fp16_per_s": 5e14}
    run = Artifacts(
        Path("runs"),
        checkpoint=Sidecar(kind="checkpoint", details={"network": network}),
        paths={"checkpoint": Path("runs/m.qat")},
        results={"audit": {"peaks": peaks, "batch": 32}},
    )
    found = roofline(run, [measured("int8", 0.02), measured("float", 0.001)])
    assert found is not None
    (conv,) = (point for point in found.worst if point.layer.label == "conv")
    operations = 2 * 32 * 128 * 64 * 9 * 28 * 28
    moved = 32 * (64 + 128) * 28 * 28 + 128 * 64 * 9
    assert conv.intensity == pytest.approx(operations / moved)
    assert conv.per_s == pytest.approx(operations / 20e-6)
    assert conv.least == pytest.approx(1e6 * max(operations / 1e15, moved / 4e12))
    assert found.worst[0] is conv
    assert "2 convolutions and linear layers take 21.0 us" in found.sentence
    assert [line.label for line in found.chart.lines] == ["INT8 limit", "FP16 limit", "INT8 layers", "float layers"]
    assert found.chart.lines[2].path == ""
    assert roofline(dataclasses.replace(run, results={}), [measured("int8", 0.02)]) is None


def test_axes_of_points_and_of_values_that_are_hardly_apart() -> None:
    chart = line_chart(
        "a", "ms", "%", [Series("a", "--blue", [(0.5, 90.0)]), Series("b", "--red", [(0.6, 91.0)])], whole=False
    )
    assert chart is not None
    left, top, right, bottom = chart.box
    assert all(left < x < right and top < y < bottom for line in chart.lines for x, y in line.points)
    assert len(chart.x_ticks) > 2
    for value in (1e9, 0.0):
        flat = line_chart("a", "epoch", "loss", [Series("a", "--blue", [(1, value), (2, value), (3, float("inf"))])])
        assert flat is not None
        assert len(flat.lines[0].points) == 2


def distribution(**changes: Any) -> ActivationDistribution:
    choices = (RangeChoice("max", 10.0, 0.0, 30.0), RangeChoice("mse", 5.0, 1.25, 35.0))
    kl = Divergence((2.0, 5.0, 10.0), (0.1, 0.01, 0.05))
    given = ActivationDistribution("relu", ("relu",), (100, 10, 1, 0), 10.0, 10.0, 5.0, choices, kl, "")
    return dataclasses.replace(given, **changes)


def test_a_histogram_with_the_thresholds_of_the_methods() -> None:
    drawn = histogram(distribution())
    assert drawn is not None
    (left, top, right, bottom), marks = drawn.box, drawn.marks
    assert [(method, clipped, used) for _, method, clipped, used in marks] == [("max", 0.0, False), ("mse", 1.25, True)]
    assert marks[1][0] < marks[0][0] <= right
    heights = [bottom - float(y) for y in re.findall(r"V(\d+)H", drawn.bars)]
    assert heights[0] == pytest.approx(bottom - top, abs=1)
    assert heights == sorted(heights, reverse=True)
    assert drawn.kl.count(" ") == 3
    assert drawn.kl_range == ("0.01", "0.1")
    assert all(left <= x <= right for x, _ in drawn.x_ticks)


def test_a_histogram_of_nothing_and_one_without_a_curve() -> None:
    assert histogram(distribution(counts=(0, 0))) is None
    assert histogram(distribution(limit=0.0)) is None
    drawn = histogram(distribution(kl=None))
    assert drawn is not None
    assert drawn.kl == ""
    gaps = histogram(distribution(kl=Divergence((1.0, 2.0), (None, 0.5))))  # infinite where it cannot choose
    assert gaps is not None
    assert gaps.kl == ""


def op(name: str, kind: str, inputs: list[str], label: str = "") -> dict[str, Any]:
    return {"name": name, "kind": kind, "label": label or name.replace("_", "."), "inputs": inputs, "shape": None}


def test_the_picture_has_a_box_for_each_block_and_lines_between_them() -> None:
    network = [
        op("x", "input", []),
        op("conv1", "convolution", ["x"]),
        op("layer1_0_conv1", "convolution", ["conv1"]),
        op("layer1_0_add", "add", ["layer1_0_conv1", "conv1"]),
        op("fc", "linear", ["layer1_0_add"]),
        op("output", "output", ["fc"]),
    ]
    checkpoint = Sidecar(kind="checkpoint", details={"network": network})
    run = Artifacts(Path("runs"), checkpoint=checkpoint, paths={"checkpoint": Path("runs/m.qat")})
    layers = [
        layer("conv1", "float"),
        layer("layer1.0.conv1", milliseconds=0.5),
        layer("layer1.0.add", kind="sum"),
        layer("fc", milliseconds=0.25),
    ]
    picture = draw(run, layers, {id(one): one.label for one in layers})
    assert picture is not None
    boxes = {box.name: box for box in picture.boxes}
    assert list(boxes) == ["x", "conv1", "layer1.0", "fc", "output"]
    assert (boxes["conv1"].state, boxes["layer1.0"].state, boxes["x"].state) == ("float", "int8", "moves")
    assert boxes["layer1.0"].summary == "1 convolution, 1 sum: all INT8"
    assert (boxes["layer1.0"].heat, boxes["fc"].heat, boxes["conv1"].heat) == (1.0, 0.5, 0.0)
    assert picture.timed
    tops = [boxes[name].y for name in boxes]
    assert tops == sorted(tops)
    assert len(picture.paths) == 4
    assert all(box.x >= 0 and box.x + box.width <= picture.width for box in picture.boxes)
    assert boxes["layer1.0"].first == "layer1.0.conv1"
    assert draw(Artifacts(Path("runs"), checkpoint=Sidecar(kind="checkpoint")), layers, {}) is None


def test_a_block_that_is_left_and_entered_again_does_not_make_a_circle() -> None:
    network = [
        op("x", "input", []),
        op("a_0_one", "convolution", ["x"]),
        op("mid", "relu", ["a_0_one"]),
        op("a_0_two", "convolution", ["mid"]),
        op("output", "output", ["a_0_two"]),
    ]
    checkpoint = Sidecar(kind="checkpoint", details={"network": network})
    run = Artifacts(Path("runs"), checkpoint=checkpoint, paths={"checkpoint": Path("runs/m.qat")})
    layers = [layer("a.0.one"), layer("a.0.two")]
    picture = draw(run, layers, {id(one): one.label for one in layers})
    assert picture is not None
    assert [box.name for box in picture.boxes] == ["x", "a.0", "mid", "a.0", "output"]


def test_parts_of_a_split_layer_and_nodes_of_one_label_are_one_row_each() -> None:
    def decision(name: str, label: str) -> dict[str, Any]:
        return {"op": name, "label": label, "kind": "linear", "quantized": True, "rule": "r", "reason": ""}

    def finding(node: str, precision: str = "INT8") -> dict[str, Any]:
        return {
            "node": node,
            "operation": "matrix product",
            "declared_int8": True,
            "precision": precision,
            "cause": "c",
        }

    decisions = [decision("qkv", "attn.qkv"), decision("matmul", "attn.matmul"), decision("matmul_1", "attn.matmul")]
    placement = {"decisions": decisions, "tensors": [], "weights": []}
    findings = [finding("attn.qkv.0"), finding("attn.qkv.1", "FP32"), finding("attn.qkv.2"), finding("attn.matmul")]
    engine = Sidecar(kind="engine", details={"findings": [*findings, finding("attn.matmul_1")], "layers": []})
    checkpoint = Sidecar(kind="checkpoint", details={"placement": placement})
    costs = {
        "operations": [{"op": "matmul_1", "label": "attn.matmul", "loss_without": 0.4}],
        "quantized": {"loss": 0.5},
    }
    run = Artifacts(
        Path("runs"),
        engine=engine,
        checkpoint=checkpoint,
        paths={"engine": Path("runs/m.engine")},
        results={"sensitivity": costs},
    )
    found = layers_of(run)
    assert [(one.name, one.state) for one in found] == [("qkv", "broken"), ("matmul", "int8"), ("matmul_1", "int8")]
    assert [one.loss_saved for one in found] == [None, None, pytest.approx(0.1)]


def test_layers_of_one_label_are_compared_each_with_its_own() -> None:
    def run(*quantized: bool) -> Artifacts:
        decisions = [
            {
                "op": f"matmul_{at}",
                "label": "attn.matmul",
                "kind": "matmul",
                "quantized": one,
                "rule": "r",
                "reason": "",
            }
            for at, one in enumerate(quantized)
        ]
        placement = {"decisions": decisions, "tensors": [], "weights": []}
        details = {"placement": placement, "model": {"name": "m"}}
        checkpoint = Sidecar(kind="checkpoint", details=details, figures={})
        return Artifacts(Path("runs"), checkpoint=checkpoint, paths={"checkpoint": Path("runs/m.qat")})

    assert changes(run(True, False), run(True, False))["rows"] == []
    expected = [{"what": "attn.matmul_1", "before": "float ", "after": "INT8 "}]
    assert changes(run(True, False), run(True, True))["rows"] == expected


def test_layers_of_one_label_that_write_fp32_are_all_named() -> None:
    decisions = [
        {"op": f"add_{at}", "label": "add", "kind": "add", "quantized": False, "rule": "r", "reason": ""}
        for at in (0, 1)
    ]
    listed = [
        dataclasses.asdict(EngineLayer(name, "PointWise", ("FP32",), (), ("FP32",), (name,)))
        for name in ("add", "add_1")
    ]
    engine = Sidecar(kind="engine", details={"findings": [], "layers": listed})
    checkpoint = Sidecar(
        kind="checkpoint", details={"placement": {"decisions": decisions, "tensors": [], "weights": []}}
    )
    run = Artifacts(Path("runs"), engine=engine, checkpoint=checkpoint, paths={"engine": Path("runs/m.engine")})
    named, count = writing_fp32(run, layers_of(run))
    assert ([one.node for one in named], count) == (["add", "add_1"], 2)


def test_a_pointwise_layer_that_writes_fp32_is_not_the_product_before_it() -> None:
    kinds = (("fc", "linear", True), ("add", "add", False))
    decisions = [
        {"op": name, "label": name, "kind": kind, "quantized": quantized, "rule": "r", "reason": ""}
        for name, kind, quantized in kinds
    ]
    listed = dataclasses.asdict(EngineLayer("__myl_MulAdd", "kgen", ("FP32",), (), ("FP32",), ("fc", "add")))
    engine = Sidecar(kind="engine", details={"findings": [], "layers": [listed]})
    checkpoint = Sidecar(
        kind="checkpoint", details={"placement": {"decisions": decisions, "tensors": [], "weights": []}}
    )
    run = Artifacts(Path("runs"), engine=engine, checkpoint=checkpoint, paths={"engine": Path("runs/m.engine")})
    named, count = writing_fp32(run, layers_of(run))
    assert ([one.label for one in named], count) == (["add"], 1)
