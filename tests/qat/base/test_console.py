"""Tables on terminals of any width."""

from __future__ import annotations

import pytest
from rich.console import Console

from qat.base import console

HEADS = ("ONNX nodes", "kind", "kernel", "us")
ROWS = [("layer1.0.conv3 + layer1.0.add + layer1.0.relu_2", "CaskConvolution", "sm80_" + 39 * "x", "7.0")]


def printed(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setattr(console, "console", Console(width=width, highlight=False))
    console.table("[Layers] that the engine has", HEADS, ROWS, details=("kernel", "kind"))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("width", "left_out"), [(140, ""), (100, "kernel"), (80, "kernel"), (50, "kernel, kind"), (20, "kernel, kind")]
)
def test_columns_are_left_out_where_they_would_be_cut(
    width: int, left_out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    title, *grid = printed(width, monkeypatch, capsys)
    assert title == "[Layers] that the engine has"[:width] or width < 28
    text = "\n".join(grid)
    assert max(map(len, grid[:-1])) <= width
    assert ("kernel" in grid[1], "kind" in grid[1]) == ("kernel" not in left_out, "kind" not in left_out)
    assert ("too narrow here for: " + left_out in " ".join(grid)) is bool(left_out)
    if width >= 50:
        assert "…" not in text
        assert "7.0" in text


def test_a_name_without_spaces_is_wrapped_not_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "console", Console(width=40, highlight=False))
    name = "".join(f"part{n}." for n in range(12))
    console.table("Names", ("layer", "us"), [(name, "7.0")])
    cells = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert "".join(cells) == name
