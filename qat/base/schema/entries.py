"""Figures, details and preprocessing of a sidecar: checked by the form of its kind; and asked for by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.base.errors import UserError, one_line
from qat.base.own_json import JsonError, typed
from qat.base.schema.networks import PreprocessingEntry
from qat.base.schema.sidecars import FORMS, MadeByEntry


class Entries(dict[str, Any]):
    """Figures or details of a sidecar that was read. Asking for one that is not there is a UserError that names it."""

    where = "("

    @classmethod
    def of(cls, content: Mapping[str, Any], where: str) -> Entries:
        """``content``; ``where``: what an error names it."""
        found = cls(content)
        found.where = where
        return found

    def __missing__(self, name: str) -> Any:
        raise UserError(f"{self.where}.{name}: it is missing): make the file again")


def check_forms(
    kind: str,
    figures: Mapping[str, Any],
    details: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    made_by: Mapping[str, Any],
) -> None:
    """Raises JsonError, which names the entry, where one of them is not as a sidecar of this kind has it."""
    of_figures, of_details = FORMS[kind]
    typed(figures, of_figures, "figures")
    typed(details, of_details, "details")
    typed(made_by, MadeByEntry, "made_by")
    if preprocessing:
        typed(preprocessing, PreprocessingEntry, "preprocessing")


def check_recorded(path: Path, kind: str, *forms: Mapping[str, Any]) -> None:
    """Raises UserError when what ``path`` is to record could not be read again; ``forms`` as in ``check_forms``."""
    try:
        check_forms(kind, *forms)
    except JsonError as fault:
        raise UserError(
            f"{path} cannot record that, because no command could read it ({one_line(fault)}): correct it, or record "
            "it under another name"
        ) from fault
