"""Whether the work that an ONNX file asks for is bounded by its size, before any parser sees it.

A file of 3 kB can ask for a thousand million nodes (functions that call functions), for a terabyte (tensors that
declare extents and hold no data), for files anywhere (external data), or for a crash (a node without outputs). What is
read here are lengths, names and counts: no tensor is copied. Standard library only: deploy/ reads ONNX files without
the package onnx.

The numbers of fields are those of onnx.proto, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qat.base.errors import UserError
from qat.base.onnx_file import flaw

MOST_NODES = 10_000
"""Nodes of a network once its functions are inlined. A build takes more than twice as long for twice as many: 47 s for
5,000 tiny ones in TensorRT-RTX, which was seen to crash there too."""
DEEPEST_GRAPH = 30  # protobuf's own parsers stop at 100 messages within each other, which are three for each graph
DEEPEST_CALL = 50
MOST_FIELDS = 3_000_000
"""Fields of the whole file: names, attributes, extents. A node has about 15."""
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16}
_BITS |= {**dict.fromkeys((17, 18, 19, 20, 24), 8), **dict.fromkeys((21, 22, 23), 4), **dict.fromkeys((25, 26), 2)}
_EXTERNAL = 1  # a data_location
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types
_ENDS_LATER = bytes(range(128, 256))  # bytes of a number that goes on

Span = tuple[int, int]
FunctionName = tuple[str, str, str]  # domain, name, overload


class _DamagedError(ValueError):
    """Not the structure of an ONNX file; the words go behind the file's name."""


@dataclass
class _Body:
    """The nodes of a graph or of a function, those of its inner graphs included: how many, and what they call."""

    nodes: int = 0
    calls: Counter[FunctionName] = field(default_factory=Counter)


def check_structure(path: Path) -> None:
    """Raises UserError, naming the file, when no parser should see it.

    That is: it is damaged; a node has no operator or no output; graphs lie more than ``DEEPEST_GRAPH`` deep within each
    other; it has more than ``MOST_NODES`` nodes with its functions inlined; functions call themselves; a tensor holds
    other data than its extents say; external data are not whole in a file of the model's folder.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not a regular file: give the name of an ONNX file")
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise UserError(f"{path} is empty: get it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                _Structure(path, content).check()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except _DamagedError as error:
        raise UserError(f"{path} {flaw(path) or error}: get it again") from error


class _Structure:
    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content = path, content
        self._functions: dict[FunctionName, _Body] = {}
        self._expanded: dict[FunctionName, int] = {}
        self._files: dict[str, Path] = {}
        self._fields_read = 0

    def check(self) -> None:
        main = _Body()
        for number, value in self._fields((0, len(self._content))):
            if number == 7:
                self._graph(_span(value), main, 1)
            elif number == 25:
                self._function(_span(value))
        nodes = main.nodes + sum(count * self._nodes_of(name, 1) for name, count in main.calls.items())
        if nodes > MOST_NODES:
            functions = " once its functions are inlined" if nodes > main.nodes else ""
            raise UserError(
                f"{self._path} has {nodes:,} nodes{functions}, of which {MOST_NODES:,} are read: export it with fewer"
            )

    def _nodes_of(self, name: FunctionName, depth: int) -> int:
        """How many nodes a call of a function becomes. A name without a function is an operator, which is counted."""
        if name not in self._functions:
            return 0
        if depth > DEEPEST_CALL:
            raise UserError(
                f"{self._path} has functions that call each other more than {DEEPEST_CALL} deep, at {name[1]}: export "
                "it without functions"
            )
        if name not in self._expanded:
            body = self._functions[name]
            inside = sum(count * self._nodes_of(one, depth + 1) for one, count in body.calls.items())
            self._expanded[name] = body.nodes + inside
        return self._expanded[name]

    # --- graphs

    def _graph(self, span: Span, body: _Body, depth: int) -> None:
        if depth > DEEPEST_GRAPH:
            raise UserError(
                f"{self._path} has graphs that lie more than {DEEPEST_GRAPH} deep within each other: export it without "
                "control flow"
            )
        for number, value in self._fields(span):
            if number == 1:
                self._node(_span(value), body, depth)
            elif number == 5:
                self._tensor(_span(value))
            elif number == 15:
                raise UserError(f"{self._path} has sparse initializers, which are not read: store them densely")

    def _function(self, span: Span) -> None:
        body, name, domain, overload = _Body(), "", "", ""
        for number, value in self._fields(span):
            if number == 1:
                name = self._text(value)
            elif number == 7:
                self._node(_span(value), body, 1)
            elif number == 10:
                domain = self._text(value)
            elif number == 11:
                self._attribute(_span(value), body, 1)
            elif number == 13:
                overload = self._text(value)
        self._functions[_function_name(domain, name, overload)] = body

    def _node(self, span: Span, body: _Body, depth: int) -> None:
        texts = {3: "", 4: "", 7: "", 8: ""}  # name, operator, domain, overload
        outputs = False
        for number, value in self._fields(span):
            if number in texts:
                texts[number] = self._text(value)
            elif number == 2:
                start, end = _span(value)
                outputs = outputs or end > start
            elif number == 5:
                self._attribute(_span(value), body, depth)
        name, operator, domain, overload = texts.values()
        which = f"{operator} node {name!r}" if name else f"node {body.nodes} ({operator or 'unnamed'})"
        if not operator:
            raise UserError(f"{self._path} is inconsistent: {which} has no operator: export it again")
        if not outputs:
            raise UserError(f"{self._path} is inconsistent: {which} has no output: remove it, or export it again")
        body.nodes += 1
        body.calls[_function_name(domain, operator, overload)] += 1

    def _attribute(self, span: Span, body: _Body, depth: int) -> None:
        for number, value in self._fields(span):
            if number in (6, 11):
                self._graph(_span(value), body, depth + 1)
            elif number in (5, 10):
                self._tensor(_span(value))
            elif number in (22, 23):
                raise UserError(f"{self._path} has sparse constants, which are not read: store them densely")

    # --- tensors

    def _tensor(self, span: Span) -> None:
        extents: list[int] = []
        kind, held, name, external, outside = 0, 0, "", dict[str, str](), False
        for number, value in self._fields(span):
            if number == 1:
                extents += [value] if isinstance(value, int) else self._varints(value)
            elif number == 2:
                kind = value if isinstance(value, int) else 0
            elif number in (4, 5, 7, 10, 11):  # numbers by type
                held += self._count(number, value)
            elif number == 6:
                held += 1
            elif number == 8:
                name = self._text(value)
            elif number == 9:
                start, end = _span(value)
                held += (end - start) * 8 // _BITS.get(kind, 8)
            elif number == 13:
                external |= self._entry(_span(value))
            elif number == 14:
                outside = value == _EXTERNAL
        extents = [extent - (1 << 64) if extent >> 63 else extent for extent in extents]
        if any(extent < 0 for extent in extents):
            raise UserError(f"{self._path} is inconsistent: tensor {name!r} has extents {extents}: export it again")
        if outside:
            self._external(name, math.prod(extents), kind, external)
            return
        wanted = math.prod(extents)
        # Numbers in other fields than raw_data may hold two codes of 4 bits, or four of 2; complex numbers take two.
        packed = 8 // _BITS.get(kind, 8) if kind in (21, 22, 23, 25, 26) else 1
        if wanted > held * packed:
            raise UserError(
                f"{self._path} is inconsistent: initializer {name} declares {extents}, {wanted:,} values, and holds "
                f"{held:,}: get it again"
            )

    def _count(self, number: int, value: int | Span) -> int:
        """How many values a field of numbers holds, packed or a single one."""
        if isinstance(value, int):
            return 1
        start, end = value
        if number in (4, 10):  # float, double
            return (end - start) // (4 if number == 4 else 8)
        return len(self._content[start:end].translate(None, _ENDS_LATER))

    def _external(self, name: str, elements: int, kind: int, entries: dict[str, str]) -> None:
        location = entries.get("location", "")
        file = self._files.get(location) or self._data_file(name, location)
        self._files[location] = file
        try:
            start, length = (int(entries[key]) if key in entries else None for key in ("offset", "length"))
        except ValueError:
            raise UserError(
                f"{self._path} is inconsistent: {name} has no numbers for where it lies: get it again"
            ) from None
        size = (elements * _BITS[kind] + 7) // 8 if kind in _BITS else length or 0
        if length is not None and length != size:
            raise UserError(f"{self._path} keeps {name} in {length} bytes of {file}, and it has {size}: get it again")
        start, there = start or 0, file.stat().st_size
        if start < 0 or start + size > there:
            raise UserError(
                f"{self._path} keeps {name} in bytes {start} to {start + size} of {file}, which is too short: it has "
                f"{there}; get it again"
            )

    def _data_file(self, name: str, location: str) -> Path:
        """The file of external data: inside of the model's folder, links followed, whatever a parser would take."""
        file = self._path.parent / location
        if not location or Path(location).is_absolute() or os.path.normpath(location).startswith(".."):
            raise UserError(
                f"{self._path} keeps {name} in {location}, which is not a path inside the model's folder: save it "
                "again with external data beside the model"
            )
        if not file.exists():
            raise UserError(f"{self._path} keeps weights in {file}, which is missing: put it beside the model")
        if not file.resolve().is_relative_to(self._path.parent.resolve()):
            raise UserError(
                f"{self._path} keeps {name} in {file}, a link to {file.resolve()} outside of the model's folder: copy "
                "that file there"
            )
        if not file.is_file():
            raise UserError(f"{self._path} keeps {name} in {file}, which is not a regular file: get it again")
        return file

    def _entry(self, span: Span) -> dict[str, str]:
        texts = {number: self._text(value) for number, value in self._fields(span)}
        return {texts.get(1, ""): texts.get(2, "")}

    # --- the wire

    def _fields(self, span: Span) -> Iterator[tuple[int, int | Span]]:
        """The fields of a message: the number of each, and its number, or where its bytes lie."""
        place, end = span
        while place < end:
            tag, place = self._varint(place, end)
            wire = tag & 7
            self._fields_read += 1
            if not tag >> 3:
                raise _DamagedError(f"is damaged: no field begins at byte {place}")
            if self._fields_read > MOST_FIELDS:
                raise UserError(f"{self._path} has more than {MOST_FIELDS:,} fields: export it with fewer nodes")
            if wire == _VARINT:
                value, place = self._varint(place, end)
                yield tag >> 3, value
                continue
            if wire == _BYTES:
                length, place = self._varint(place, end)
            elif wire in (_FIXED32, _FIXED64):
                length = 4 if wire == _FIXED32 else 8
            else:
                raise _DamagedError(f"is damaged: no field begins at byte {place}")
            if place + length > end:
                raise _DamagedError(f"is damaged: the field at byte {place} is longer than what it lies in")
            if wire == _BYTES:
                yield tag >> 3, (place, place + length)
            elif tag >> 3 in (4, 10):  # a single value of float_data or double_data
                yield tag >> 3, 1
            place += length

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while place < end and shift < 70:
            byte = self._content[place]
            value |= (byte & 0x7F) << shift
            place, shift = place + 1, shift + 7
            if byte < 0x80:
                return value & ((1 << 64) - 1), place
        raise _DamagedError(f"is damaged: the number at byte {place} has no end")

    def _varints(self, span: Span) -> list[int]:
        place, end = span
        found = []
        while place < end:
            value, place = self._varint(place, end)
            found.append(value)
        return found

    def _text(self, value: int | Span) -> str:
        start, end = _span(value)
        return self._content[start:end].decode(errors="replace")


def _span(value: int | Span) -> Span:
    if isinstance(value, int):
        raise _DamagedError("is damaged: a number stands where a message should")
    return value


def _function_name(domain: str, name: str, overload: str) -> FunctionName:
    return ("" if domain == "ai.onnx" else domain, name, overload)
