"""The file that keeps the timings of kernels from build to build."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qat.base.artifact import Sidecar, WrongKindError, check_writable, read_sidecar, sidecar_path, write_artifact
from qat.base.console import say, warn
from qat.base.errors import UserError

if TYPE_CHECKING:
    from deploy.builder import Built
    from deploy.settings import BuildSettings
    from deploy.trt import TimingCache, Toolkit


class TimingCacheFile:
    """The file that keeps the timings of kernels, with a sidecar that says of which version and GPU, and how taken."""

    def __init__(self, path: Path, toolkit: Toolkit, settings: BuildSettings, *, ours: bool = False) -> None:
        """``ours``: the name was not chosen by the user, so what has no sidecar was cut off, and is replaced."""
        check_writable(path)
        self.path, self.content, self._replaced = path, b"", ""
        self._maker = {
            "version": toolkit.version,
            "gpu": toolkit.device.name if toolkit.device else None,
            "timing_iterations": settings.timing_iterations,
        }
        if not path.exists():
            return
        if not sidecar_path(path).exists():
            if ours:
                self._replaced = "has no sidecar"
                return
            raise UserError(f"{path} is no timing cache of this program (it has no sidecar): give another file name")
        try:
            found = read_sidecar(path, "timing-cache").details
            if found == self._maker:
                self.content = path.read_bytes()
            else:
                made_by = ", ".join(f"{name} {found.get(name)}" for name in self._maker if found.get(name) is not None)
                self._replaced = f"was made by another builder or for another GPU ({made_by})"
        except WrongKindError:
            raise
        except UserError as error:
            self._replaced = f"is damaged ({error})"

    def save(self, built: Built) -> TimingCache | None:
        """Writes what the build has added, and says what became of the file."""
        outcome: TimingCache | None = "replaced" if self._replaced else built.timing_cache
        content = built.timing_cache_content
        if outcome == "replaced":
            warn(f"the timing cache {self.path} {self._replaced or 'is refused by the builder'}: replaced")
        say(f"timing cache {self.path}: {outcome}, {len(content) / 1e3:.0f} kB")
        write_artifact(
            self.path, Sidecar(kind="timing-cache", details=self._maker), lambda path: path.write_bytes(content)
        )
        return outcome
