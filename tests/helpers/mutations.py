"""Spoils small files: bytes of any, values of JSON, fields of ONNX, as hypothesis draws and shrinks it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import onnx
from google.protobuf.message import Message
from hypothesis import strategies as st

Mutation = Callable[[bytes], bytes]
"""Spoils the content of a file."""

_PLACES = st.floats(0, 1, exclude_max=True)  # as a share of the file
_CHUNKS = st.binary(max_size=8) | st.sampled_from(
    [b"\x00" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x80" * 10, b"9" * 5000, b"[" * 5000, b"nan", b"-1", b"1e999"]
)
_NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 1e308, float("nan"), float("inf"))
_TEXTS = ("", "x", "\x00", "../../x", "{{x}}", "a" * 3000)
_NASTY: Sequence[Any] = (None, True, *_NUMBERS, *_TEXTS, [], [[]], {}, {"a": 1}, [1, "a", None], [2**40] * 8)


def of_bytes() -> st.SearchStrategy[Mutation]:
    """One to four changes of bytes: written over, put in, cut out, doubled, cut off."""
    return st.lists(st.tuples(st.sampled_from("oidtc"), _PLACES, _PLACES, _CHUNKS), min_size=1, max_size=4).map(
        lambda changes: lambda content: _changed_bytes(content, changes)
    )


def of_json() -> st.SearchStrategy[Mutation]:
    """One to three values of a JSON file, anywhere in its tree, replaced, left out, or given twice."""
    change = st.tuples(
        _PLACES, st.sampled_from(["replace", "replace", "remove", "double", "bury"]), st.sampled_from(_NASTY)
    )
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: lambda content: _changed_json(content, changes))


def of_onnx() -> st.SearchStrategy[Mutation]:
    """One to three fields of an ONNX file, anywhere in its messages, cleared, doubled or set to something else."""
    change = st.tuples(
        _PLACES, st.sampled_from(["clear", "double", "set", "set"]), st.integers(-2, 40) | st.just(2**40), _PLACES
    )
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: lambda content: _changed_onnx(content, changes))


def _changed_bytes(content: bytes, changes: Sequence[tuple[str, float, float, bytes]]) -> bytes:
    for kind, place, other, chunk in changes:
        start, end = int(place * len(content)), int(other * len(content))
        low, high = min(start, end), max(start, end)
        content = {
            "o": content[:start] + chunk + content[start + len(chunk) :],
            "i": content[:start] + chunk + content[start:],
            "d": content[:low] + content[high:],
            "t": content[:high] + content[low:],
            "c": content[:start],
        }[kind]
    return content


def _changed_json(content: bytes, changes: Sequence[tuple[float, str, Any]]) -> bytes:
    tree = [json.loads(content)]  # a list, so that the root too has a holder
    for place, kind, value in changes:
        holders = list(_holders(tree))
        holder, key = holders[int(place * len(holders))]
        if kind == "replace":
            holder[key] = copy.deepcopy(value)
        elif kind == "bury":
            for _ in range(60):
                holder[key] = [holder[key]]
        elif kind == "double" and isinstance(holder, list):
            holder.append(holder[key])
        elif holder is not tree:
            del holder[key]
    return json.dumps(tree[0]).encode()


def _holders(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _holders(value[key])


def _changed_onnx(content: bytes, changes: Sequence[tuple[float, str, int, float]]) -> bytes:
    model = onnx.load_from_string(content)
    for place, kind, number, other in changes:
        fields = list(_fields(model))
        if not fields:
            break
        message, field = fields[int(place * len(fields))]
        with suppress(ValueError):  # a number that the field's type does not have
            _change_field(model, message, field.name, kind, number, other)
    return bytes(model.SerializeToString())


def _change_field(model: onnx.ModelProto, message: Any, name: str, kind: str, number: int, place: float) -> None:
    value = getattr(message, name)
    if kind == "clear":
        message.ClearField(name)
    elif isinstance(value, Message):
        value.Clear()
    elif not hasattr(value, "extend"):
        setattr(message, name, _other_value(model, value, number, place))
    elif kind == "double":
        value.extend([value[int(place * len(value))]])
    elif isinstance(value[0], Message):
        del value[int(place * len(value))]
    else:
        value[int(place * len(value))] = _other_value(model, value[0], number, place)


def _fields(message: Any) -> Iterator[tuple[Any, Any]]:
    """Every field that is set, with the message that has it."""
    for field, value in message.ListFields():
        yield message, field
        for one in value if hasattr(value, "extend") else [value]:
            if isinstance(one, Message):
                yield from _fields(one)


def _other_value(model: onnx.ModelProto, value: Any, number: int, place: float) -> Any:
    if isinstance(value, float):
        return (float("nan"), float("inf"), -1.0, 0.0, 1e30)[number % 5]
    if isinstance(value, int):
        return min(number, 2**31 - 1) if abs(value) < 2**31 else number
    words = [node.op_type for node in model.graph.node] + [name for node in model.graph.node for name in node.output]
    word = [*words, "", "x" * 300, "Loop", "ai.onnx.ml"][int(place * (len(words) + 4))]
    return word.encode() if isinstance(value, bytes) else word
