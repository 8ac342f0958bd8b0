"""What tests of the training loop train: the smallest network and its images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qat.data.splits import Data, load_data
from qat.models import ModelSpec, build_model


@pytest.fixture
def data(trained: Path) -> Data:
    return load_data(str(trained / "images.npz"), None, 0)


@pytest.fixture
def model(trained: Path) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelSpec(f"{trained / 'net.py'}:net", 3))
