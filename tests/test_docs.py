"""README.md and docs/: every command and Python block runs, every link leads somewhere, the map is whole."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import ONE_THREAD, ROOT, Run
from documents import PAGES, Block, blocks, environment, make_folder, shortened, table_below, tables
from own_network import CLASSES, PREPROCESSING, Net
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import deploy
import export
import qat
from qat.base import exit_codes
from qat.base.artifact import TensorSpec
from qat.base.errors import UserError
from qat.data.preprocessing import Preprocessing

EXPECTED = {
    "gpu": "driver|GPU",
    "download": "cannot download",
    "stopped": "nothing to resume",
    "ultralytics": "which is not installed: pip install ultralytics|No module named 'ultralytics'",
    "tensorrt": "serves only TensorRT's engines",
}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("documents"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, folder: Path, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, in one folder: what one command writes the next one reads."""
    monkeypatch.chdir(folder)
    names = python_names()
    for block in blocks(page):
        if block.language == "python":
            run_python(block, names)
        else:
            for words in block.commands():
                run_command_line(block, words, command, folder)


def run_command_line(block: Block, words: list[str], command: Run, folder: Path) -> None:
    where = f"{block.page}:{block.line}: {' '.join(words)}"
    if words[0].startswith("scripts/"):
        assert os.access(ROOT / words[0], os.X_OK), where
        return
    if words[0] == "torchrun":
        at = words.index("-m") + 1
        started = [*TORCHRUN, *words[1:at], *shortened(words[at:]), "--device", "cpu"]
        variables = {**os.environ, **ONE_THREAD, **environment(), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(started, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    else:
        assert words[:2] == ["python", "-m"], where
        module, *arguments = shortened(words[2:])
        done = command(module, *arguments, environment=environment(), folder=folder)
    if block.expected:
        assert done.returncode == 2, where + done.stderr
        assert re.search(EXPECTED[block.expected], done.stderr), where + done.stderr
    else:
        assert done.returncode == 0, where + done.stdout + done.stderr


def run_python(block: Block, names: dict[str, Any]) -> None:
    code = compile(block.text, f"{block.page}:{block.line}", "exec")
    with contextlib.redirect_stdout(io.StringIO()):
        if block.expected:
            with pytest.raises((UserError, ModuleNotFoundError), match=EXPECTED[block.expected]):
                exec(code, names)
        else:
            exec(code, names)


def python_names() -> dict[str, Any]:
    """What a reader of the Python blocks has: a float model, images, labels, an optimizer, and what they mean."""
    torch.manual_seed(0)
    model = Net()
    images = torch.randn(16, 3, 32, 32)
    labels = torch.arange(16) % 3
    size = {"height": 32, "width": 32, "resize": 32}
    preprocessing = type(PREPROCESSING)(mean=PREPROCESSING.mean, std=PREPROCESSING.std, **size)
    return {
        "model": model,
        "batches": images.split(8),
        "loader": [(images, labels)],
        "optimizer": torch.optim.SGD(model.parameters(), 1e-3),
        "images": images,
        "dataset": TensorDataset(images, labels),
        "preprocessing": preprocessing,
        "class_names": CLASSES,
        "YourModel": Net,
        "nn": nn,
    }


def test_no_command_stands_where_no_test_finds_it() -> None:
    found = []
    for page in PAGES:
        fenced = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        found += [
            f"{page.name}: {line}"
            for line in fenced.splitlines()
            if re.match(r"\s{4,}(python|torchrun|qat|export|deploy)", line)
        ]
    assert found == []


def test_every_link_leads_to_a_file() -> None:
    missing = []
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
    assert missing == []


def test_the_map_names_every_file() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    listed = subprocess.run(
        ["git", "ls-files", "qat/*.py", "export/*.py", "deploy/*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    names = {Path(name).name for name in listed} - {"__init__.py"}
    assert {name for name in names if name not in text} == set()
    paths = set(re.findall(r"\b((?:qat|export|deploy)/[\w/]+\.py)\b", text))
    assert {path for path in paths if not (ROOT / path).is_file()} == set()


def table_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below ``heading``, without its own heading and without `."""
    lines = table_below((ROOT / page).read_text(), heading).splitlines()
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.mark.parametrize(("page", "heading"), tables())
def test_the_tables_of_rules_and_exit_codes_are_those_of_the_program(page: str, heading: str) -> None:
    again = "write it anew: PYTHONPATH=. python tests/helpers/documents.py"
    assert table_below((ROOT / page).read_text(), heading) == tables()[page, heading], again


@pytest.mark.parametrize("package", [qat, export, deploy], ids=["qat", "export", "deploy"])
def test_the_tables_of_the_library_name_every_name(package: Any) -> None:
    rows = table_of("docs/python.md", f"## {package.__name__}")
    assert sorted(name.split("(")[0] for name, *_ in rows) == sorted(package.__all__)


def test_every_exit_code_is_on_its_page() -> None:
    defined = {str(value) for value in vars(exit_codes).values() if isinstance(value, int)}
    assert {code for code, *_ in table_of("docs/exit-codes.md", "# Exit codes")} == defined


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_picture_is_what_the_command_draws(tmp_path: Path, command: Run) -> None:
    picture = tmp_path / "block.svg"
    network = "docs/examples/residual_block.py:network"
    done = command("qat.placement", network, "--image-size", 32, "--num-classes", 10, "--svg", picture)
    assert done.returncode == 0
    assert picture.read_text() == (ROOT / "docs" / "residual_block.svg").read_text()


def test_the_example_finds_boxes_in_the_photo_again(tmp_path: Path) -> None:
    """An answer in a letterbox of 64 pixels for a photo of 100 x 50: two boxes of one object, one of another class."""
    example = runpy.run_path(str(ROOT / "docs/examples/draw_boxes.py"))
    Image.new("RGB", (100, 50)).save(tmp_path / "photo.png")
    preprocessing = asdict(Preprocessing(64, 64, (0.0,) * 3, (1.0,) * 3, 64, letterbox=True))
    sidecar = SimpleNamespace(preprocessing=preprocessing, inputs=(TensorSpec("x", (-1, 3, 64, 64), "float32"),))
    found = np.zeros((1, 6, 4), np.float32)  # centre, size, two scores, of four cells
    found[0, :, 0] = 32, 32, 32, 16, 0.9, 0.1
    found[0, :, 1] = 33, 32, 32, 16, 0.8, 0.1
    found[0, :, 2] = 33, 32, 32, 16, 0.0, 0.7
    boxes, scores, classes = example["detect"](lambda x: found, sidecar, tmp_path / "photo.png")
    np.testing.assert_allclose(boxes[0], [25, 12.5, 75, 37.5])
    assert (scores.tolist(), classes.tolist()) == (pytest.approx([0.9, 0.7]), [0, 1])
    camera = SimpleNamespace(
        preprocessing=preprocessing | {"source_size": [50, 100]}, inputs=(TensorSpec("x", (-1, 50, 100, 3), "uint8"),)
    )
    fed = []
    again, *_ = example["detect"](lambda x: fed.append(x) or found, camera, tmp_path / "photo.png")
    assert torch.equal(again, boxes)
    assert (fed[0].dtype, fed[0].shape) == (np.uint8, (1, 50, 100, 3))
    drawn = example["draw"](tmp_path / "photo.png", boxes, scores, classes)
    assert drawn.getpixel((25, 20)) == (255, 0, 0)
    assert drawn.size == (100, 50)
