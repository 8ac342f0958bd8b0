"""Sidecars changed by hand in tests, and noted as this user's own all the same: what they say is tested, not whose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qat.base.artifact import sidecar_path
from qat.base.trust import SEAL, remember, seal_of


def edit(artifact: Path, change: Callable[[dict[str, Any]], object], *, own: bool = True) -> None:
    """Changes the sidecar of ``artifact``; ``own``: as if this user had written it, else as a stranger would."""
    path = sidecar_path(artifact)
    content = json.loads(path.read_text())
    change(content)
    content[SEAL] = seal_of(content)
    path.write_text(json.dumps(content))
    if own:
        remember(content[SEAL])
