"""mAP and mIoU of cases that were worked out by hand; boxes back in the image; how outputs become boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from annotated import NAMES
from sklearn.metrics import confusion_matrix, jaccard_score

from deploy.decoders import Decoder, Found, Limits, decoder_for, suppress
from deploy.fitting import Fit
from deploy.scores import BoxCounter, PixelCounter, classes_of_pixels
from qat.base.artifact import TensorSpec
from qat.base.errors import UserError
from qat.data.annotations import NO_CLASS, AnnotatedImage, AnnotatedSet

LEFT, RIGHT = (0.0, 0.0, 20.0, 10.0), (30.0, 0.0, 50.0, 10.0)
ALL = (pytest.approx(100), pytest.approx(100))


def image(*boxes: tuple[float, ...], labels: tuple[int, ...] = (), crowd: tuple[bool, ...] = ()) -> AnnotatedImage:
    count = len(boxes)
    shown = np.array(boxes, np.float64).reshape(-1, 4)
    return AnnotatedImage(
        "", shown, np.array(labels or [0] * count, np.int64), np.array(crowd or [False] * count, bool)
    )


def found(*boxes: tuple[float, ...], scores: tuple[float, ...] = (), labels: tuple[int, ...] = ()) -> Found:
    count = len(boxes)
    given = np.array(scores or [0.9] * count)
    return Found(np.array(boxes, np.float64).reshape(-1, 4), given, np.array(labels or [0] * count, np.int64))


def measured(*pairs: tuple[AnnotatedImage, Found], most: int = 100) -> tuple[float, float]:
    counter = BoxCounter(NAMES, most)
    for known, boxes in pairs:
        counter.add(known, boxes)
    figures = counter.scores().figures
    return figures["mAP50-95"], figures["mAP50"]


def shifted(box: tuple[float, ...], by: float) -> tuple[float, ...]:
    return (box[0] + by, box[1], box[2] + by, box[3])


def test_perfect_boxes() -> None:
    assert measured((image(LEFT, RIGHT, labels=(0, 2)), found(LEFT, RIGHT, labels=(0, 2)))) == ALL


def test_a_shifted_box_counts_up_to_its_overlap() -> None:
    """20 pixels wide and 4 too far: 16 of 24 pixels are common, so it is right at 0.5, 0.55, 0.6 and 0.65 of ten."""
    assert measured((image(LEFT), found(shifted(LEFT, 4)))) == (pytest.approx(40), pytest.approx(100))
    assert measured((image(LEFT), found(shifted(LEFT, 10)))) == (0, 0)  # 10 of 30


def test_a_missed_box() -> None:
    """Recall ends at one half: precision is 1 at the recalls 0 to 0.5, 51 of 101, and 0 at the others."""
    expected = pytest.approx(100 * 51 / 101)
    assert measured((image(LEFT, RIGHT), found(LEFT))) == (expected, expected)


def test_a_duplicate_is_wrong() -> None:
    """Behind all that is right it does not matter; before the second one it leaves 2 of 3 there."""
    late = (image(LEFT, RIGHT), found(LEFT, RIGHT, LEFT, scores=(0.9, 0.8, 0.7)))
    early = (image(LEFT, RIGHT), found(LEFT, LEFT, RIGHT, scores=(0.9, 0.8, 0.7)))
    assert measured(late) == ALL
    expected = pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    assert measured(early) == (expected, expected)


def test_a_wrong_class_and_classes_that_do_not_occur() -> None:
    """Of the classes 0 and 1 one is found; 2 has no box, so that what is found of it lowers no figure."""
    counter = BoxCounter(NAMES, 100)
    counter.add(image(LEFT, RIGHT, labels=(0, 1)), found(LEFT, RIGHT, RIGHT, labels=(0, 2, -1)))
    scores = counter.scores()
    assert scores.figures == {"mAP50-95": pytest.approx(50), "mAP50": pytest.approx(50)}
    assert scores.by_class == {"square": pytest.approx(100), "bar": 0, "dot": None}


def test_a_crowd_need_not_be_found_and_may_be() -> None:
    crowd = image(LEFT, RIGHT, crowd=(False, True))
    assert measured((crowd, found(LEFT))) == ALL
    assert measured((crowd, found(LEFT, RIGHT, scores=(0.8, 0.9)))) == ALL


def test_only_the_best_boxes_of_an_image_count() -> None:
    pair = (image(LEFT, RIGHT), found(LEFT, RIGHT, scores=(0.9, 0.8)))
    assert measured(pair, most=1)[0] == pytest.approx(100 * 51 / 101)


def test_nothing_found_and_nothing_to_find() -> None:
    assert measured((image(LEFT), found())) == (0, 0)
    with pytest.raises(UserError, match="no image has a box"):
        measured((image(), found(LEFT)))


# --- masks


def test_mean_intersection_over_union_by_hand_and_by_another_library() -> None:
    true = np.array([[0, 0, 1, 1], [2, 2, 2, NO_CLASS]], np.uint8)
    said = np.array([[0, 1, 1, 1], [2, 2, 0, 0]], np.uint8)
    counter = PixelCounter(4)
    counter.add(true, said, NO_CLASS)
    scores = counter.scores()
    # 0: 1 of 3; 1: 2 of 3; 2: 2 of 3; 3 is neither there nor said
    assert scores.by_class == {
        "0": pytest.approx(100 / 3),
        "1": pytest.approx(200 / 3),
        "2": pytest.approx(200 / 3),
        "3": None,
    }
    assert scores.figures == {"mIoU": pytest.approx(500 / 9), "pixel accuracy": pytest.approx(500 / 7)}

    random = np.random.default_rng(0)
    counter, seen = PixelCounter(5), ([], [])
    for _ in range(3):
        pair = random.integers(0, 5, (2, 9, 7)).astype(np.uint8)
        pair[0][random.random((9, 7)) < 0.1] = NO_CLASS
        counter.add(pair[0], pair[1], NO_CLASS)
        for kept, values in zip(seen, pair, strict=True):
            kept.extend(values[pair[0] != NO_CLASS].tolist())
    assert counter.scores().figures["mIoU"] == pytest.approx(100 * jaccard_score(*seen, average="macro"))
    assert counter.scores().figures["pixel accuracy"] == pytest.approx(
        100 * np.trace(confusion_matrix(*seen)) / len(seen[0])
    )


def test_masks_with_more_classes_than_the_network() -> None:
    with pytest.raises(UserError, match="have class 4, and the network tells 4 classes, from 0 to 3"):
        PixelCounter(4).add(np.full((2, 2), 4, np.uint8), np.zeros((2, 2), np.uint8), NO_CLASS)
    with pytest.raises(UserError, match="no pixel of the masks has a class"):
        PixelCounter(4).scores()


def test_smaller_maps_are_resized_before_the_class_is_chosen() -> None:
    small = np.zeros((3, 4, 4), np.float32)
    small[1, :2], small[2, 2:] = 1, 3
    found = classes_of_pixels(small, (16, 16))
    assert found.shape == (16, 16)
    assert (set(found[:5].flat), set(found[8:].flat)) == ({1}, {2})
    np.testing.assert_array_equal(classes_of_pixels(small, (4, 4)), small.argmax(0))
    np.testing.assert_array_equal(classes_of_pixels(np.full((4, 4), 2, np.int64), (8, 8)), np.full((8, 8), 2))


# --- geometry


@pytest.mark.parametrize("size", [(64, 48), (37, 91), (640, 479), (20, 20)])
@pytest.mark.parametrize("letterbox", [True, False])
def test_boxes_come_back_to_the_pixels_of_the_image(size: tuple[int, int], letterbox: bool) -> None:
    """There by the scale and the corner of the fit, and back."""
    fit = Fit.of(size, {"height": 32, "width": 40, "resize": 40, "letterbox": letterbox})
    boxes = np.random.default_rng(0).random((20, 2, 2)).cumsum(1) / 2 * size
    there = boxes * np.array(fit.resized) / size + fit.corner
    np.testing.assert_allclose(fit.back(there.reshape(-1, 4)), boxes.reshape(-1, 4), atol=1e-9)
    assert fit.back(np.array([[-900.0, -900, 900, 900]])).tolist() == [[0, 0, *size]]
    if letterbox:
        assert all(corner >= 0 for corner in fit.corner)
        assert any(one == whole for one, whole in zip(fit.resized, fit.size, strict=True))
    else:
        assert all(one >= whole for one, whole in zip(fit.resized, fit.size, strict=True))


def test_a_mask_goes_where_its_image_goes() -> None:
    fit = Fit.of((8, 4), {"height": 8, "width": 16, "resize": 8, "letterbox": True})
    mask = np.arange(32, dtype=np.uint8).reshape(4, 8)
    np.testing.assert_array_equal(fit.mask(mask, NO_CLASS), np.kron(mask, np.ones((2, 2), np.uint8)))
    tall = Fit.of((4, 8), {"height": 8, "width": 16, "resize": 8, "letterbox": True})
    placed = tall.mask(mask.reshape(8, 4), NO_CLASS)
    assert (placed[:, :6] == NO_CLASS).all()
    assert (placed[:, 10:] == NO_CLASS).all()
    np.testing.assert_array_equal(placed[:, 6:10], mask.reshape(8, 4))
    cropped = Fit.of((12, 4), {"height": 4, "width": 4, "resize": 4})
    np.testing.assert_array_equal(cropped.mask(np.arange(48, dtype=np.uint8).reshape(4, 12), NO_CLASS)[0], [4, 5, 6, 7])


# --- decoders


def specs(**shapes: tuple[int, ...]) -> list[TensorSpec]:
    return [TensorSpec(name, (-1, *shape), "float32") for name, shape in shapes.items()]


def made(outputs: list[TensorSpec], given: str | None = None, **limits: float) -> Decoder:
    return decoder_for(outputs, given, Limits(**limits), None, 3)  # type: ignore[arg-type]


def test_suppression_is_within_a_class() -> None:
    boxes = np.array([LEFT, shifted(LEFT, 1), RIGHT, shifted(LEFT, 1)])
    scores, labels = np.array([0.5, 0.9, 0.6, 0.4]), np.array([0, 0, 0, 1])
    assert suppress(boxes, scores, labels, 0.7).tolist() == [1, 2, 3]
    assert suppress(boxes, scores, labels, 0.95).tolist() == [1, 2, 0, 3]
    assert suppress(boxes[:0], scores[:0], labels[:0], 0.5).tolist() == []


def test_suppression_as_torchvisions() -> None:
    torch, ops = pytest.importorskip("torch"), pytest.importorskip("torchvision.ops")
    random = np.random.default_rng(0)
    corners = random.random((300, 2)) * 50
    boxes = np.concatenate([corners, corners + 5 + random.random((300, 2)) * 30], 1)
    scores, labels = random.random(300), random.integers(0, 4, 300)
    expected = ops.batched_nms(*map(torch.from_numpy, (boxes, scores, labels)), 0.6)
    np.testing.assert_array_equal(suppress(boxes, scores, labels, 0.6), expected.numpy())


def test_ultralytics_cells_become_boxes() -> None:
    """One cell may be of two classes, as Ultralytics counts when it validates."""
    outputs = np.zeros((7, 4), np.float32)
    outputs[:4] = np.array([[10, 5, 20, 10], [11, 5, 20, 10], [40, 5, 20, 10], [40, 5, 20, 10]], np.float32).T
    outputs[4:, 0], outputs[4, 1], outputs[6, 2] = (0.9, 0.002, 0), 0.8, 0.7
    decoder = made(specs(detections=(7, 4)))
    assert (decoder.limits, decoder.classes) == (Limits(0.001, 0.7, 300), 3)
    found = decoder.decode({"detections": outputs}, (64, 64))
    np.testing.assert_allclose(found.boxes, [LEFT, RIGHT, LEFT])
    assert found.labels.tolist() == [0, 2, 1]
    np.testing.assert_allclose(found.scores, [0.9, 0.7, 0.002])
    few = made(specs(detections=(7, 4)), most_boxes=1, least_score=0.01).decode({"detections": outputs}, (64, 64))
    assert few.labels.tolist() == [0]
    assert made(specs(detections=(39, 4), proto=(32, 16, 16))).classes == 3  # what is behind the scores are masks


def test_ultralytics_end_to_end() -> None:
    outputs = np.array([[*LEFT, 0.9, 1], [*RIGHT, 0.0, 0], [*RIGHT, 0.95, 2]], np.float32)
    found = made(specs(detections=(300, 6))).decode({"detections": outputs}, (64, 64))
    np.testing.assert_allclose(found.boxes, [RIGHT, LEFT])
    assert found.labels.tolist() == [2, 1]


def test_labels_are_places_or_the_sets_own_numbers() -> None:
    """COCO has gaps in its numbers, which torchvision's detectors answer; Ultralytics' answer places."""
    known = AnnotatedSet("set", (), NAMES, (1, 2, 4))

    def places(labels: list[int], classes: int | None, numbered: bool, of: AnnotatedSet = known) -> list[int]:
        decoder = Decoder("", lambda *_: found(), Limits(), classes, numbered)
        return decoder.places(np.array(labels), of).tolist()

    assert places([0, 1, 2], 3, numbered=False) == [0, 1, 2]
    assert places([0, 2, 3], 80, numbered=False) == [0, 2, -1]
    assert places([0, 5], None, numbered=False) == [0, -1]
    assert places([0, 1, 2], 3, numbered=True) == [0, 1, 2]
    assert places([0, 1, 3], 4, numbered=True) == [-1, 0, 2]  # 0 is the background
    assert places([0, 1, 2, 3, 4, 6], 91, numbered=True) == [-1, 0, 1, -1, 2, -1]
    for classes in (5, 91):
        with pytest.raises(
            UserError, match=f"set has 3 classes, and the network tells {classes}, with or without a background"
        ):
            places([0], classes, numbered=True, of=AnnotatedSet("set", (), NAMES))
    with pytest.raises(UserError, match="set has 3 classes, and the network tells 2: give the set it is for"):
        places([0], 2, numbered=False)


OWN = """
def good(outputs, size):
    assert size == (32, 48)
    return outputs["maps"].reshape(-1, 4), [0.5, 0.9], [0, 1]

def bad(outputs, size):
    return outputs["maps"], [0.5], [0]

def worse(outputs, size):
    return outputs["nothing"]
"""


DATACLASS = """
from __future__ import annotations

from dataclasses import dataclass

@dataclass
class Grid:
    cell: int
"""


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "decode.py"
    file.write_text(OWN)
    outputs = {"maps": np.array([LEFT, RIGHT], np.float32).reshape(2, 2, 2)}
    decoder = made(specs(maps=(2, 2, 2)), f"{file}:good")
    found = decoder.decode(outputs, (32, 48))
    np.testing.assert_allclose(found.boxes, [RIGHT, LEFT])
    assert (found.labels.tolist(), decoder.classes, decoder.limits.most_boxes) == ([1, 0], None, 100)
    for name, said in (
        ("bad", r"gave boxes \[2, 2, 2\], scores \[1\] and labels \[1\]: must be \[n, 4\], \[n\] and \[n\]"),
        ("worse", "failed .KeyError: 'nothing'.: correct it"),
    ):
        with pytest.raises(UserError, match=said):
            made(specs(maps=(2, 2, 2)), f"{file}:{name}").decode(outputs, (32, 48))
    with pytest.raises(UserError, match=r"has no function 'goo' .did you mean good"):
        made(specs(maps=(2, 2, 2)), f"{file}:goo")
    with pytest.raises(UserError, match=r"must be path/file\.py:function"):
        made(specs(maps=(2, 2, 2)), "decode")
    file.write_text(f"{DATACLASS}{OWN}")
    made(specs(maps=(2, 2, 2)), f"{file}:good")
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match=r"cannot be loaded .ModuleNotFoundError"):
        made(specs(maps=(2, 2, 2)), f"{file}:good")


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (specs(boxes=(64, 21), scores=(3, 21)), "are not decoded: calibrate with --decode, or give --decoder"),
        (specs(objectness=(3, 4, 4), deltas=(12, 4, 4)), "are those of a first stage, which proposes regions"),
        (specs(maps=(2, 2, 2)), "no decoder is built in for the outputs maps"),
        (specs(cls_logits=(9, 3), bbox_regression=(9, 4)), "whose checkpoint says which: put it beside"),
    ],
)
def test_outputs_without_a_decoder(outputs: list[TensorSpec], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(outputs)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"least_score": -1}, "--least-score -1: must be from 0 to 1"),
        ({"most_boxes": 0}, "--most-boxes 0: must be at least 1"),
    ],
)
def test_limits(limits: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Limits(**limits)  # type: ignore[arg-type]
