"""Who may have code run, folders read and networks reached by what a file says: docs/trust.md is the page about it.

A sidecar is data that anybody can write. What it names (a model's code, images, arguments that load files) is used
without a question only if this user's own commands wrote that sidecar on this machine. Of all others it is asked on a
terminal and refused in a script, unless the caller gave ``--trust-code`` (``trust_code=True``). With INT8_QAT_UNTRUSTED
set nothing is asked and nothing is allowed, not even to the user's own files.

What is the user's own is known by SHA-256: each sidecar that is written is remembered in a file of the user's state
folder, one hash a line. A hash is only believed from a file that nobody else can write. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qat.base.errors import UserError

UNTRUSTED = "INT8_QAT_UNTRUSTED"
SEAL = "sidecar_sha256"
_FOLDER, _FILE = "int8-qat-pipeline", "trusted"
_allowed: set[str] = set()  # in this process, where nothing can be stored


class NotTrustedError(UserError):
    """A file wants what its user has not allowed: code, a folder, a download."""


def untrusted_mode() -> bool:
    """Whether the environment says that no file is trusted."""
    return os.environ.get(UNTRUSTED, "") not in ("", "0")


def seal_of(content: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of all that a sidecar says, apart from this hash itself.

    It tells changed sidecars from those as they were written. It proves no origin: who changes a sidecar can write the
    new hash into it too.
    """
    rest = {key: value for key, value in content.items() if key != SEAL}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def remember(digest: str) -> None:
    """Notes that this user made, or allowed, what has this hash. Where nothing can be stored, for this process only."""
    if is_known(digest):
        return
    _allowed.add(digest)
    for folder in _state_folders():
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _only_ours(folder):
                continue
            # One short write at the end of a file: processes that write at the same time do not mix their lines.
            handle = os.open(folder / _FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                os.write(handle, f"{digest}\n".encode())
            finally:
                os.close(handle)
            return


def is_known(digest: str) -> bool:
    """Whether ``remember`` has noted this hash."""
    if digest in _allowed:
        return True
    for folder in _state_folders():
        path = folder / _FILE
        with suppress(OSError):
            if (
                _only_ours(folder)
                and _only_ours(path)
                and digest in path.read_bytes().decode("ascii", "replace").split()
            ):
                return True
    return False


def permit(
    artifact: Path,
    seal: str,
    wants: str,
    *,
    trust_code: bool,
    own: bool = True,
    remedy: str = "--trust-code (trust_code=True)",
) -> None:
    """Returns if what the sidecar of ``artifact`` names may be used, which is asked on a terminal.

    Args:
        artifact: the file whose sidecar names it.
        seal: ``seal_of`` of that sidecar.
        wants: what would be run, read or reached, with hashes: "run code of PATH (SHA-256 ...)". An answer counts for
            exactly this.
        trust_code: the caller has allowed it.
        own: whether it is what the user gave, if the sidecar is the user's own.
        remedy: what allows it.

    Raises NotTrustedError, which names all of it, when it is not allowed.
    """
    wants = "".join(letter if letter.isprintable() else "?" for letter in wants)  # a name may move the cursor
    if untrusted_mode():
        raise NotTrustedError(f"{artifact} wants to {wants}: refused, because {UNTRUSTED} is set")
    if trust_code or (own and is_known(seal)):
        return
    answer = hashlib.sha256(f"{seal}\0{wants}".encode()).hexdigest()
    if is_known(answer):
        return
    if _terminal() and _ask(f"{artifact} was not made by you on this machine. It wants to {wants}."):
        remember(answer)
        return
    raise NotTrustedError(
        f"{artifact} was not made by you on this machine, and wants to {wants}: if you trust who made it, allow that "
        f"with {remedy}"
    )


def _terminal() -> bool:
    return all(stream is not None and not stream.closed and stream.isatty() for stream in (sys.stdin, sys.stderr))


def _ask(question: str) -> bool:
    print(f"{question}\nAllow it, and remember that? [yes/no] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _state_folders() -> Iterator[Path]:
    """Where hashes are kept: the first one that can be written. Without a home it is a folder of this user in /tmp."""
    stated = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(stated):
        yield Path(stated) / _FOLDER
    else:
        with suppress(RuntimeError, OSError):
            yield Path.home() / ".local" / "state" / _FOLDER
    yield Path(tempfile.gettempdir()) / f"{_FOLDER}-{os.getuid()}"


def _only_ours(path: Path) -> bool:
    """Whether it is this user's, is no link, and nobody else can write it."""
    found = path.lstat()
    return not stat.S_ISLNK(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
