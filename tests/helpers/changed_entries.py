"""Every entry of a JSON value, in turn left out or given another value."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

OTHERS: tuple[Any, ...] = (None, True, -1, 0, 10**17, 1.5, 1e300, "", "x", "a/b", [], [None], {}, {"x": None})
_GONE = object()


def changed_entries(content: Any, *, every: bool) -> Iterator[tuple[str, Any]]:
    """(what was done, the mutated value). Without ``every``, each entry gets one of the changes, in turn."""
    changes = [_GONE, *OTHERS]
    for number, way in enumerate(_ways(content)):
        chosen = changes if every else (changes[number % len(changes)],)
        for change in chosen:
            changed = copy.deepcopy(content)
            inside = changed
            for step in way[:-1]:
                inside = inside[step]
            if change is _GONE:
                del inside[way[-1]]
            else:
                inside[way[-1]] = copy.deepcopy(change)
            yield f"{'.'.join(map(str, way))} -> {'left out' if change is _GONE else repr(change)}", changed


def _ways(content: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each entry; of a list, to its first two."""
    if way:
        yield way
    entries = (
        content.items() if isinstance(content, dict) else enumerate(content[:2] if isinstance(content, list) else ())
    )
    for key, value in entries:
        yield from _ways(value, (*way, key))
