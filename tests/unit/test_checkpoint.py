from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from digitdist import checkpoint
from digitdist.checkpoint import Checkpoint, DamagedCheckpoint, UnreadableCheckpoint


def made(step: int) -> Checkpoint:
    torch.manual_seed(step)
    tied = torch.randn(3)
    return Checkpoint({"model": {"a": torch.randn(2, 3), "b": tied, "c": tied}, "optimizer": {}}, {"step": step, "best": None})


def test_what_is_read_is_what_was_written(tmp_path: Path):
    stored = made(5)
    folder = checkpoint.write(tmp_path, stored, keep=3)
    assert folder.name == "step-000000005"
    read = checkpoint.read(folder)
    assert read.state == stored.state
    assert read.tensors.keys() == {"model", "optimizer"}
    assert all(torch.equal(read.tensors["model"][k], v) for k, v in stored.tensors["model"].items())
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path):
    for step in range(1, 6):
        checkpoint.write(tmp_path, made(step), keep=2, best="step-000000001")
    assert [f.name for f in checkpoint.folders(tmp_path)] == [checkpoint.folder_name(s) for s in (1, 4, 5)]


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(path.parent.parent / "executed")))


class Payload:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, link, pickled], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", FILES)
def test_any_damage_is_named_and_the_one_before_taken(tmp_path: Path, file: str, damage):
    checkpoint.write(tmp_path, made(1), keep=3)
    newest = checkpoint.write(tmp_path, made(2), keep=3)
    damage(newest / file)
    said: list[str] = []
    found = checkpoint.newest_good(tmp_path, said.append)
    assert found is not None
    assert found.step == 1
    assert len(said) == 1
    assert newest.name in said[0]
    assert file in said[0] or "manifest" in said[0] or "link" in said[0]
    assert not (tmp_path / "executed").exists()


def test_every_flipped_bit_of_a_manifest_is_noticed_or_without_effect(tmp_path: Path):
    folder = checkpoint.write(tmp_path, made(1), keep=3)
    right = (folder / "manifest.json").read_bytes()
    wanted = checkpoint.read(folder)
    for bit in range(8 * len(right)):
        content = bytearray(right)
        content[bit // 8] ^= 1 << bit % 8
        (folder / "manifest.json").write_bytes(content)
        try:
            read = checkpoint.read(folder)
        except DamagedCheckpoint:
            continue
        assert read.state == wanted.state


def test_a_file_that_somebody_adds_does_not_matter(tmp_path: Path):
    folder = checkpoint.write(tmp_path, made(1), keep=3)
    (folder / ".DS_Store").write_bytes(b"Bud1")
    (folder / "notes").mkdir()
    found = checkpoint.newest_good(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 1


def test_only_what_has_the_exact_name_is_a_checkpoint(tmp_path: Path):
    checkpoint.write(tmp_path, made(10), keep=1)
    for name in ("step-000000010-keep", "step-10", "step-0000000\u0661\u0660", "step-000000010.bak"):
        shutil.copytree(tmp_path / "step-000000010", tmp_path / name)
    before = sorted(tmp_path.iterdir())
    checkpoint.write(tmp_path, made(2 * 10**9), keep=2)
    assert checkpoint.folders(tmp_path) == [tmp_path / "step-000000010", tmp_path / "step-2000000000"]
    checkpoint.write(tmp_path, made(10**10), keep=1)
    assert sorted(tmp_path.iterdir()) == sorted({*before, tmp_path / "step-10000000000"} - {tmp_path / "step-000000010"})


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Files that cannot be read: what their path contains, with the errno."""
    failing: dict[str, int] = {}
    real = os.open

    def fail(path, *arguments, **options):
        for part, number in failing.items():
            if part in str(path):
                raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    return failing


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE], ids=lambda n: errno.errorcode[n])
@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "state.json"])
def test_of_what_cannot_be_read_an_older_one_is_taken_and_nothing_removed(
    tmp_path: Path, unreadable: dict[str, int], file: str, number: int
):
    for step in (1, 2):
        checkpoint.write(tmp_path, made(step), keep=3)
    said: list[str] = []
    unreadable[f"step-000000002/{file}"] = number
    found = checkpoint.newest_good(tmp_path, said.append)
    assert found is not None
    assert found.step == 1
    assert said == [f"skipped a checkpoint: {tmp_path}/step-000000002/{file}: {os.strerror(number)}"]
    checkpoint.write(tmp_path, made(3), keep=2)
    assert [checkpoint.step_of(folder) for folder in checkpoint.folders(tmp_path)] == [1, 2, 3]
    unreadable[f"step-000000001/{file}"] = unreadable[f"step-000000003/{file}"] = number
    with pytest.raises(UnreadableCheckpoint, match="step-000000003"):
        checkpoint.newest_good(tmp_path, said.append)


def test_one_that_is_removed_while_it_is_read_is_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint.write(tmp_path, made(1), keep=1)
    real = checkpoint.read

    def read(folder: Path) -> Checkpoint:
        if checkpoint.step_of(folder) == 1:
            checkpoint.write(tmp_path, made(2), keep=1)
        return real(folder)

    monkeypatch.setattr(checkpoint, "read", read)
    found = checkpoint.newest_good(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 2


def test_an_error_while_old_ones_are_removed_is_no_failure_of_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint.write(tmp_path, made(1), keep=1)

    def fail(folder: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(shutil, "rmtree", fail)
    said: list[str] = []
    folder = checkpoint.write(tmp_path, made(2), keep=1, report=said.append)
    assert checkpoint.read(folder).step == 2
    (line,) = said
    assert "older checkpoints cannot be removed" in line


def test_a_file_left_under_the_temporary_name_is_replaced(tmp_path: Path):
    (tmp_path / ".step-000000001.tmp").write_text("not a folder")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / ".step-000000002.tmp").symlink_to(outside)
    for step in (1, 2):
        checkpoint.write(tmp_path, made(step), keep=3)
    assert [checkpoint.step_of(folder) for folder in checkpoint.folders(tmp_path)] == [1, 2]
    assert not [*outside.iterdir()]


@pytest.mark.parametrize(
    "state",
    [b"[" * 100_000, b"7", b"[]", b"{}", b'{"step": "5"}', b'{"step": true}', b'{"step": -5}', b"\xff", b""],
    ids=["deep", "number", "list", "empty", "text", "bool", "negative", "not UTF-8", "nothing"],
)
def test_a_state_that_is_none_is_damage_whatever_its_sum_says(tmp_path: Path, state: bytes):
    folder = checkpoint.write(tmp_path, made(1), keep=3)
    (folder / "state.json").write_bytes(state)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match="not a checkpoint of this program"):
        checkpoint.read(folder)


@pytest.mark.parametrize("kind", ["F4", "F8_E8M0", "F32"])
def test_tensors_that_torch_does_not_take_are_damage_whatever_their_sum_says(tmp_path: Path, kind: str):
    folder = checkpoint.write(tmp_path, made(1), keep=3)
    header = json.dumps({"a": {"dtype": kind, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}).encode()
    content = len(header).to_bytes(8, "little") + header
    (folder / "model.safetensors").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match="not a checkpoint of this program"):
        checkpoint.read(folder)


@pytest.mark.parametrize("size", ["Infinity", "-Infinity", "NaN", "1e999", "-1", "null"])
def test_a_manifest_of_an_impossible_size_is_damage(tmp_path: Path, size: str):
    folder = checkpoint.write(tmp_path, made(1), keep=3)
    (folder / "manifest.json").write_text(f'{{"files": {{"state.json": {{"bytes": {size}, "sha256": ""}}}}}}')
    with pytest.raises(DamagedCheckpoint):
        checkpoint.read(folder)


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("step-000000002")], ids=["file", "link"])
def test_what_is_no_folder_under_the_name_of_an_old_one_goes_with_the_old_ones(tmp_path: Path, make):
    make(tmp_path / "step-000000001")
    said: list[str] = []
    for step in (2, 3, 4):
        checkpoint.write(tmp_path, made(step), keep=1, report=said.append)
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["step-000000004"]
    assert not said


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "a/b", "a\0b", "\ud800", "\x1b[31m"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str):
    folder = checkpoint.write(tmp_path, made(1), keep=3)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["state.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "outside.json").write_bytes((folder / "state.json").read_bytes())
    with pytest.raises(DamagedCheckpoint):
        checkpoint.read(folder)


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path):
    folder = checkpoint.write(tmp_path / "a", made(1), keep=3)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / folder.name).symlink_to(folder)
    assert checkpoint.newest_good(tmp_path / "b", print) is None


def test_a_failing_write_leaves_the_last_good_one(tmp_path: Path):
    checkpoint.write(tmp_path, made(1), keep=1)

    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.write(tmp_path, made(2), keep=1, on_file=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    checkpoint.verify(tmp_path / "step-000000001")


def test_an_old_one_goes_only_after_the_new_one_is_there(tmp_path: Path):
    checkpoint.write(tmp_path, made(1), keep=1)
    there: list[list[str]] = []
    checkpoint.write(tmp_path, made(2), keep=1, on_file=lambda: there.append([f.name for f in checkpoint.folders(tmp_path)]))
    assert there == [["step-000000001"]] * 3
    assert [f.name for f in checkpoint.folders(tmp_path)] == ["step-000000002"]


def test_the_hash_of_weights_is_over_name_shape_dtype_and_bytes():
    weights = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2])}
    first = checkpoint.weights_sha256(weights)
    assert first == checkpoint.weights_sha256(dict(reversed(weights.items())))
    assert first == checkpoint.weights_sha256({"a": weights["a"], "b": weights["b"].t().contiguous().t()})
    for other in (
        {"b": weights["b"].view(3, 2), "a": weights["a"]},
        {"c": weights["b"], "a": weights["a"]},
        {"b": weights["b"], "a": weights["a"].int()},
        {"b": weights["b"] + 1e-6, "a": weights["a"]},
    ):
        assert checkpoint.weights_sha256(other) != first
