"""What parity counts: images of another class for logits; decibels for outputs that are no logits."""

from __future__ import annotations

import torch

from export.parity import _compare


def test_images_are_counted_only_for_logits() -> None:
    logits = torch.eye(4)
    changed = logits.clone()
    changed[0] = logits[1]
    parity = _compare(logits, changed, ())
    assert (parity.images, parity.other_top1) == (4, 1)


def test_maps_are_compared_by_sqnr() -> None:
    maps_NCHW = torch.randn(4, 21, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = 0.1 * torch.randn(maps_NCHW.shape, generator=torch.Generator().manual_seed(1))
    parity = _compare(maps_NCHW, maps_NCHW + noise, ())
    assert parity.other_top1 is None
    assert parity.sqnr_db is not None
    assert 19.5 < parity.sqnr_db < 20.5
    assert _compare(maps_NCHW, maps_NCHW, ()).sqnr_db is None
