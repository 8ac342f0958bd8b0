"""Text that several commands print: sizes, signal-to-noise ratios, suggestions for a misspelt name, long lists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SMALLEST_IN_MEGABYTES = 1e5


def megabytes(count: int | None, digits: int = 2, *, absent: str = "not measured") -> str:
    """``25.66 MB`` from a number of bytes; in kB below 0.1 MB; ``absent`` for None."""
    if count is None:
        return absent
    if count < _SMALLEST_IN_MEGABYTES:
        return f"{count / 1e3:.{digits}f} kB"
    return f"{count / 1e6:.{digits}f} MB"


def decibels(value: float | None) -> str:
    """``33.6 dB`` from a signal-to-noise ratio; ``equal`` for None, which means no noise at all."""
    return "equal" if value is None else f"{value:.1f} dB"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean A or B?)``, or nothing if no name is similar. Case is ignored."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3)
    return f" (did you mean {' or '.join(by_lower[match] for match in close)}?)" if close else ""


def first_of(names: Iterable[str], most: int = 4) -> str:
    """``a, b, c, d and 3 others``."""
    found = list(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} others" if len(found) > most else "")
