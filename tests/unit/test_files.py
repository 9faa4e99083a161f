from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from digitdist.files import atomic_write, parse_json, read_plain, remove


def test_two_writers_of_one_file_never_meet(tmp_path: Path):
    file, contents = tmp_path / "a", [bytes([i]) * 50_000 for i in range(4)]
    errors: list[OSError] = []

    def write(content: bytes) -> None:
        for _ in range(50):
            try:
                atomic_write(file, content)
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=write, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not file.exists() or file.read_bytes() in contents
    assert not errors
    assert [*tmp_path.iterdir()] == [file]


def test_writing_follows_no_link_and_leaves_nothing_where_it_fails(tmp_path: Path):
    yours = tmp_path / "yours"
    yours.write_text("kept")
    for name in ("a", ".a.tmp"):
        (tmp_path / name).symlink_to(yours)
    atomic_write(tmp_path / "a", b"new")
    assert yours.read_text() == "kept"
    assert not (tmp_path / "a").is_symlink()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(IsADirectoryError):
        atomic_write(tmp_path / "folder", b"new")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["link", "broken link", "pipe", "folder", "device", "too large", "sparse"])
def test_only_plain_files_of_an_expected_size_are_read(tmp_path: Path, kind: str):
    file = tmp_path / "a"
    (tmp_path / "b").write_text("content")
    match kind:
        case "link":
            file.symlink_to(tmp_path / "b")
        case "broken link":
            file.symlink_to(tmp_path / "c")
        case "pipe":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
        case "device":
            file = Path("/dev/zero")
        case "too large":
            file.write_bytes(bytes(101))
        case "sparse":
            with file.open("wb") as opened:
                opened.truncate(1 << 40)
    with pytest.raises(OSError, match=r"link|regular|larger") as caught:
        read_plain(file, at_most=100)
    assert caught.value.filename == str(file)


def test_what_is_read_is_what_the_file_holds(tmp_path: Path):
    for content in (b"", b"a" * 100):
        (tmp_path / "a").write_bytes(content)
        assert read_plain(tmp_path / "a", at_most=100) == content


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"1" * 10_000, b"\0"])
def test_what_is_not_json_is_a_value_error(text: bytes):
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(text)


def test_a_link_to_a_folder_is_removed_and_not_the_folder(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    remove(tmp_path / "not there")
    assert [*tmp_path.iterdir()] == [tmp_path / "folder"]
    remove(tmp_path / "folder")
    assert not [*tmp_path.iterdir()]
