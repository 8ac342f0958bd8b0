"""A network as a user has it, not known by any name, and what its images mean."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qat.data.preprocessing import Preprocessing

CLASSES = ("red", "green", "blue")
PREPROCESSING = Preprocessing(16, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), resize=16)


class Net(nn.Module):
    """As a user has it: not known by any name, with a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        answer: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return answer
