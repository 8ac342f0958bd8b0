"""The file that keeps the timings of kernels from build to build."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qat.artifact import Sidecar, UserError, WrongKindError, check_writable, read_sidecar, sidecar_path, write_artifact
from qat.console import say, warn

if TYPE_CHECKING:
    from deploy.builder import Built
    from deploy.trt import TimingCache, Toolkit


class TimingCacheFile:
    """The file that keeps the timings of kernels, with a sidecar that says for which version and GPU."""

    def __init__(self, path: Path, toolkit: Toolkit) -> None:
        check_writable(path)
        self.path, self.content, self._replaced = path, b"", ""
        self._maker = {"version": toolkit.version, "gpu": toolkit.device.name if toolkit.device else None}
        if not path.exists():
            return
        if not sidecar_path(path).exists():
            raise UserError(f"{path} is no timing cache of this program (it has no sidecar): give another file name")
        try:
            found = read_sidecar(path, "timing-cache").details
            if found == self._maker:
                self.content = path.read_bytes()
            else:
                self._replaced = f"is of version {found['version']} for {found['gpu']}"
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
