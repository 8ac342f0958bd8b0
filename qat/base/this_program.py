"""What runs here: versions of packages, and the command line. Standard library only."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path


def versions(*packages: str) -> dict[str, str]:
    """Versions of those of ``packages`` that are installed, without importing them."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def this_command() -> list[str]:
    """The words of the command line that runs this process."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # None for a script that was run by its path
    program = ["python", "-m", module.name] if module else [Path(sys.argv[0]).name]
    return [*program, *sys.argv[1:]]
