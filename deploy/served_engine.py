"""An engine that is exchanged for another one while requests run."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from deploy.runtime import Engine, EngineClosedError
from qat.base.errors import UserError


class ServedEngine:
    """Calls go to the engine that is served at the moment; any number of threads may call it.

    Example::

        with ServedEngine(Engine.load("runs/model.engine")) as served:
            ...                                              # threads call served(images)
            served.exchange(Engine.load("runs/new.engine"))  # no call fails or waits for it

    Both engines are in the GPU's memory until the last call of the old one has ended.
    """

    def __init__(self, engine: Engine) -> None:
        """Serves ``engine``, and closes it in the end."""
        self._engine = engine
        self._exchanging = threading.Lock()
        self._closed = False

    @property
    def engine(self) -> Engine:
        """The engine that is served. It is closed when it has been exchanged: keep it for one look, not for calls."""
        return self._engine

    def __call__(self, batch: Any) -> Any:
        """As ``Engine.__call__``, by the engine that is served when the call begins, or by a newer one."""
        while True:
            engine = self._engine
            try:
                return engine(batch)
            except EngineClosedError:  # it was exchanged before this call was computed
                if engine is self._engine:
                    raise

    def exchange(self, engine: Engine) -> None:
        """Serves ``engine`` from now on. Waits until the calls of the old one have ended, and closes it.

        Raises UserError when the new engine has other inputs or outputs than the old one, EngineClosedError after
        ``close``. The new engine is then closed.
        """
        with self._exchanging:
            old = self._engine
            try:
                if self._closed:
                    raise EngineClosedError
                for kind, before, now in (
                    ("inputs", old.inputs, engine.inputs),
                    ("outputs", old.outputs, engine.outputs),
                ):
                    if before != now:
                        raise UserError(
                            f"the new engine has the {kind} {now}, the served one {before}: start another service"
                        )
            except BaseException:
                engine.close()
                raise
            self._engine = engine
            old.close()

    def close(self) -> None:
        """Waits for running calls, and closes the engine."""
        with self._exchanging:
            self._closed = True
            self._engine.close()

    def __enter__(self) -> ServedEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
