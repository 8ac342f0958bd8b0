"""Errors that the user can correct; a command prints each as one line."""

from __future__ import annotations

_MOST_LETTERS = 1200


class UserError(Exception):
    """A mistake that the user can correct: one line that says what was wrong, what was found and what to do.

    The middle of a very long line, which quotes what a file holds, is left out.
    """

    def __init__(self, line: str = "") -> None:
        half, line = _MOST_LETTERS // 2, " ".join(line.splitlines())  # names in a file may hold line feeds
        super().__init__(line if len(line) <= _MOST_LETTERS else f"{line[:half]} ... {line[-half:]}")


def one_line(error: BaseException) -> str:
    """The message of ``error`` as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
