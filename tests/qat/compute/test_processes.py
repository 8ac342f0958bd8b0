"""Two processes that torchrun starts: the same network as one trains, the same ranges, and no dead-lock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.multiprocessing
from processes import NET, train
from safetensors.torch import load_file
from torch import Tensor

from qat.base.artifact import read_sidecar, sha256_of
from qat.base.errors import UserError
from qat.base.ranges_file import ranges_path, read_distributions
from qat.calibration.histogram import HistogramObserver
from qat.compute.processes import SINGLE_PROCESS, Processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    tiny.options(made)
    (made / "plain.py").write_text(NET)
    return made


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[int, Path]:
    """Checkpoints of the same run in one process and in two."""
    outputs = {}
    for processes in (1, 2):
        outputs[processes] = folder / f"{processes}.qat"
        run = train(
            folder,
            processes,
            model=f"{folder / 'plain.py'}:net",
            output=outputs[processes],
            calibrator="max",
            batch_size=38,  # of 81 images, so that the last batch has five: shares of three and two
            accumulate=2,
            float_epochs=6,
            float_lr=2e-2,
            log_folder=folder / f"log{processes}",
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("Accuracy on the test split") == 1
    return outputs


def test_two_processes_train_the_network_that_one_trains(plain: dict[int, Path]) -> None:
    one, two = (load_file(path) for path in plain.values())
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")
    sidecars = [read_sidecar(path, "checkpoint") for path in plain.values()]
    assert [sidecar.details["processes"] for sidecar in sidecars] == [1, 2]
    for key in ("float", "ptq", "qat"):
        first, second = (sidecar.figures[key] for sidecar in sidecars)
        assert first["test_images"] == second["test_images"] == 60
        assert first["test_loss"] == pytest.approx(second["test_loss"], abs=2e-3)


def test_one_process_writes_what_calibration_saw_of_all_images(plain: dict[int, Path]) -> None:
    one, two = (read_distributions(ranges_path(path), sha256_of(path)) for path in plain.values())
    assert one.images == two.images == 27
    assert [sum(tensor.counts) for tensor in one.activations] == [sum(tensor.counts) for tensor in two.activations]
    assert one.activations[0] == two.activations[0]  # of the images


def test_one_process_writes_the_log_with_the_loss_of_all(plain: dict[int, Path], folder: Path) -> None:
    one, two = ((folder / f"log{count}" / "train.jsonl").read_text().splitlines() for count in (1, 2))
    losses = [[json.loads(line).get("loss") for line in lines] for lines in (one, two)]
    assert len(losses[0]) == len(losses[1]) > 4
    for single, both in zip(*losses, strict=True):
        assert single is both is None or single == pytest.approx(both, abs=0.02)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_by_bit(folder: Path) -> None:
    # Both are interrupted in pass 65: in the second epoch after quantization, of 20 steps; all agree at step 16.
    stop = {"STOP_IN_PASS": "65", "STOP_BY": "2"}
    options = {"batch_size": 4, "ema": 0.9, "learn_ranges": True}
    whole = train(folder, 2, output=folder / "whole.qat", **options)
    assert whole.returncode == 0, whole.stderr
    stopped = train(folder, 2, stop, output=folder / "stopped.qat", **options)
    assert stopped.returncode != 0
    assert "torchrun --nproc-per-node 2 -m qat.train" in stopped.stderr
    other = train(folder, 1, output=folder / "stopped.qat", resume=True, **options)
    assert other.returncode == 2
    assert "processes was 2, now 1" in other.stderr
    resumed = train(folder, 2, output=folder / "stopped.qat", resume=True, **options)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming qat training at epoch 2, step 16" in resumed.stdout
    one, two = (load_file(folder / name) for name in ("whole.qat", "stopped.qat"))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_when_one_dies_all_stop(folder: Path, rank: str) -> None:
    run = train(folder, 2, {"FAILS": rank}, model=f"{folder / 'plain.py'}:net", output=folder / "dies.qat")
    assert run.returncode != 0
    assert "exitcode  : 7" in run.stderr
    assert not (folder / "dies.qat").exists()


@pytest.mark.slow
def test_parameters_without_a_gradient_are_left_alone(folder: Path) -> None:
    options: dict[str, Any] = {"qat_epochs": 3, "progressive": 1, "learn_ranges": True, "accumulate": 2}
    run = train(folder, 2, output=folder / "parts.qat", **options)
    assert run.returncode == 0, run.stderr
    assert "Accuracy on the test split" in run.stdout


@pytest.mark.slow
def test_a_network_of_float_operations_needs_no_ranges(folder: Path) -> None:
    run = train(folder, 2, output=folder / "float.qat", keep_float="*", float_epochs=0, qat_epochs=0)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_a_batch_that_does_not_come_out_even_says_which_would(folder: Path) -> None:
    run = train(folder, 2, output=folder / "odd.qat", batch_size=9)
    assert run.returncode != 0
    found = (
        "--batch-size 9 cannot be shared equally by 2 processes: give a multiple of at least two images each, such as 8"
    )
    assert f"error: {found}" in run.stderr
    assert "process 1: error:" in run.stderr


# --- calibration

SEEN = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)) * 3**seed for seed in range(5)]


def _observe_a_share(rank: int, size: int, order: list[int], file: str, output: str) -> None:
    from torch import nn

    from qat.calibration.activation_ranges import observe
    from qat.fake_quantize.quantizer import ActivationQuantizer

    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    model = nn.Sequential(ActivationQuantizer(), nn.Linear(1, 1, bias=False), ActivationQuantizer())
    nn.init.constant_(model[1].weight, 0.0)
    with torch.no_grad():
        shares = [SEEN[i].reshape(-1, 1) for i in order[rank::size]]
        found = observe(model, shares, processes=Processes(rank, size))
    torch.save([(o.counts.clone(), o.limit.clone(), o.amax) for o in found.values()], f"{output}{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("order", "size"),
    [
        *(pytest.param(order, 2, marks=pytest.mark.slow) for order in ([0, 1, 2, 3, 4], [4, 2], [3])),
        ([2, 0, 1], 3),
    ],
)
def test_histograms_of_shares_are_merged_without_a_dead_lock(tmp_path: Path, order: list[int], size: int) -> None:
    arguments = (size, order, str(tmp_path / "meet"), str(tmp_path / "found"))
    torch.multiprocessing.spawn(_observe_a_share, arguments, nprocs=size)
    results = [torch.load(f"{tmp_path / 'found'}{rank}") for rank in range(size)]
    whole = torch.cat([SEEN[i] for i in order])
    for (counts, limit, amax), (zeros, _, zero) in results:
        assert counts.sum() == len(whole)
        assert amax == whole.abs().max()
        expected = torch.histc(whole.abs(), len(counts), 0, limit.item()).long()
        assert (counts.cumsum(0) - expected.cumsum(0)).abs().max() <= 5  # at the edge of two bins
        assert (zeros.sum(), zeros[0], zero) == (len(whole), len(whole), 0)
        assert all(torch.equal(other[0][0], counts) for other in results)


def test_alone_nothing_is_sent() -> None:
    x = torch.ones(3)
    assert SINGLE_PROCESS.sums(1.0, 2.0) == [1.0, 2.0]
    assert SINGLE_PROCESS.any(True, False) == [True, False]
    assert SINGLE_PROCESS.mean(3.0) == 3.0
    assert SINGLE_PROCESS.add(x) is x
    assert SINGLE_PROCESS.parallel(model := torch.nn.Linear(1, 1)) is model
    with pytest.raises(UserError, match="such as 6"):
        Processes(0, 3).share_of(7)


def test_an_observer_that_starts_anew_forgets() -> None:
    observer: HistogramObserver = HistogramObserver("x")
    observer(torch.ones(4))
    observer.start(2.0)
    values: Tensor = observer.counts
    assert (values.sum(), observer.limit, observer.seen) == (0, 2.0, False)
