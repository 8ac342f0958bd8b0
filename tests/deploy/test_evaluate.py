"""Evaluating engines: the figures, and what is refused without a GPU. On a GPU: tests/gpu."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from deploy.agreement import Answers, Evaluation, data_set_batches, reference_batches
from deploy.bisect import Difference
from deploy.evaluate import EvaluateOptions, main
from deploy.reference import read_reference
from deploy.settings import Profile
from deploy.task_evaluation import TaskEvaluation
from deploy.who_answers import engine_logits, engine_outputs
from qat.base.artifact import read_sidecar
from qat.base.errors import UserError
from qat.base.output_agreement import OutputAgreement


def test_accuracy_and_agreement():
    logits = {"engine": np.eye(4)[[0, 1, 2, 3]], "PyTorch": np.eye(4)[[0, 1, 2, 0]]}
    answers = Answers("test", np.array([0, 1, 0, 0]), logits)
    assert answers.accuracy("engine") == 50
    assert answers.accuracy("PyTorch") == 75
    assert answers.agreement("engine", "PyTorch") == 75
    assert Answers("random", np.array([-1, -1, -1, -1]), logits).accuracy("engine") is None
    assert Answers("some", np.array([0, -1, -1, 0]), logits).accuracy("engine") == 50


class Doubling:
    """Stands for an engine: takes what its profiles allow and answers twice the input."""

    def __init__(self, *profiles: Profile) -> None:
        self.profiles, self.batches = profiles, []

    @property
    def max_batch(self) -> int:
        return max(profile.max for profile in self.profiles)

    def map(self, pieces):
        for piece in pieces:
            assert any(profile.min <= len(piece) <= profile.max for profile in self.profiles)
            self.batches.append(len(piece))
            yield 2 * piece


@pytest.mark.parametrize(
    ("profiles", "batches"),
    [
        ((Profile(1, 8, 32),), [32, 32, 6]),
        ((Profile(16, 16, 16),), [16, 16, 16, 16, 16]),  # the last ten are padded
        ((Profile(1, 4, 8), Profile(9, 32, 64)), [64, 6]),
        ((Profile(100, 100, 100),), [100]),
        ((Profile(1, 2, 4), Profile(16, 32, 32)), [32, 32, 16]),  # six are too many for one and too few for the other
    ],
)
def test_any_number_of_images_goes_through_any_profile(profiles, batches):
    images = np.random.default_rng(0).random((70, 5))
    engine = Doubling(*profiles)
    np.testing.assert_array_equal(engine_logits(engine, images), 2 * images)  # type: ignore[arg-type]
    assert engine.batches == batches


def test_one_line_for_every_mistake(chain: Path, tmp_path: Path):
    engine = chain / "model.engine"

    def refused(**options) -> str:
        with pytest.raises(UserError) as caught:
            main(EvaluateOptions(**{"engine": engine, **options}))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no file" in refused(engine=tmp_path / "x.engine")
    assert "--images 0" in refused(images=0)
    assert "check the path of --onnx" in refused(onnx=tmp_path / "x.onnx")
    (tmp_path / "file").write_text("")
    assert "a part of the path is a file" in refused(json=tmp_path / "file" / "x.json")


def test_data_gives_the_test_split_that_was_held_out_of_training(chain: Path):
    onnx = read_sidecar(chain / "model.onnx", "onnx")
    reference = read_reference(chain / "model.onnx", onnx)
    data = read_sidecar(chain / "model.qat", "checkpoint").details["data"]["source"]
    source, batches = data_set_batches(chain / "model.onnx", onnx, data, Path("data"), None)
    found = list(batches)
    assert source == f"the test split of {data}"
    np.testing.assert_array_equal(np.concatenate([images for images, _, _ in found]), reference.images)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels, _ in found]), reference.labels)
    assert all(pytorch is None for _, _, pytorch in found)

    _, few = data_set_batches(chain / "model.onnx", onnx, data, Path("data"), 7)
    assert sum(len(labels) for _, labels, _ in few) == 7
    ((images, labels, logits),) = reference_batches(chain / "model.onnx", onnx, 7)[1]
    assert (len(images), len(labels)) == (7, 7)
    np.testing.assert_array_equal(logits, reference.logits[:7])


def test_every_output_of_an_engine_is_cut_to_the_images():
    images = np.random.default_rng(0).random((7, 5))

    class TwoOutputs(Doubling):
        def map(self, pieces):
            yield from ({"twice": answer, "negative": -answer} for answer in super().map(pieces))

    found = engine_outputs(TwoOutputs(Profile(4, 4, 4)), images, ["negative", "twice"])  # type: ignore[arg-type]
    assert list(found) == ["negative", "twice"]
    np.testing.assert_array_equal(found["twice"], 2 * images)
    np.testing.assert_array_equal(found["negative"], -2 * images)


def test_a_network_without_classes_agrees_by_its_outputs():
    mine = np.random.default_rng(0).random((6, 4))
    near, far = mine + 0.001, mine[::-1]
    measured = {
        "engine, PyTorch": (OutputAgreement.measure("output", near, mine),),
        "engine, ONNX Runtime": (OutputAgreement.measure("output", far, mine),),
        "engine, PyTorch in float": (OutputAgreement.measure("output", far, mine),),
    }
    found = TaskEvaluation({"engine": "digest"}, "images", 6, {}, measured, 20.0, 99.0)
    assert found.disagreements.keys() == {"engine, ONNX Runtime"}  # the float network may differ
    assert found.disagreements["engine, ONNX Runtime"].endswith(" dB): must be at least 20 dB, or 99 % of integers")
    assert not found.agrees
    assert dataclasses.replace(found, least_sqnr=-20.0).agrees
    result = found.to_json()
    assert (result["engine"], result["top1"], result["agreement"]) == ("digest", {}, {})
    expected = 10 * np.log10((near**2).sum() / ((near - mine) ** 2).sum())
    assert result["outputs"]["engine, PyTorch, output"] == {"sqnr_db": pytest.approx(expected), "equal_percent": None}

    same = {"engine, PyTorch": (OutputAgreement.measure("ids", np.array([1, 2, 3, 4]), np.array([1, 2, 3, 3])),)}
    assert TaskEvaluation({}, "images", 4, {}, same, 20.0, 75.0).agrees
    assert not TaskEvaluation({}, "images", 4, {}, same, 20.0, 76.0).agrees


def test_a_classifier_as_an_onnx_file(chain: Path, tmp_path: Path):
    """In ONNX Runtime, without an engine and without a GPU."""
    result = tmp_path / "result.json"
    assert main(EvaluateOptions(engine=chain / "model.onnx", images=20, json=result)) == 0
    found = json.loads(result.read_text())
    assert found["onnx"] == read_sidecar(chain / "model.onnx", "onnx").sha256
    assert found["top1"].keys() == {"ONNX Runtime", "PyTorch"}
    assert found["agreement"] == {"ONNX Runtime, PyTorch": 100.0}
    with pytest.raises(UserError, match="--layers compares what is inside an engine"):
        main(EvaluateOptions(engine=chain / "model.onnx", layers=True))
    with pytest.raises(UserError, match="is an ONNX file itself: leave out --onnx"):
        main(EvaluateOptions(engine=chain / "model.onnx", onnx=chain / "model.onnx"))
    with pytest.raises(UserError, match="tells classes of whole images"):
        main(EvaluateOptions(engine=chain / "model.onnx", data="set.yaml"))


def test_the_file_of_results_and_whether_the_engine_agrees():
    logits = {"engine": np.eye(4)[[0, 1, 2, 3]], "ONNX Runtime": np.eye(4)[[0, 1, 2, 0]]}
    answers = Answers("random images", np.array([0, 1, 0, -1]), logits)
    alike = Evaluation({"engine": "digest"}, answers, least_agreement=75.0)
    assert alike.agrees
    assert alike.to_json() == {
        "engine": "digest",
        "images": 4,
        "source": "random images",
        "top1": {"engine": pytest.approx(200 / 3), "ONNX Runtime": pytest.approx(200 / 3)},
        "agreement": {"engine, ONNX Runtime": 75.0},
    }
    other = Evaluation(
        {"engine": "digest"}, answers, 99.0, searched=True, first_difference=Difference("relu1", "/relu1/Relu", 7.5)
    )
    assert not other.agrees
    assert other.to_json()["first_difference"] == {"node": "/relu1/Relu", "tensor": "relu1", "sqnr_db": 7.5}
    assert Evaluation({"engine": "digest"}, answers, 99.0, searched=True).to_json()["first_difference"] is None
    assert Evaluation({"engine": "digest"}, Answers("x", np.array([0]), {"engine": np.eye(4)[[0]]}), 99.0).agrees
