"""Checkpoints and training states: the same network comes back, and one line for every file that is not whole."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sidecars import edit
from torch import Tensor, nn

from qat.base.artifact import read_sidecar, sha256_of, sidecar_path, write_artifact
from qat.base.errors import UserError
from qat.calibration.activation_ranges import calibrate_ranges
from qat.checkpoint import Checkpoint, load_checkpoint, load_state, save_checkpoint, save_state
from qat.data.preprocessing import Preprocessing
from qat.fake_quantize.prepare import placement_of, prepare
from qat.graph.network_record import network_from_json
from qat.graph.tracing import network_of
from qat.models import ModelSpec, build_model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def refused(path: Path, *parts: str, load: Callable[[Path], Any] = load_checkpoint) -> None:
    with pytest.raises(UserError) as caught:
        load(path)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def rewrite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Other tensors, under a sidecar that was written for them."""
    sidecar = read_sidecar(path, "checkpoint")
    write_artifact(path, sidecar, lambda file: save_file(dict(tensors), file))


def save_again(path: Path, loaded: Checkpoint) -> None:
    details = {"noted": {"by": "somebody"}, "seed": 0}
    spec = ModelSpec(**loaded.sidecar.details["model"])
    names = loaded.sidecar.class_names
    save_checkpoint(path, loaded.model, spec, loaded.preprocessing, names, {"best": 1}, details, 0)


# --- checkpoints


def test_what_was_saved_gives_bitwise_equal_logits(trained: Path, tmp_path: Path, images: Tensor) -> None:
    torch.manual_seed(1)
    spec = ModelSpec(f"{trained / 'net.py'}:net", 3)
    prepared = prepare(build_model(spec), input_shape=images.shape[1:])
    assert calibrate_ranges(prepared, [images], "max") == []
    preprocessing = load_checkpoint(trained / "model.qat").preprocessing
    path = tmp_path / "model.qat"
    written = save_checkpoint(path, prepared, spec, preprocessing, ("a", "b", "c"), {"x": 1.5}, {"note": "n"}, seed=9)
    loaded = load_checkpoint(path)
    assert torch.equal(logits(loaded.model, images), logits(prepared.eval(), images))
    assert not loaded.model.training
    assert loaded.sidecar == read_sidecar(path, "checkpoint")
    assert loaded.sidecar.sha256 == written.sha256 == sha256_of(path)
    assert loaded.preprocessing == preprocessing
    assert placement_of(loaded.model) == placement_of(prepared)
    assert (written.class_names, written.figures, written.details["note"]) == (("a", "b", "c"), {"x": 1.5}, "n")
    assert written.made_by["seed"] == 9


def test_the_sidecar_records_the_network_of_the_placement(trained: Path) -> None:
    loaded = load_checkpoint(trained / "model.qat")
    found = network_from_json(loaded.sidecar.details["network"])
    network = network_of(loaded.model)
    assert [(op.name, op.kind, op.label, op.inputs, op.shape) for op in found] == [
        (op.name, op.kind, op.label, op.inputs, op.shape) for op in network
    ]
    placement = placement_of(loaded.model)
    assert {tensor.tensor for tensor in placement.tensors} <= {op.name for op in found}
    shapes = {op.label: op.weight for op in found if op.weight}
    assert shapes == {"conv1": (8, 3, 3, 3), "conv2": (8, 8, 3, 3), "fc": (3, 8)}


def test_a_loaded_checkpoint_can_be_saved_and_loaded_again(trained: Path, tmp_path: Path, images: Tensor) -> None:
    first = load_checkpoint(trained / "model.qat")
    save_again(tmp_path / "again.qat", first)
    again = load_checkpoint(tmp_path / "again.qat")
    assert torch.equal(logits(again.model, images), logits(first.model, images))
    assert again.sidecar.details["placement"] == first.sidecar.details["placement"]


NET = """
from torch import nn
def net(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(288, num_classes))
"""


@pytest.fixture
def of_a_file(tmp_path: Path) -> Path:
    """A checkpoint beside the file of its model, in a folder of its own."""
    folder = tmp_path / "made here"
    folder.mkdir()
    (folder / "own.py").write_text(NET)
    spec = ModelSpec(f"{folder / 'own.py'}:net", 3)
    prepared = prepare(build_model(spec), input_shape=(3, 8, 8))
    calibrate_ranges(prepared, [torch.randn(4, 3, 8, 8)], "max")
    save_checkpoint(
        folder / "own.qat", prepared, spec, Preprocessing(8, 8, (0.5,) * 3, (0.25,) * 3, 8), ("a", "b", "c")
    )
    return folder / "own.qat"


def test_a_model_whose_code_has_changed_is_refused_or_said(of_a_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = of_a_file.parent / "own.py"
    assert file.read_text() == NET
    file.write_text(NET.replace("ReLU()", "SiLU()"))
    with pytest.raises(UserError, match=r"own\.qat answers something else than .*own\.py was edited since then"):
        load_checkpoint(of_a_file)
    load_checkpoint(of_a_file, allow_changed_model=True)
    assert "going on with the changed network" in " ".join(capsys.readouterr().err.split())
    file.write_text(NET + "# a remark\n")
    load_checkpoint(of_a_file)
    assert "was edited since" in (said := " ".join(capsys.readouterr().err.split()))
    assert "still answers the same" in said


def test_a_model_file_is_found_from_another_folder(of_a_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    x = torch.randn(2, 3, 8, 8)
    expected = load_checkpoint(of_a_file).model(x)
    monkeypatch.chdir(tmp_path)
    edit(of_a_file, lambda content: content["details"]["model"].update(name="own.py:net"))
    (tmp_path / "own.py").write_text(NET.replace("ReLU()", "SiLU()"))  # another file of that name
    assert torch.equal(load_checkpoint(of_a_file).model(x), expected)  # by the path that was recorded
    moved = of_a_file.parent.rename(tmp_path / "moved") / of_a_file.name
    assert torch.equal(load_checkpoint(moved).model(x), expected)  # beside the checkpoint
    (moved.parent / "own.py").unlink()
    (tmp_path / "own.py").unlink()
    with pytest.raises(UserError, match=r"no file own\.py for the model own\.py:net, in "):
        load_checkpoint(moved)


def test_several_inputs_without_preprocessing(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return y, y * scale

    model, x = Two(), (torch.randn(2, 3, 4, 4), torch.randn(2, 1, 1, 1))
    prepared = prepare(model, input_shape={"x": (3, 4, 4), "scale": (1, 1, 1)})
    calibrate_ranges(prepared, [{"scale": x[1], "x": x[0]}], "max")
    path = tmp_path / "two.qat"
    save_checkpoint(path, prepared)
    loaded = load_checkpoint(path, Two())
    assert all(map(torch.equal, loaded.model(*x), prepared.eval()(*x)))
    with pytest.raises(UserError, match=r"has no range for 1 of 1 tensors, first x: calibrate it"):
        save_checkpoint(path, prepare(model, input_shape={"x": (3, 4, 4), "scale": (1, 1, 1)}))
    with pytest.raises(UserError, match="was saved without preprocessing"):
        _ = loaded.preprocessing
    with pytest.raises(UserError, match="does not record how to build its model"):
        load_checkpoint(path)
    with pytest.raises(UserError, match=r"makes images of \[3, 4, 4\], and the model was prepared for \[3, 4, 4\] and"):
        save_checkpoint(path, prepared, None, Preprocessing(4, 4, (0.5,) * 3, (0.25,) * 3, 4))


def test_a_network_that_uses_one_weight_under_two_names(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "tied.py"
    path.write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, num_classes))\n"
        "    net[3].weight = net[1].weight\n"
        "    return net\n"
    )
    spec = ModelSpec(f"{path}:net", 3)
    prepared = prepare(build_model(spec), input_shape=(3, 1, 1))
    calibrate_ranges(prepared, [torch.randn(4, 3, 1, 1)], "max")
    preprocessing = Preprocessing(1, 1, (0.5,) * 3, (0.25,) * 3, resize=1)
    save_checkpoint(tmp_path / "tied.qat", prepared, spec, preprocessing, ("a", "b", "c"), {}, {}, 0)
    x = torch.randn(4, 3, 1, 1)
    assert torch.equal(logits(load_checkpoint(tmp_path / "tied.qat").model, x), logits(prepared.eval(), x))


def test_the_file_is_safetensors_and_its_header_is_json(trained: Path) -> None:
    content = (trained / "model.qat").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} <= {"F32", "I64"}
    assert len(content) == 8 + length + max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")


def test_a_pickle_under_the_name_of_a_checkpoint_is_not_unpickled(checkpoint: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "unpickled",)

    sidecar = read_sidecar(checkpoint, "checkpoint")
    write_artifact(checkpoint, sidecar, lambda file: torch.save({"conv1.weight": Trap()}, file))
    refused(checkpoint, "is not a safetensors file, or is truncated")
    assert not (tmp_path / "unpickled").exists()
    torch.load(checkpoint, weights_only=False)  # the trap works
    assert (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_a_truncated_checkpoint_names_both_hashes(checkpoint: Path, keep: int) -> None:
    expected = read_sidecar(checkpoint, "checkpoint").sha256
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    refused(checkpoint, expected, "truncated")


def test_the_sidecar_of_another_file(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qat"
    save_again(other, load_checkpoint(checkpoint))
    edit(other, lambda content: content)
    hashes = read_sidecar(checkpoint, "checkpoint").sha256, "its sidecar was written for"
    tensors = load_file(other)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other)
    shutil.copy(sidecar_path(checkpoint), sidecar_path(other))
    refused(other, *hashes)


def test_a_sidecar_with_an_unknown_model(checkpoint: Path) -> None:
    edit(checkpoint, lambda content: content["details"]["model"].update(name="resnet51"))
    refused(checkpoint, "unknown model 'resnet51'", "did you mean")


def test_a_sidecar_whose_model_file_is_gone(checkpoint: Path) -> None:
    edit(checkpoint, lambda content: content["details"]["model"].update(name="gone/net.py:net"))
    edit(checkpoint, lambda content: content["details"].update(code=None))
    refused(checkpoint, "no file gone/net.py")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["details"].pop("model"),
        lambda content: content["details"].pop("placement"),
        lambda content: content["details"].update(model="resnet18"),
        lambda content: content["details"].update(model={"name": "resnet18"}),
        lambda content: content["details"].update(placement=[]),
        lambda content: content["details"]["placement"].pop("tensors"),
        lambda content: content["details"]["placement"]["decisions"][0].pop("rule"),
        lambda content: content["preprocessing"].pop("mean"),
        lambda content: content["preprocessing"].update(std=[0, 0, 0]),
        lambda content: content.update(preprocessing=3),
        lambda content: content.update(details=[]),
    ],
)
def test_a_sidecar_that_lacks_or_misstates_an_entry(
    checkpoint: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(checkpoint, change)
    refused(checkpoint, "lacks or misstates", "again")


def test_a_placement_of_another_model(checkpoint: Path) -> None:
    edit(checkpoint, lambda content: content["details"]["placement"]["decisions"][0].update(op="layer9"))
    refused(checkpoint, "does not have (first: 'layer9')", "train again")


def test_tensors_that_do_not_fit_the_model(checkpoint: Path) -> None:
    tensors = load_file(checkpoint)
    rewrite(checkpoint, {name: tensor for name, tensor in tensors.items() if name != "fc.bias"})
    refused(checkpoint, "does not fit model", 'Missing key(s) in state_dict: "fc.bias"', "train again")
    rewrite(checkpoint, tensors | {"fc.weight": torch.zeros(5, 8)})
    refused(checkpoint, "does not fit model", "size mismatch for fc.weight")


def test_another_number_of_classes_than_the_weights_have(checkpoint: Path) -> None:
    edit(checkpoint, lambda content: content["details"]["model"].update(num_classes=7))
    refused(checkpoint, "does not fit model", "size mismatch for fc.weight")


# --- writing


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """Writing more fails with EFBIG, as ENOSPC does on a full disk; Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 2000])
def test_a_checkpoint_that_the_disk_does_not_take_leaves_nothing(trained: Path, tmp_path: Path, size: int) -> None:
    loaded = load_checkpoint(trained / "model.qat")
    path = tmp_path / "model.qat"
    with pytest.raises(UserError, match=rf"cannot write {path}: the file is too large"), files_no_longer_than(size):
        save_again(path, loaded)
    assert list(tmp_path.iterdir()) == []
    save_again(path, loaded)  # the limit was the reason
    assert path.stat().st_size > 2000


def test_a_sidecar_that_the_disk_does_not_take_leaves_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    many = replace(loaded, sidecar=replace(loaded.sidecar, class_names=tuple(f"class {i}" for i in range(9999))))
    with pytest.raises(UserError, match="cannot write"), files_no_longer_than(100_000):
        save_again(checkpoint, many)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- training states


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "model.qat.state"
    save_state(path, {"model.w": torch.arange(5.0)}, {"phase": "float"})
    return path


def test_a_state_comes_back(state: Path, tmp_path: Path) -> None:
    tensors, details = load_state(state)
    assert torch.equal(tensors["model.w"], torch.arange(5.0))
    assert details == {"phase": "float"}
    assert [path.name for path in tmp_path.iterdir()] == ["model.qat.state"]


def test_a_process_killed_while_it_saves_leaves_a_state_that_loads(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever rename it does not get to: the state is the old one or the new one, whole."""

    class Killed(BaseException):
        pass

    real, left = Path.replace, [0]

    def rename(path: Path, target: Path) -> Path:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return real(path, target)

    monkeypatch.setattr(Path, "replace", rename)
    phases = []
    for renames in range(3):
        left[0] = renames
        with suppress(Killed):
            save_state(state, {"model.w": torch.full((5,), float(renames))}, {"phase": f"{renames}"})
        phases.append(load_state(state)[1]["phase"])
    assert phases == ["float", "1", "2"]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_state(state: Path, keep: int) -> None:
    state.write_bytes(state.read_bytes()[:keep])
    refused(state, "is not a safetensors file, or is truncated", load=load_state)


def test_a_state_of_another_version_and_a_file_that_is_none(state: Path, trained: Path) -> None:
    save_file({"model.w": torch.zeros(2)}, state, {"training_state": '{"format": 99}'})
    refused(state, "format version 99, but this program reads 1", load=load_state)
    refused(trained / "model.qat", "format version None", load=load_state)
