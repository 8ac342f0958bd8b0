"""The sweep over kinds of layers, by TensorRT-RTX's builder with made-up times: what is kept, resumed and refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from deploy import builder, cuda, kernel_sweep
from deploy.installed import find_toolkit
from deploy.kernel_sweep import KernelSweep, kinds_of_layers, sweep_kernels
from deploy.kernels import KernelOptions, main
from deploy.measure import Latency
from deploy.settings import BuildSettings
from qat.base.errors import UserError
from qat.rules.kernel_profile import KernelProfile

POOLS = ("pools and gates",)
COUNT = len(kinds_of_layers()["pools and gates"])


def latency(median: float) -> Latency:
    return Latency(32, 200, median, 0.95 * median, 1.05 * median, 1.1 * median)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU that measures nothing: INT8 takes 1 ms, float 2 ms. What was measured."""
    found: list[str] = []
    toolkit = dataclasses.replace(find_toolkit("tensorrt-rtx"), device=cuda.Device("A GPU", "8.9", "1", "1", 1.0))
    monkeypatch.setattr(kernel_sweep, "find_toolkit", lambda name: toolkit)
    settings = BuildSettings(capabilities=("8.9",))
    # TensorRT-RTX times no kernels
    monkeypatch.setattr(kernel_sweep, "build", lambda _, path, *others: builder.build(toolkit, path, settings))

    def latencies(self: KernelSweep, built: Any, batch: int) -> dict[str, Latency]:
        found.append(str(batch))
        return {"int8": latency(1.0), "float": latency(2.0)}

    monkeypatch.setattr(KernelSweep, "_latencies", latencies)
    return found


def test_what_was_measured_is_kept_and_not_measured_again(
    measured: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.json"
    assert main(KernelOptions(output=path, families=POOLS)) == 0
    profile = KernelProfile.read(path)
    assert (profile.gpu, profile.compute_capability, profile.batch) == ("A GPU", "8.9", 32)
    assert [one.kind for one in profile.kinds] == kinds_of_layers()["pools and gates"]
    assert {(one.gain, one.significant, one.in_int8, one.error) for one in profile.kinds} == {(2.0, True, None, "")}
    assert len(measured) == COUNT
    assert "gate, 64 -> 64: 2.00 times as fast in INT8\n" in capsys.readouterr().out
    sweep_kernels(POOLS, 32, 200, 1, path)
    assert len(measured) == COUNT
    other = dataclasses.replace(profile.kinds[0], kind=kinds_of_layers()["linear"][0])
    dataclasses.replace(profile, kinds=(*profile.kinds, other)).write(path)
    sweep_kernels((*POOLS, *POOLS), 32, 200, 1, path, again=True)
    assert len(measured) == 2 * COUNT
    assert len(KernelProfile.read(path).kinds) == COUNT + 1  # what was not asked for again is kept


def test_a_layer_that_the_builder_computes_in_float_is_told(measured: list[str], tmp_path: Path) -> None:
    toolkit = kernel_sweep.find_toolkit("tensorrt")
    found = KernelSweep(toolkit, tmp_path, 2).measure(kinds_of_layers()["transposed"][0])
    assert found.in_int8 is False
    found = KernelSweep(toolkit, tmp_path, 2).measure(kinds_of_layers()["linear"][0])
    assert found.in_int8 is True
    assert measured == ["2", "392"]  # images, and the rows of all of them


def test_a_network_that_is_refused_is_a_result(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = kernel_sweep.build

    def refuse(toolkit: Any, path: Path, *others: Any) -> Any:
        if path.stem == "int8":
            raise UserError("no kernel")
        return real(toolkit, path, *others)

    monkeypatch.setattr(kernel_sweep, "build", refuse)
    profile = sweep_kernels(POOLS, 32, 200, 1, tmp_path / "p.json")
    assert {(one.gain, one.error) for one in profile.kinds} == {(None, "no kernel")}
    assert "not built in INT8: no kernel" in capsys.readouterr().out
    assert measured == []


def test_no_layer_is_begun_after_the_minutes(
    measured: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_kernels(POOLS, 32, 200, 1e-9, tmp_path / "p.json")
    assert measured == []
    assert f"{COUNT} kinds were not measured in 1e-09 minutes" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"families": ("groups",)},
            r"--families 'groups' is not known: choose from grouped, padded groups, transposed",
        ),
        ({"batch": 0}, "--batch, --runs and --minutes must be above 0"),
        ({"runs": 0}, "must be above 0"),
        ({"minutes": 0.0}, "must be above 0"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], says: str, measured: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        main(KernelOptions(output=tmp_path / "p.json", **options))
    assert measured == []


def test_a_profile_of_another_gpu_is_not_continued(measured: list[str], tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile = sweep_kernels(POOLS, 32, 200, 1, path)
    dataclasses.replace(profile, gpu="Another").write(path)
    with pytest.raises(UserError, match=r"is of Another, TensorRT .* and batch 32: give another --output"):
        sweep_kernels(POOLS, 32, 200, 1, path)


def test_without_a_gpu_it_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no TensorRT builder is usable"):
        main(KernelOptions(output=tmp_path / "p.json"))
