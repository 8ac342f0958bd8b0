"""TensorRT's own calibrators, their cache, and the types of single layers, on a small float network."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import qdq_models
from PIL import Image

from deploy import Engine, Profile, build_engine, migrate
from deploy.calibration_inputs import CalibrationInputs
from deploy.settings import BuilderOptions, CalibrationSettings
from qat.base.artifact import Sidecar, TensorSpec, sidecar_path, write_artifact
from qat.base.calibration_cache import CalibrationCache
from qat.base.errors import UserError
from qat.base.exit_codes import DISAGREES

FIXED = (Profile(8, 8, 8),)
CALIBRATORS = ("entropy2", "minmax", "entropy", "legacy")
# Left to itself, the builder takes FP16 for layers as small as these wherever that is faster.
INT8 = BuilderOptions(precision="int8", optimization_level=1, layer=("*/Conv=int8", "*/Gemm=int8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture(scope="module")
def floats(folder: Path) -> Path:
    return qdq_models.residual(folder / "float.onnx", quantize=False)


@pytest.fixture(scope="module")
def arrays(folder: Path, images: np.ndarray) -> Path:
    """128 inputs: the images four times, the last with other noise."""
    noise = np.random.default_rng(5).standard_normal((128, 3, 32, 32)).astype(np.float32)
    np.save(folder / "inputs.npy", np.concatenate([images] * 4)[:128] + 0.1 * noise)
    return folder / "inputs.npy"


@pytest.fixture(scope="module")
def answers(floats: Path, images: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(floats).run(None, {"input": images[:8]})[0]


def built(floats: Path, name: str, settings: BuilderOptions = INT8, profiles=FIXED, ranges=None, **calibration):
    return build_engine(
        floats,
        floats.with_name(name),
        builder="tensorrt",
        profiles=profiles,
        ranges=ranges,
        calibration=CalibrationSettings(**calibration),
        settings=settings,
    )


def noise_of(path: Path, images: np.ndarray, expected: np.ndarray) -> float:
    """The squared error of an engine as a share of the squares."""
    with Engine.load(path) as engine:
        found = engine(images[:8])
    return float(np.square(expected - found).sum() / np.square(expected).sum())


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_each_calibrator_gives_an_int8_engine_and_a_cache(floats, arrays, images, answers, calibrator):
    cache = floats.with_name(f"{calibrator}.cache")
    engine = built(floats, f"{calibrator}.engine", data=str(arrays), calibrator=calibrator, calibration_cache=cache)
    assert engine.sidecar.figures["convolutions_int8"] >= 2
    assert noise_of(engine.path, images, answers) < 0.05
    found = CalibrationCache.read(cache)
    assert found.calibrator == calibrator
    assert {"input", "stem_relu", "logits"} <= found.scales.keys()
    assert engine.sidecar.details["ranges"]["images"] == 128


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_a_rebuild_takes_the_cache(floats, arrays, images, answers, calibrator, monkeypatch, capsys):
    cache = floats.with_name(f"{calibrator}.cache")
    before = cache.read_bytes()
    monkeypatch.setattr(CalibrationInputs, "check_batch", lambda *_: pytest.fail("it calibrates"))
    engine = built(floats, "again.engine", data=str(arrays), calibrator=calibrator, calibration_cache=cache)
    assert "used, of 128 images, nothing is calibrated" in capsys.readouterr().out
    assert engine.sidecar.details["ranges"]["from_cache"]
    assert cache.read_bytes() == before
    assert noise_of(engine.path, images, answers) < 0.05
    without_data = built(floats, "again.engine", calibrator=calibrator, calibration_cache=cache)
    assert noise_of(without_data.path, images, answers) < 0.05


def test_calibrating_again_gives_the_same_scales(floats, arrays):
    """To the last bit, but for the legacy calibrator's, whose last bit was seen to differ."""
    for calibrator in CALIBRATORS:
        cache = floats.with_name("second.cache")
        for path in (cache, sidecar_path(cache)):
            path.unlink(missing_ok=True)
        built(floats, "again.engine", data=str(arrays), calibrator=calibrator, calibration_cache=cache)
        first = floats.with_name(f"{calibrator}.cache")
        if calibrator == "legacy":
            again, before = CalibrationCache.read(cache).scales, CalibrationCache.read(first).scales
            assert again == pytest.approx(before, rel=1e-6)
        else:
            assert cache.read_bytes() == first.read_bytes(), calibrator


def test_a_damaged_cache_and_one_of_another_model_are_not_used(floats, arrays, tmp_path, capsys):
    good = floats.with_name("entropy2.cache")
    for content in (b"", good.read_bytes()[:-30], good.read_bytes().replace(b": 3", b": 4", 1)):
        bad = tmp_path / "bad.cache"
        bad.write_bytes(content)
        sidecar_path(bad).write_bytes(sidecar_path(good).read_bytes())
        with pytest.raises(UserError, match="refused"):
            built(floats, "bad.engine", calibration_cache=bad)
    other = qdq_models.residual(tmp_path / "other.onnx", quantize=False, weights_of={"conv1": 7})
    with pytest.raises(UserError, match="another model"):
        built(other, "bad.engine", calibration_cache=good)
    mine = tmp_path / "mine.cache"
    mine.write_bytes(good.read_bytes())
    sidecar_path(mine).write_bytes(sidecar_path(good).read_bytes())
    built(other, "anew.engine", data=str(arrays), calibration_cache=mine)
    assert "another model: calibrating again" in " ".join(capsys.readouterr().err.split())
    assert mine.read_bytes() != good.read_bytes()


def test_a_trusted_cache_of_another_calibrator_is_used(floats, arrays, images, answers, tmp_path):
    cache = floats.with_name("minmax.cache")
    engine = built(floats, "trusted.engine", calibrator="entropy2", calibration_cache=cache, trust_cache=True)
    assert engine.sidecar.figures["convolutions_int8"] >= 2
    assert noise_of(engine.path, images, answers) < 0.05


def test_a_dynamic_batch_is_calibrated_in_batches_of_its_own(floats, arrays, images, answers, tmp_path):
    cache = tmp_path / "c.cache"
    profiles = (Profile(1, 4, 8), Profile(8, 16, 16))
    settings = {"calibration_cache": cache, "calibration_batch": 64, "calibrator": "minmax"}
    engine = built(floats, "dynamic.engine", profiles=profiles, data=str(arrays), **settings)
    assert noise_of(engine.path, images, answers) < 0.05
    with Engine.load(engine.path) as loaded:
        assert [profile.max for profile in loaded.profiles] == [8, 16]
    # The largest magnitudes do not depend on the batches in which they are found.
    known, found = CalibrationCache.read(floats.with_name("minmax.cache")).scales, CalibrationCache.read(cache).scales
    assert found.keys() == known.keys()
    assert all(abs(found[name] - scale) <= 1e-4 * scale for name, scale in known.items())


def test_calibration_before_fusion_finds_ranges_inside_fused_layers(floats, arrays, tmp_path):
    cache = tmp_path / "c.cache"
    built(
        floats,
        "before.engine",
        data=str(arrays),
        calibrator="entropy",
        calibrate_before_fusion=True,
        calibration_cache=cache,
    )
    inside = {"stem", "conv1"}
    assert inside <= CalibrationCache.read(cache).scales.keys()
    assert not inside & CalibrationCache.read(floats.with_name("entropy.cache")).scales.keys()


def test_the_quantile_of_the_legacy_calibrator_counts(floats, arrays, tmp_path):
    cache = tmp_path / "c.cache"
    built(floats, "q.engine", data=str(arrays), calibrator="legacy", quantile=0.9, calibration_cache=cache)
    low, usual = (CalibrationCache.read(path).scales for path in (cache, floats.with_name("legacy.cache")))
    assert low["input"] < 0.8 * usual["input"]


def test_ranges_by_hand_come_before_those_of_the_calibrator(floats, arrays, images, answers, tmp_path):
    ranges = tmp_path / "ranges.json"
    ranges.write_text(json.dumps({"stem_relu": [-4000, 4000]}))
    engine = built(floats, "hand.engine", ranges=ranges, data=str(arrays))
    assert noise_of(engine.path, images, answers) > 0.05
    again = built(floats, "hand.engine", ranges=ranges, calibration_cache=floats.with_name("entropy2.cache"))
    assert noise_of(again.path, images, answers) > 0.05


def test_ranges_of_a_quantized_file(floats, model, images, answers, tmp_path):
    convolutions = dataclasses.replace(INT8, layer=("*/Conv=int8",))  # the Q/DQ file does not quantize the logits
    engine = built(floats, "quantized.engine", settings=convolutions, ranges=model)
    assert engine.sidecar.figures["convolutions_int8"] == 3
    with Engine.load(engine.path) as loaded:
        agree = loaded(images[:8]).argmax(1) == answers.argmax(1)
    assert agree.all()


def test_what_fails_inside_a_calibrator_is_raised(floats, arrays, monkeypatch):
    def read(start: int, stop: int):
        if start >= 32:
            raise UserError("image 33 is gone")
        return {"input": np.zeros((stop - start, 3, 32, 32), np.float32)}

    inputs = CalibrationInputs("broken", 128, "digest", read)
    monkeypatch.setattr("deploy.calibration.calibration_inputs", lambda *_: inputs)
    with pytest.raises(UserError, match="image 33 is gone"):
        built(floats, "broken.engine", data=str(arrays))


def test_a_layer_without_an_int8_kernel_is_named_or_listed(tmp_path):
    graph = qdq_models.Graph()
    padded = {"kernel_shape": [3, 3], "pads": [1] * 4}
    x = graph.node("Conv", ["input", graph.float_weights("a_w", (16, 16, 3, 3))], "a", **padded)
    x = graph.node("Softmax", [x], "shares", axis=1)
    graph.node("Conv", [x, graph.float_weights("b_w", (16, 16, 3, 3))], "b", **padded)
    model = graph.save(tmp_path / "m.onnx", (8, 16, 32, 32), (8, 16, 32, 32))
    ranges = tmp_path / "r.json"
    ranges.write_text(json.dumps({name: [-4, 4] for name in ("input", "a", "shares", "b")}))
    asked = BuilderOptions(precision="int8", optimization_level=0, layer=("/shares/Softmax=int8",))
    with pytest.raises(UserError, match="layer '/shares/Softmax' has no kernel of the type that it is to have"):
        build_engine(model, builder="tensorrt", profiles=FIXED, ranges=ranges, settings=asked)
    preferred = dataclasses.replace(asked, constraints="prefer")
    engine = build_engine(model, builder="tensorrt", profiles=FIXED, ranges=ranges, settings=preferred)
    (layer,) = engine.sidecar.details["layer_types"]
    assert (layer["layer"], layer["asked"], layer["found"]) == ("/shares/Softmax", "int8", "fp32")


def test_an_int8_layer_without_a_range_is_named(floats, model):
    with pytest.raises(UserError, match="layer '/logits/Gemm' is to be INT8, and a tensor of it has no range"):
        built(floats, "logits.engine", ranges=model)


def test_fewer_images_than_a_batch(floats, arrays):
    with pytest.raises(UserError, match="a batch of calibration takes 8"):
        built(floats, "few.engine", data=str(arrays), images=5)


def test_image_files_are_calibrated_on(floats, tmp_path):
    random = np.random.default_rng(3)
    for index in range(110):
        pixels = random.integers(0, 256, (40 + index % 7, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / "list.txt").write_text("".join(f"{index}.png\n" for index in range(110)))
    model = tmp_path / "m.onnx"
    content = floats.read_bytes()
    sidecar = Sidecar(
        kind="onnx",
        inputs=(TensorSpec("input", (-1, 3, 32, 32), "float32"),),
        outputs=(TensorSpec("logits", (-1, 10), "float32"),),
        preprocessing={"height": 32, "width": 32, "resize": 36, "mean": (0.5,) * 3, "std": (0.25,) * 3},
    )
    write_artifact(model, sidecar, lambda path: path.write_bytes(content) and None)
    scales = []
    for data in (tmp_path, tmp_path / "list.txt"):
        cache = tmp_path / "c.cache"
        built(model, "m.engine", data=str(data), calibrator="minmax", calibration_cache=cache)
        scales.append(CalibrationCache.read(cache).scales["input"])
    assert scales == pytest.approx([2 / 127] * 2, rel=0.1)  # (1 - 0.5) / 0.25, of nearly white pixels


def test_types_of_single_layers_are_proved_on_the_engine(floats, arrays, capsys):
    settings = dataclasses.replace(INT8, layer=("*=int8", "/stem/*=fp32", "/logits/*=fp32", "/conv1/*=fp16"))
    cache = floats.with_name("entropy2.cache")
    engine = built(floats, "typed.engine", settings, calibration_cache=cache)
    found = {layer["layer"]: layer["found"] for layer in engine.sidecar.details["layer_types"]}
    assert found["/stem/Conv"] == found["/logits/Gemm"] == "fp32"
    assert found["/conv1/Conv"] == "fp16"
    assert found["/conv2/Conv"] == "int8"
    by_node = {finding["node"]: finding["precision"] for finding in engine.sidecar.details["findings"]}
    assert by_node["/stem/Conv"] == "FP32"
    assert by_node["/conv1/Conv"] == "FP16"
    assert by_node["/conv2/Conv"] == "INT8"


def test_the_type_that_a_layer_writes(floats, capsys):
    settings = dataclasses.replace(INT8, layer=(), output_type=("/relu1/*=fp32", "/relu2/*=fp32"))
    engine = built(floats, "out.engine", settings, calibration_cache=floats.with_name("entropy2.cache"))
    found = {layer["layer"]: layer["found"] for layer in engine.sidecar.details["layer_types"]}
    assert found == {"/relu1/Relu": "fp32", "/relu2/Relu": "fp32"}


@pytest.mark.parametrize("constraints", ["obey", "prefer", "none"])
def test_a_layer_without_such_a_kernel(floats, constraints, capsys):
    settings = dataclasses.replace(INT8, layer=("/flat/*=int8", "/pool/*=fp32"), constraints=constraints)
    cache = floats.with_name("entropy2.cache")
    try:
        engine = built(floats, "kernel.engine", settings, calibration_cache=cache)
    except UserError as error:
        assert constraints == "obey"
        print("refused:", error)
        return
    print(constraints, engine.sidecar.details["layer_types"])


def test_a_variable_that_switches_tf32_off_is_said_when_an_engine_is_loaded(floats, monkeypatch, capsys):
    engine = built(floats, "tf32.engine", BuilderOptions(precision="tf32", optimization_level=1))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with Engine.load(engine.path):
        pass
    assert "NVIDIA_TF32_OVERRIDE=0 is set" in capsys.readouterr().err


def test_what_the_gpu_has_units_for_is_said(floats, capsys):
    engine = built(floats, "fp16.engine", BuilderOptions(precision="fp16", optimization_level=1))
    assert engine.sidecar.details["units"] == {"FP16": True, "INT8": True, "TF32": True}


def test_the_cache_holds_exact_bits(floats):
    """A scale of the file, as hexadecimal, is the float32 that is read."""
    name, _, digits = floats.with_name("minmax.cache").read_text().splitlines()[1].rpartition(": ")
    expected = struct.unpack("!f", bytes.fromhex(digits.zfill(8)))[0]
    assert CalibrationCache.read(floats.with_name("minmax.cache")).scales[name] == expected


def test_migration_builds_and_compares_both_engines(floats, model, arrays, tmp_path, capsys):
    """The explicit file is given, because there is no torch here; its scales are other ones than the cache's."""
    options = migrate.MigrateOptions(
        model=floats,
        calibration_cache=floats.with_name("minmax.cache"),
        explicit=model,
        data=str(arrays),
        batches=(8,),
        engines=tmp_path / "engines",
        runs=40,
        json=tmp_path / "migration.json",
    )
    code = migrate.main(options)
    found = json.loads((tmp_path / "migration.json").read_text())
    assert code == (0 if found["as_accurate"] else DISAGREES)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["FP32", "FP16", "implicit INT8", "explicit INT8"]
    assert rows["implicit INT8"]["same_class_as_float"] >= 120
    assert all(row["latency"][0]["median"] > 0 for row in rows.values())
    assert found["verdict"] in " ".join(capsys.readouterr().out.split())
