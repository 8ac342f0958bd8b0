"""pyproject.toml against docs/dependencies.md, constraints.txt, and what the packages import."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from importlib.metadata import packages_distributions, requires

import pytest
from commands import ROOT
from documents import table_below
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NAME = "int8-qat-pipeline"
PACKAGES = ("qat", "export", "deploy")
# Of packages that are not installed where the tests run.
MODULES = {"tensorrt": "tensorrt", "cupti": "cupti-python", "tensorrt_rtx": "tensorrt-rtx-cu13-bindings"}
# Called where the user has installed it; its licence is not ours.
NEVER_REQUIRED = {"ultralytics"}
# Used without an import: loaded by its path, or by another package.
NOT_IMPORTED = {"onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings", "tritonclient"}


def read_requirements() -> list[tuple[Requirement, str]]:
    """Each requirement of pyproject.toml, with its extra, or "all"."""
    text = (ROOT / "pyproject.toml").read_text()
    project = text[text.index("dependencies = [") : text.index("[tool.")]
    found = []
    for name, inside in re.findall(r"^([\w-]+) = \[(.*?)\]\s*(?:#[^\n]*)?$", project, re.MULTILINE | re.DOTALL):
        lines = re.findall(r'"([^"]+)"', re.sub(r"#.*", "", inside))
        found += [(Requirement(line), "all" if name == "dependencies" else name) for line in lines]
    return found


REQUIREMENTS = read_requirements()


def of(requirement: Requirement) -> str:
    return str(canonicalize_name(requirement.name))


def test_the_requirements_are_those_that_an_installer_sees() -> None:
    """Our reading of pyproject.toml, which Python 3.10 has no parser for, against that of setuptools."""
    seen = {str(canonicalize_name(Requirement(line).name)) for line in requires(NAME) or ()}
    if seen != {of(requirement) for requirement, _ in REQUIREMENTS}:
        pytest.fail("install the package again: its metadata are those of another pyproject.toml, or it is misread")


def test_the_table_has_every_package_with_its_reason_and_licence() -> None:
    table = table_below((ROOT / "docs" / "dependencies.md").read_text(), "# Dependencies").splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    wanted = defaultdict(set)
    for requirement, extra in REQUIREMENTS:
        wanted[of(requirement)].add(extra)
    assert {str(canonicalize_name(name)): set(needed.split(", ")) for name, needed, _, _ in rows} == wanted
    assert len(rows) == len(wanted)
    assert all(reason and licence for _, _, reason, licence in rows)


@pytest.mark.parametrize(("requirement", "extra"), REQUIREMENTS, ids=str)
def test_every_package_has_both_bounds(requirement: Requirement, extra: str) -> None:
    assert {one.operator for one in requirement.specifier} == {">=", "<"}


def test_a_package_has_the_same_range_everywhere() -> None:
    ranges = defaultdict(set)
    for requirement, _ in REQUIREMENTS:
        ranges[of(requirement)].add(str(requirement.specifier))
    assert {name: found for name, found in ranges.items() if len(found) > 1} == {}


def test_the_versions_of_the_tests_are_within_the_ranges() -> None:
    """All that setup.sh installs is in constraints.txt, for every Python, in a version that is allowed."""
    pinned = defaultdict(set)
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition(";")[0].strip().partition("==")
        pinned[str(canonicalize_name(name))].add(version)
    for requirement, extra in REQUIREMENTS:
        if extra in ("all", "rtx", "dev"):
            assert pinned[of(requirement)], requirement
            assert all(requirement.specifier.contains(version) for version in pinned[of(requirement)]), requirement


def imported() -> dict[str, set[str]]:
    """Distribution -> our files that import it, anywhere in them."""
    distributions, found = packages_distributions(), defaultdict(set)
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [f"{node.module}.{name.name}" for name in node.names]
                for name in names:
                    top = name.partition(".")[0]
                    if top in sys.stdlib_module_names or top in (*PACKAGES, "triton_python_backend_utils"):
                        continue
                    if top == "cuda":  # of several packages
                        owners = ["cuda-bindings"]
                    elif top == "google":
                        owners = ["protobuf"]
                    else:
                        owners = [MODULES[top]] if top in MODULES else distributions.get(top, [top])
                    for owner in owners:
                        found[str(canonicalize_name(owner))].add(path.relative_to(ROOT).as_posix())
    return dict(found)


def test_what_is_imported_is_required_and_what_is_required_is_imported() -> None:
    used, required = imported(), {of(requirement) for requirement, extra in REQUIREMENTS if extra != "dev"}
    assert {name: files for name, files in used.items() if name not in required | NEVER_REQUIRED} == {}
    assert required - used.keys() - NOT_IMPORTED == set()
