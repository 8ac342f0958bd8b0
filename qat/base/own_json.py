"""Reads the JSON files that this program writes: within limits, strictly, into dataclasses.

A file may be damaged, cut, edited or made by a stranger. Its size is checked before it is read, and how deep it nests
before it is parsed. Then it must be JSON to the letter (no NaN, no key twice, no number that a double cannot hold), and
each value of the type that the dataclass states, to the leaves. Every fault is a UserError that names the file and the
entry. Entries that the dataclass does not know are left alone: a newer version, or a user of the library, wrote them.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from qat.base.errors import UserError, one_line

LARGEST, DEEPEST = 32 * 2**20, 32  # bytes of a file; brackets within brackets. Ours have 10 MB and 9 at most
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_BRACKET = re.compile(r"[\[\]{}]")
_LONG_INTEGER = re.compile(r"(?<![.\d])\d{19}")  # ours are counts, sizes and numbers with at most 17 digits
_ODD_LETTER = re.compile(r"\\u(0000|[dD][89a-fA-F])")  # NUL, which no path can have; half a letter
_PLACE = re.compile(r"^(?P<fault>.*?)(?: - at `(?:key in )?\$(?P<place>.*)`)?$", re.DOTALL)

Typed = TypeVar("Typed")


class JsonError(ValueError):
    """What is wrong with a text or a value, and where: ``details.seed: Expected `int`, got `str```."""


def read_text(path: Path, what: str, remedy: str) -> str:
    """The text of a file of ours, ``what`` for messages. Raises UserError when it cannot be read, or is too large."""
    try:
        if not path.is_file():
            found = "is no regular file" if path.exists() else "is not there"
            raise UserError(f"cannot read the {what} {path}: it {found}; check the path")
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: of a path with a NUL
        raise UserError(f"cannot read the {what} {path} ({one_line(error)}): check the path") from error
    if len(data) > LARGEST:
        raise UserError(f"{path} has more than {LARGEST // 2**20} MB, so it is no {what}: {remedy}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no {what}, or is truncated ({one_line(error)}): {remedy}") from error


def parse(text: str) -> Any:
    """The value of a JSON text. Raises JsonError when it is none, or beyond the limits."""
    _check_limits(text)
    try:
        return json.loads(
            text, object_pairs_hook=_without_doubles, parse_float=_finite, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise JsonError("it nests too deep") from error
    except json.JSONDecodeError as error:
        raise JsonError(one_line(error)) from error


def typed(content: Any, kind: type[Typed], name: str = "") -> Typed:
    """``content``, which ``parse`` gave, as an object of the dataclass ``kind``; ``name``: of the entry that it is.

    Raises JsonError, which names the entry, when a value is missing, of another type or out of range.
    """
    try:
        found: Typed = msgspec.convert(content, kind)
        return found
    except msgspec.ValidationError as error:
        told = _PLACE.match(str(error))
        assert told is not None
        place = (name + (told["place"] or "")).lstrip(".")
        raise JsonError(f"{place}: {told['fault']}" if place else told["fault"]) from error
    except UserError as error:  # of a dataclass that checks itself
        raise JsonError(f"{name}: {error}" if name else str(error)) from error


def read(path: Path, kind: type[Typed], what: str, remedy: str) -> Typed:
    """The file ``path`` as an object of the dataclass ``kind``; ``what`` it must be, for messages.

    Raises UserError that names the file, the entry and the ``remedy``.
    """
    text = read_text(path, what, remedy)
    try:
        return typed(parse(text), kind)
    except JsonError as fault:
        raise UserError(f"{path} is no {what} ({one_line(fault)}): {remedy}") from fault


def _check_limits(text: str) -> None:
    """Raises JsonError for what would take parsing, or what comes after it, too far."""
    if len(text) > LARGEST:
        raise JsonError(f"it has more than {LARGEST // 2**20} MB")
    if found := _ODD_LETTER.search(text):
        _check_letters(text, found[0])
    outside = _STRING.sub("", text)
    if found := _LONG_INTEGER.search(outside):
        raise JsonError(f"a number with {found[0]}... has too many digits")
    depth = 0
    for bracket in _BRACKET.finditer(outside):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > DEEPEST:
            raise JsonError(f"it nests more than {DEEPEST} deep")


def _check_letters(text: str, found: str) -> None:
    try:
        letters = "".join(json.loads(one) for one in _STRING.findall(text))
        letters.encode()
    except ValueError as error:
        raise JsonError(f"a text has {found}, which is half a letter") from error
    if "\0" in letters:
        raise JsonError(f"a text has {found}")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise JsonError(f"{double[:100]!r} comes twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise JsonError(f"{text[:20]} is no finite number")
    return value


def _refuse_constant(text: str) -> float:
    raise JsonError(f"{text} is not a JSON number")
