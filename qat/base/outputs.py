"""No output of a command destroys an input, nor what is no ordinary file; and no two runs write the same output.

Each option that names a file carries one of two marks in its type, ``Annotated[Path, READS]`` or ``Annotated[Path |
None, Writes(...)]``, so one function can check every command. Two names are the same file if they lead to the same
path or to the same inode. What belongs to an input (sidecar, external data, the files it was made from) counts as one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from qat.base.errors import UserError
from qat.base.input_files import Key, files_read_with, is_read_from, keys_of, mentions, paths_named
from qat.base.lock import HeldError, locked, remove_leftovers
from qat.base.streams import is_stdout, keep_stdout_for_data
from qat.base.this_program import this_command
from qat.base.writing import disk_errors, replaceable

_PATIENCE_S = 2.0  # for a run that was killed a moment ago


@dataclass(frozen=True)
class Reads:
    """Marks an option that names what is read: files, folders, or texts with a path in them.

    ``scanned``: of a folder all images are read. ``default``: what is read where the option is not given.
    """

    scanned: bool = False
    default: Callable[[Any], Path | None] = lambda options: None


@dataclass(frozen=True)
class Writes:
    """Marks an option that names what is written. The functions take all options of the command.

    Attributes:
        default: what is written where the option is not given.
        beside: the files that are written with it.
        when: whether it is written at all.
        text: whether it can be the standard output.
        folder: whether it is a folder.
        locked: whether only one run at a time may write it.
    """

    default: Callable[[Any], Path | None] = lambda options: None
    beside: Callable[[Path, Any], Iterable[Path]] = lambda path, options: ()
    when: Callable[[Any], bool] = lambda options: True
    text: bool = False
    folder: bool = False
    locked: Callable[[Path], bool] = lambda path: True


READS, READS_IMAGES, WRITES_TEXT = Reads(), Reads(scanned=True), Writes(text=True)


@dataclass(frozen=True)
class _Output:
    name: str
    path: Path
    mark: Writes
    given: bool
    beside: tuple[Path, ...]


@contextmanager
def outputs_of(options: Any) -> Iterator[None]:
    """Checks the outputs of a command, and keeps other runs from writing them while the block runs.

    Raises UserError when an output would overwrite an input or another output, is no ordinary file, or is written by
    another run. What dead runs left half-written is removed.
    """
    outputs = _check(options)
    with ExitStack() as stack:
        for output in outputs:
            if not is_stdout(output.path) and output.mark.locked(output.path) and os.environ.get("RANK", "0") == "0":
                _lock(stack, output)
        if any(is_stdout(output.path) for output in outputs):
            keep_stdout_for_data()
        yield


def check_apart(outputs: Iterable[tuple[str, Path]], inputs: Iterable[tuple[str, Path]]) -> None:
    """Raises UserError when a file to be written, by its name in messages, is one that is read or another output."""
    taken: dict[Key, str] = {}
    for name, path in inputs:
        taken |= {key: f"{name} {path}".strip() for key in reversed(keys_of(path))}
    for name, path in outputs:
        for key in keys_of(path):
            if key in taken:
                raise UserError(f"{name} {path} would overwrite {taken[key]}: give another name".strip())
        taken |= dict.fromkeys(keys_of(path), f"another output, {name}".rstrip(", "))


def marked_fields(options: type[Any]) -> Iterator[tuple[tuple[str, ...], Any, tuple[Reads | Writes, ...]]]:
    """The fields of a dataclass of options, inner ones too: the names that lead to each, its type, its marks."""
    hints, plain = get_type_hints(options, include_extras=True), get_type_hints(options)
    for field in dataclasses.fields(options):
        if isinstance(plain[field.name], type) and is_dataclass(plain[field.name]):
            for way, kind, marks in marked_fields(plain[field.name]):
                yield (field.name, *way), kind, marks
            continue
        given = getattr(hints[field.name], "__metadata__", ())
        yield (field.name,), plain[field.name], tuple(mark for mark in given if isinstance(mark, (Reads, Writes)))


def _named(options: Any) -> tuple[list[_Output], list[tuple[Path, Reads]]]:
    """The outputs of a command, and the paths that its options say are read."""
    outputs, read = list[_Output](), list[tuple[Path, Reads]]()
    for way, _, marks in marked_fields(type(options)):
        value = options
        for name in way:
            value = getattr(value, name)
        option = "--" + way[-1].replace("_", "-")
        for mark in marks:
            named = mark.default(options) if value is None else value
            if isinstance(mark, Reads):
                read += [(path, mark) for path in paths_named(named)]
            elif named is not None and mark.when(options):
                outputs.append(_Output(option, named, mark, value is not None, tuple(mark.beside(named, options))))
    return outputs, read


def _check(options: Any) -> list[_Output]:
    outputs, read = _named(options)
    streams = [output for output in outputs if is_stdout(output.path)]
    for output in streams:
        if not output.mark.text:
            raise UserError(f"{output.name} {output.path}: this cannot go to the standard output: name a file")
    if len(streams) > 1:
        names = " and ".join(output.name for output in streams)
        raise UserError(f"only one output can be the standard output, not {names}: name a file")
    outputs_in_files = [output for output in outputs if output not in streams]
    for output in outputs_in_files:
        with disk_errors(output.path):
            _check_place(output)
    inputs = [("the input", file) for path, _ in read for file in files_read_with(path)]
    written = [(one.name, path) for one in outputs_in_files for path in (one.path, *one.beside)]
    check_apart(written, inputs)
    for name, path in written:
        for given, mark in read:
            if mark.scanned and is_read_from(path, given):
                raise UserError(f"{name} {path} would become a part of the input {given}: give another folder or name")
        for _, file in inputs:
            if mentions(file, path):
                raise UserError(f"{name} {path} would overwrite data of the input {file}: give another name")
    return outputs


def _check_place(output: _Output) -> None:
    """Raises UserError when something is there that the output cannot replace."""
    if output.mark.folder:
        if output.path.exists() and not output.path.is_dir():
            raise UserError(f"{output.name} {output.path} is not a folder: give another name")
        return
    if output.path.is_symlink() and output.beside:
        raise UserError(
            f"{output.name} {output.path} is a symbolic link, and what is written beside it would not lie beside the "
            f"file that it leads to: give {os.path.realpath(output.path)}, or remove the link"
        )
    # A link that the user has not named, in a folder of a stranger, would lead anywhere.
    for path in (*output.beside, *(() if output.given else (output.path,))):
        if path.is_symlink():
            raise UserError(
                f"{path}, which would be written, is a symbolic link to {os.path.realpath(path)}: remove the link, or "
                f"give {output.name} another name"
            )
    for path in (output.path, *output.beside):
        with disk_errors(path):
            replaceable(path)


def _lock(stack: ExitStack, output: _Output) -> None:
    path = output.path
    with disk_errors(path):
        if output.given:
            Path(os.path.realpath(path)).parent.mkdir(parents=True, exist_ok=True)
        elif not path.parent.is_dir():
            return  # the input that it is named after is missing, which the command says
        try:
            stack.enter_context(locked(path, " ".join(this_command()), _PATIENCE_S))
        except HeldError as error:
            raise UserError(
                f"{output.name} {path} is being written by {error}; wait for it, or give another {output.name}"
            ) from None
    for written in (path, *output.beside):
        remove_leftovers(written)
