"""The file that keeps measured kernel times from one build to the next (``--timing-cache``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qat.base.artifact import Sidecar, WrongKindError, read_sidecar, sidecar_path, write_artifact
from qat.base.console import say, warn
from qat.base.errors import UserError
from qat.base.writing import check_writable

if TYPE_CHECKING:
    from deploy.builder import BuiltEngine
    from deploy.settings import BuildSettings
    from deploy.trt import TimingCache, Toolkit


class TimingCacheFile:
    """A timing cache. Its sidecar says by which version, on which GPU and with how many iterations it was measured."""

    def __init__(self, path: Path, toolkit: Toolkit, settings: BuildSettings, *, replace_unknown: bool = False) -> None:
        """Reads the cache, if the file exists.

        Args:
            path: the file.
            toolkit, settings: what builds; a cache of another version, GPU or number of iterations is replaced.
            replace_unknown: whether a file without sidecar may be replaced. Only for names that no user has chosen.

        Raises UserError when the file is not a timing cache, or cannot be written.
        """
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
            if replace_unknown:
                self._replaced = "has no sidecar"
                return
            raise UserError(f"{path} is not a timing cache of this program (it has no sidecar): give another file name")
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

    def save(self, built: BuiltEngine) -> TimingCache | None:
        """Writes the cache with what ``built`` has added. Returns and prints what happened to the file."""
        outcome: TimingCache | None = "replaced" if self._replaced else built.timing_cache
        content = built.timing_cache_content
        if outcome == "replaced":
            warn(f"the timing cache {self.path} {self._replaced or 'is refused by the builder'}: replaced")
        say(f"timing cache {self.path}: {outcome}, {len(content) / 1e3:.0f} kB")
        write_artifact(
            self.path, Sidecar(kind="timing-cache", details=self._maker), lambda path: path.write_bytes(content)
        )
        return outcome
