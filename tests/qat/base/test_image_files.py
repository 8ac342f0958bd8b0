"""Finding image files in folders, and their sizes; what reading makes of one is in tests/qat/data/test_images.py."""

from __future__ import annotations

import os
import struct
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from qat.base.errors import UserError
from qat.base.image_files import (
    IMAGE_EXTENSIONS,
    _PixelBudget,
    all_image_files,
    image_files,
    image_size,
    is_image,
    read_image,
    upright_size,
)


def made(path: Path, *, width: int = 6, height: int = 4) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)
    return str(path)


def test_images_are_found_in_subfolders_and_links_and_sorted(tmp_path: Path) -> None:
    inner = [made(tmp_path / "a" / name) for name in ("z.PNG", "b/c.jpeg", "b.png")]
    elsewhere = made(tmp_path / "elsewhere" / "x.bmp")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "y.png").symlink_to(elsewhere)
    made(tmp_path / "a" / ".hidden.png")
    made(tmp_path / "elsewhere" / "w.bmp")
    files, notes = all_image_files(tmp_path / "a")
    assert files == sorted([*inner, str(tmp_path / "a" / "link" / "w.bmp"), str(tmp_path / "a" / "y.png")])
    assert notes == ("left out, because they are there already: links to 1 images",)


def test_what_is_no_image_is_counted_by_extension(tmp_path: Path) -> None:
    made(tmp_path / "a.png")
    for name in ("1.txt", "2.TXT", "3.csv", "4.json", "5.xml", "6.npy", "README", ".DS_Store"):
        (tmp_path / name).write_text("")
    files, (note,) = all_image_files(tmp_path)
    assert len(files) == 1
    assert note.startswith("left out: 7 files")
    assert "2 .txt" in note
    assert note.endswith("...)")
    others: Counter[str] = Counter()
    image_files(tmp_path, others)
    assert others == {".txt": 2, ".csv": 1, ".json": 1, ".xml": 1, ".npy": 1, "no extension": 1}


def test_a_folder_without_images_says_what_it_has_and_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_text("")
    with pytest.raises(UserError) as caught:
        all_image_files(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} has no image")
    assert "1 .raw" in message
    assert ".png" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.png", True), ("A.JPG", True), ("a.b.webp", True), ("png", False), (".png", False), ("a.png.txt", False)],
)
def test_images_are_known_by_their_extension(name: str, expected: bool) -> None:
    assert is_image(name) is expected
    assert {".png", ".jpg", ".jpeg", ".bmp"} <= set(IMAGE_EXTENSIONS)


def test_the_size_is_read_from_the_head_of_a_file(tmp_path: Path) -> None:
    path = Path(made(tmp_path / "a.png", width=300, height=40))
    assert image_size(str(path)) == (300, 40)
    assert read_image(str(path)).shape == (40, 300, 3)
    path.write_bytes(path.read_bytes()[:60])
    assert image_size(str(path)) == (300, 40)
    with pytest.raises(UserError, match=r"a\.png is corrupt"):
        read_image(str(path))
    path.write_bytes(b"")
    for read in (image_size, read_image):
        with pytest.raises(UserError, match=r"a\.png is corrupt"):
            read(str(path))
        with pytest.raises(UserError, match=r"cannot read .*none\.png: No such file"):
            read(str(tmp_path / "none.png"))


def test_links_that_lead_back_are_not_followed(tmp_path: Path) -> None:
    images = [made(tmp_path / "set" / name) for name in ("a/1.png", "a/2.png", "b/3.png")]
    for folder in ("a", "b"):
        (tmp_path / "set" / folder / "loop").symlink_to(tmp_path / "set")
        (tmp_path / "set" / folder / "up").symlink_to("..")
        (tmp_path / "set" / folder / "other").symlink_to("../a")
    assert sorted(map(os.path.realpath, all_image_files(tmp_path / "set")[0])) == images
    inside, _ = all_image_files(tmp_path / "set" / "b")  # what its links reach around it is not in it, but for a/
    assert [os.path.basename(file) for file in inside] == ["3.png", "1.png", "2.png"]


def test_fifos_and_devices_are_no_images(tmp_path: Path) -> None:
    image = made(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    files, notes = all_image_files(tmp_path)
    assert files == [image]
    assert "2 FIFO or device" in notes[0]
    for name in ("b.png", "c.png"):
        with pytest.raises(UserError, match=f"{name} is not a regular file"):
            read_image(str(tmp_path / name))


def test_an_image_of_more_pixels_than_pillows_limit(tmp_path: Path) -> None:
    for side, says in (
        (13000, "pixels.*89,478,485 are read, Pillow's limit"),
        (30000, "pixels.*89,478,485 are read, Pillow's limit"),
        (9000, "9000x9000 pixels in .* bytes, as no photograph has"),
    ):
        path = tmp_path / f"{side}.png"
        head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        rows = b"" if side == 30000 else zlib.compress(bytes((side // 8 + 1) * side), 9)
        parts = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
        chunks = [
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
            for kind, content in parts
        ]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
        for read in (read_image, image_size, upright_size):
            with pytest.raises(UserError, match=rf"{side}\.png has .*{says}"):
                read(str(path))


def test_threads_decode_only_so_many_pixels_at_a_time() -> None:
    budget, inside, most = _PixelBudget(100), 0, 0
    lock = threading.Lock()

    def decode(pixels: int) -> None:
        nonlocal inside, most
        with budget.of(pixels):
            with lock:
                inside += min(pixels, 100)
                most = max(most, inside)
            time.sleep(0.01)
            with lock:
                inside -= min(pixels, 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [60, 30, 20, 1000, 40, 40, 90, 10]))
    assert most == 100


def test_postscript_in_an_image_runs_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\necho 10.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # it is sought once
    path = tmp_path / "x.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (read_image, image_size, upright_size):
        with pytest.raises(UserError, match="of a kind that Pillow does not read"):
            read(str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"])
def test_every_listed_format_is_read_whatever_the_file_is_called(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", (8, 4), (200, 100, 50)).save(path, kind)
    assert read_image(str(path)).shape == (4, 8, 3)
