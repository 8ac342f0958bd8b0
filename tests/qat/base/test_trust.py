"""What a stranger's file may do: nothing that was not allowed; and what is known to be this user's own."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from qat.base import trust
from qat.base.artifact import Parent, Sidecar, TensorSpec, read_parent, read_sidecar, sidecar_path, write_artifact
from qat.base.errors import UserError
from qat.base.trust import NotTrustedError, is_known, permit, remember, seal_of

DIGEST, OTHER = "ab" * 32, "cd" * 32


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of hashes of a new user; nothing is remembered in the process."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(trust.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(trust, "_allowed", set())
    return tmp_path / "state" / "int8-qat-pipeline" / "trusted"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process would know nothing but the file."""
    monkeypatch.setattr(trust, "_allowed", set())


def at_terminal(monkeypatch: pytest.MonkeyPatch, answer: str) -> Terminal:
    said = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stderr", said)
    return said


def test_what_was_remembered_is_known_to_the_next_process(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(DIGEST)
    remember(DIGEST)
    forget(monkeypatch)
    assert is_known(DIGEST)
    assert not is_known(OTHER)
    assert not is_known("")
    assert not is_known(DIGEST[:32])
    assert state.read_text() == f"{DIGEST}\n"
    assert state.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o666, 0o620])
def test_a_file_that_others_can_write_is_not_believed(state: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(DIGEST)
    forget(monkeypatch)
    state.chmod(mode)
    assert not is_known(DIGEST)


def test_a_folder_that_others_can_write_and_a_link_are_not_believed(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(DIGEST)
    forget(monkeypatch)
    state.parent.chmod(0o777)
    assert not is_known(DIGEST)
    state.parent.chmod(0o700)
    state.rename(tmp_path / "elsewhere")
    state.symlink_to(tmp_path / "elsewhere")
    assert not is_known(DIGEST)


def test_without_a_home_hashes_are_kept_in_a_folder_of_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # which the standard says to ignore
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    remember(DIGEST)
    forget(monkeypatch)
    assert is_known(DIGEST)
    assert (tmp_path / f"int8-qat-pipeline-{os.getuid()}" / "trusted").exists()


def test_where_nothing_can_be_written_the_process_itself_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(trust.tempfile, "tempdir", str(tmp_path / "file"))
    remember(DIGEST)
    assert is_known(DIGEST)
    forget(monkeypatch)
    assert not is_known(DIGEST)


def test_a_script_is_refused_with_all_that_would_be_done(tmp_path: Path) -> None:
    with pytest.raises(NotTrustedError, match=r"a\.qat was not made by you .* wants to run f of x\.py.*--trust-code"):
        permit(tmp_path / "a.qat", DIGEST, "run f of x.py", trust_code=False)
    permit(tmp_path / "a.qat", DIGEST, "run f of x.py", trust_code=True)
    with pytest.raises(NotTrustedError):  # the flag counts for one run
        permit(tmp_path / "a.qat", DIGEST, "run f of x.py", trust_code=False)


def test_the_users_own_is_not_asked_but_only_for_what_the_user_gave(tmp_path: Path) -> None:
    remember(DIGEST)
    permit(tmp_path / "a.qat", DIGEST, "run f of x.py", trust_code=False)
    with pytest.raises(NotTrustedError):
        permit(tmp_path / "a.qat", DIGEST, "run f of x.py", trust_code=False, own=False)


@pytest.mark.parametrize(
    ("answer", "allowed"), [("yes\n", True), ("Y\n", True), ("no\n", False), ("\n", False), ("", False)]
)
def test_a_terminal_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, allowed: bool) -> None:
    said = at_terminal(monkeypatch, answer)
    given: Any = {"artifact": tmp_path / "a.qat", "seal": DIGEST, "trust_code": False}
    if not allowed:
        with pytest.raises(NotTrustedError):
            permit(**given, wants="run f of x\x1b[2J.py")
    else:
        permit(**given, wants="run f of x\x1b[2J.py")
        monkeypatch.setattr(sys, "stdin", io.StringIO())  # a script, later
        forget(monkeypatch)
        permit(**given, wants="run f of x\x1b[2J.py")
        with pytest.raises(NotTrustedError):
            permit(**given, wants="run f of another.py")
    assert (
        f"{tmp_path / 'a.qat'} was not made by you on this machine. It wants to run f of x?[2J.py." in said.getvalue()
    )


def test_the_mode_for_untrusted_files_asks_nobody_and_allows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(DIGEST)
    said = at_terminal(monkeypatch, "yes\n")
    monkeypatch.setenv("INT8_QAT_UNTRUSTED", "1")
    with pytest.raises(NotTrustedError, match="refused, because INT8_QAT_UNTRUSTED is set"):
        permit(tmp_path / "a.qat", DIGEST, "run f of x.py", trust_code=True)
    assert said.getvalue() == ""


# --- sidecars


def written(path: Path, sidecar: Sidecar) -> Sidecar:
    return write_artifact(path, sidecar, lambda file: file.write_bytes(path.name.encode()))


def test_what_was_written_here_is_own_until_it_is_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.onnx"
    made = written(path, Sidecar("onnx", inputs=(TensorSpec("x", (-1, 3), "float32"),), figures={"bytes": 3}))
    forget(monkeypatch)
    assert made.own
    assert read_sidecar(path, "onnx") == made
    assert capsys.readouterr().err == ""
    content = json.loads(sidecar_path(path).read_text())
    assert content["sidecar_sha256"] == seal_of(content) == made.sidecar_sha256
    sidecar_path(path).write_text(json.dumps(content, indent=4))  # the same in another layout
    assert read_sidecar(path, "onnx").own
    content["figures"]["bytes"] = 4
    sidecar_path(path).write_text(json.dumps(content))
    for _ in range(2):
        assert not read_sidecar(path, "onnx").own
    assert " ".join(capsys.readouterr().err.split()).count("was changed since it was written") == 1  # said once
    del content["sidecar_sha256"]  # as older versions wrote it
    sidecar_path(path).write_text(json.dumps(content))
    assert not read_sidecar(path, "onnx").own
    assert capsys.readouterr().err == ""


def test_a_strangers_parent_is_sought_in_its_own_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tmp_path / "elsewhere" / "a.onnx"
    digest = written(parent, Sidecar("onnx")).sha256
    child = tmp_path / "here" / "a.engine"
    made = written(child, Sidecar("onnx", Parent.from_file(child, parent, digest)))
    assert read_parent(child, made, "onnx")[0] == child.parent / "../elsewhere/a.onnx"
    monkeypatch.setattr(trust, "is_known", lambda digest: False)
    monkeypatch.setattr("qat.base.artifact.is_known", lambda digest: False)
    with pytest.raises(UserError, match=r"no file .*here/a\.onnx, and .* was not made by you.*: put a\.onnx beside it"):
        read_parent(child, made, "onnx")
    for file in (parent, sidecar_path(parent)):
        file.rename(child.parent / file.name)
    assert read_parent(child, made, "onnx")[0] == child.parent / "a.onnx"
