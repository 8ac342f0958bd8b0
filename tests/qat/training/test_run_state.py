"""What is said when a stopped run is read again; real runs that go on are in tests/test_interrupts.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qat.checkpoint import save_state
from qat.training.run_state import read_progress, state_path
from qat.training.trainer import FitState


@pytest.mark.parametrize("others", [0, 1])
def test_other_threads_than_those_of_the_stopped_run_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], others: int
) -> None:
    now = torch.get_num_threads()
    content = {"phase": "float", "figures": {}, "fit": FitState().numbers(), "options": {"seed": 0}}
    save_state(state_path(tmp_path / "model.qat"), {"model.w": torch.zeros(2)}, content | {"threads": now + others})
    assert read_progress(tmp_path / "model.qat", {"seed": 0}).phase == "float"
    assert capsys.readouterr().err == others * (
        f"warning: the stopped run computed with {now + 1} threads, this one has {now}: the last bits of the result "
        f"may differ; OMP_NUM_THREADS={now + 1} keeps them\n"
    )
