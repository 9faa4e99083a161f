"""Files that somebody else may have made are read as data, or refused at once."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from digitdist.files import MIB, parse_json, read_plain


def test_a_regular_file_is_read_up_to_its_limit(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert read_plain(tmp_path / "a", 100) == b"x" * 100
    with pytest.raises(OSError, match="is larger than 99 bytes"):
        read_plain(tmp_path / "a", 99)
    with pytest.raises(FileNotFoundError):
        read_plain(tmp_path / "b", 100)


def test_a_huge_sparse_file_is_refused_by_its_size_alone(tmp_path: Path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="is larger than 1,048,576 bytes"):
        read_plain(tmp_path / "a", MIB)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "folder"])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, kind: str):
    place = tmp_path / "a"
    if kind == "FIFO":
        os.mkfifo(place)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(place))
    elif kind == "folder":
        place.mkdir()
    with pytest.raises(OSError, match=r"is not a regular file|No such device"):
        read_plain(Path("/dev/zero") if kind == "device" else place, MIB)


@pytest.mark.parametrize("target", ["a file", "/dev/zero", "nothing", "loop"])
def test_a_link_is_not_followed(tmp_path: Path, target: str):
    (tmp_path / "a file").write_bytes(b"mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(OSError, match="is a link"):
        read_plain(tmp_path / "link", MIB)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\xfd", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000])
def test_json_that_is_none_is_a_value_error(content: bytes):
    with pytest.raises(ValueError, match=r".+"):
        parse_json(content)
