"""What every command shows the user: help, one-line errors, progress, tables. Needs no torch, TensorRT or GPU.

A command consists of a dataclass of options, which extends ``Command``, and a ``main`` that takes it; ``run_command``
connects the two. A user's mistake (UserError) becomes one line and exit code 2. Progress is a bar on a terminal, and a
line every few seconds in a log.
"""

from __future__ import annotations

import errno
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import docstring_parser
import rich.console
import rich.progress
import rich.table
import tyro

from qat.base import streams
from qat.base.errors import UserError
from qat.base.exit_codes import BROKEN_OUTPUT, DONE, FAULT, INTERRUPTED, USER_ERROR
from qat.base.outputs import outputs_of
from qat.base.supervised import continue_in_child

SECONDS_BETWEEN_LOG_LINES = 5.0
LOG_WIDTH = 140
_WRAPPED = 30  # letters of a table's first column, of which more are wrapped

_terminal = sys.stdout is not None and sys.stdout.isatty()
console = rich.console.Console(width=None if _terminal else LOG_WIDTH, highlight=False)
_errors = rich.console.Console(stderr=True, highlight=False)
_speaker = ""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ABOUT_A_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ESTALE)

Options = TypeVar("Options", bound="Command")


@dataclass(frozen=True, kw_only=True)
class Command:
    """Options that every command has."""

    debug: bool = False
    """Show the full traceback of an error."""


def run_command(main: Callable[[Options], int | None], options: type[Options], *, supervised: bool = False) -> NoReturn:
    """Parses the command line into ``options``, runs ``main`` and exits with the code that it returns.

    Before ``main`` runs, its outputs are checked against its inputs and locked (qat/base/outputs.py). Ctrl-C, SIGTERM
    and SIGHUP raise KeyboardInterrupt. All exit codes are in qat/base/exit_codes.py.

    ``supervised``: in a child process, so that a crash of native code is one line; not with --debug.
    """
    streams.survive()
    streams.interrupt_on_signals()
    module = sys.modules[main.__module__]
    name = module.__spec__.name if module.__spec__ else None
    debug = "--debug" in sys.argv  # until the command line is parsed
    try:
        chosen = tyro.cli(
            _with_flowing_help(options),
            prog=f"python -m {name}" if name and module.__name__ == "__main__" else None,  # None: the console script's
            description=module.__doc__,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        debug = chosen.debug
        if supervised and not debug:
            continue_in_child(" ".join([name or "the command", *sys.argv[1:]]))
            streams.survive()
        with outputs_of(chosen):
            code: Any = main(chosen) or DONE
            streams.ignore_interrupts()
    except SystemExit as stop:  # of --help, of a command line that tyro does not understand, of a child
        code = stop.code or DONE
    except BaseException as error:
        # An interrupt within the import of a native library comes out as that library's ImportError.
        code, label, text = _meaning(KeyboardInterrupt() if streams.was_interrupted(error) else error)
        if debug:
            traceback.print_exception(error)
        else:
            _one_line(label, text)
    if streams.lost_output() and code == DONE:
        code = BROKEN_OUTPUT
    sys.exit(code)


def _meaning(error: BaseException) -> tuple[int, str, str]:
    """The exit code of an error that ends a command, and its line: what kind it is, and what it says."""
    if isinstance(error, UserError):  # of main, or of options that contradict each other
        return USER_ERROR, "error", str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted", str(error) or "no half-written file was left behind"
    if isinstance(error, MemoryError):
        known = f" ({error})" if str(error) else ""
        return USER_ERROR, "error", f"{' '.join(sys.argv)}: not enough memory{known}: give smaller files"
    first_line = (str(error).strip().splitlines() or [""])[0]
    no_folder = isinstance(error, FileNotFoundError) and tempfile.tempdir is None  # no temporary one was found
    if no_folder or (isinstance(error, OSError) and error.errno in _FULL):
        return USER_ERROR, "error", f"{first_line}: free some space, or name another folder for it in TMPDIR"
    if isinstance(error, OSError) and error.errno in _ABOUT_A_PATH and error.filename is not None:
        told = UserError(f"{error.strerror}: {error.filename}; give another path, or correct that one")
        return USER_ERROR, "error", str(told)
    return FAULT, "internal error", f"{type(error).__name__}: {first_line}; run again with --debug and report it"


def _with_flowing_help(options: type[Any]) -> type[Any]:
    """Makes each docstring of ``options`` one line, because tyro keeps the line breaks of indented text."""
    for base in options.__mro__[:-1]:
        hints = get_type_hints(base, include_extras=True)
        for inner in get_type_hints(base).values():
            if isinstance(inner, type) and is_dataclass(inner):
                _with_flowing_help(inner)
        for attribute in docstring_parser.parse_from_object(base).params:
            flowing = " ".join((attribute.description or "").split())
            base.__annotations__[attribute.arg_name] = Annotated[hints[attribute.arg_name], tyro.conf.arg(help=flowing)]
    return options


@contextmanager
def console_of_process(aloud: bool, name: str) -> Iterator[None]:
    """Inside this context, a process that is not ``aloud`` prints only errors, each preceded by its ``name``.

    An error that ends the process is printed after the context has closed, but still with the name.
    """
    global _speaker
    console.quiet, _speaker = not aloud, "" if aloud else f"{name}: "
    yield
    console.quiet, _speaker = False, ""


def say(text: str) -> None:
    """Prints a line. Rich markup is not interpreted, so names with brackets are printed as they are."""
    console.print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Prints a warning line on standard error."""
    if not console.quiet:
        _one_line("warning", text)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]], details: Sequence[str] = ()) -> None:
    """Prints a table; every column but the first is right-aligned.

    ``details``: columns that are left out where the terminal is too narrow for all, the first of them first.
    """
    heads = list(columns)
    cells = [[str(cell) for cell in row] for row in rows]
    shown, left_out = list(range(len(heads))), list[str]()
    for detail in details:
        if _least_width(heads, cells, shown) <= console.width:
            break
        shown.remove(heads.index(detail))
        left_out.append(detail)
    grid = rich.table.Table()
    for index in shown:
        first = index == 0
        grid.add_column(heads[index], justify="left" if first else "right", overflow="fold" if first else "ellipsis")
    for row in cells:
        grid.add_row(*(rich.markup.escape(row[index]) for index in shown))
    console.print(rich.markup.escape(title), style="bold")
    console.print(grid)
    if left_out:
        say(f"too narrow here for: {', '.join(left_out)}")


def _least_width(heads: Sequence[str], rows: Sequence[Sequence[str]], shown: Iterable[int]) -> int:
    """Letters that a table with the columns ``shown`` needs, if its heads and its first column are wrapped."""
    total = 1
    for index in shown:
        widest = max((len(row[index]) for row in rows), default=0)
        total += 3 + max(min(widest, _WRAPPED) if index == 0 else widest, *map(len, heads[index].split() or [""]))
    return total


class Task:
    """A piece of work with a known number of steps; see ``progress``."""

    def __init__(self, description: str, total: int, bar: rich.progress.Progress | None):
        self.description, self.total, self.done = description, total, 0
        self._bar = bar
        self._bar_task = bar.add_task(description, total=total, note="") if bar else None
        self._last_line = self._start = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Reports that ``steps`` more are done; ``note`` is shown beside the bar."""
        self.done += steps
        if self._bar is not None and self._bar_task is not None:
            self._bar.update(self._bar_task, completed=self.done, note=note)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LOG_LINES:
            self._last_line = time.monotonic()
            say(f"{self.description}: {self.done}/{self.total} {note}".rstrip())


@contextmanager
def progress(description: str, total: int) -> Iterator[Task]:
    """Shows progress of ``total`` steps while the block runs: a bar on a terminal, lines in a log."""
    if not console.is_terminal:
        yield Task(description, total, None)
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        yield Task(description, total, bar)


def _one_line(label: str, text: str) -> None:
    _errors.print(f"{_speaker}{label}: " + " ".join(text.split()), markup=False, soft_wrap=True)
