"""Errors that the user can correct; a command prints each as one line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can correct: one line that says what was wrong, what was found and what to do."""


def one_line(error: BaseException) -> str:
    """The message of ``error`` as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
