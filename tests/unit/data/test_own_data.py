"""Users' data sets: a folder of pictures, and a class in torchvision's convention."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data_sets import write_folder
from PIL import Image

from digitdist.config import DataConfig, load_config
from digitdist.data import DataSetInfo, Share, Splits, StreamedSet, load_splits
from digitdist.data.__main__ import describe, plot
from digitdist.data.forms import picture_form, to_image
from digitdist.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(*overrides: str, seed: int = 0) -> Splits:
    return load_splits(load_config((), list(overrides)).data, seed)


def user(name: str, *overrides: str, seed: int = 0) -> Splits:
    return load(f"data.target=helpers.data_sets.{name}", *overrides, seed=seed)


@pytest.fixture
def folder(tmp_path: Path, splits: Splits) -> Path:
    return write_folder(tmp_path / "digits", splits)


# A folder


def test_a_folder_gives_its_pictures_classes_and_statistics(folder: Path, splits: Splits):
    read = load("data.name=folder", f"data.root={folder}")
    assert read.info.classes == tuple(f"digit {n}" for n in range(10))
    assert (len(read.train), len(read.test), read.info.image_shape) == (160, 40, (1, 28, 28))
    order = splits.train.labels[:160].argsort(stable=True)  # by class, then by name
    assert torch.equal(read.train.images, splits.train.images[:160][order])
    assert torch.equal(read.train.labels, splits.train.labels[:160][order])
    pixels = read.train.images.double() / 255
    assert read.info.mean == (round(float(pixels.mean()), 4),)
    assert read.info.std == (round(float(pixels.std(correction=0)), 4),)


def test_pictures_may_be_resized_in_colour(folder: Path):
    Image.new("RGB", (90, 40), (255, 0, 51)).save(folder / "train/digit 0/red.bmp")
    read = load("data.name=folder", f"data.root={folder}", "data.image=resize", "data.size=20", "data.channels=3")
    assert read.train.images.shape == (161, 3, 20, 20)
    assert any(torch.equal(image, torch.tensor([255, 0, 51], dtype=torch.uint8)[:, None, None].expand(3, 20, 20))
               for image in read.train.images)  # fmt: skip


def test_a_streamed_folder_gives_the_images_of_one_in_memory(folder: Path):
    kept = load("data.name=folder", f"data.root={folder}")
    streamed = load("data.name=folder", f"data.root={folder}", "data.in_memory=false", "data.workers=0")
    assert isinstance(streamed.train, StreamedSet)
    positions = torch.tensor([3, 159, 0])
    assert all(torch.equal(*pair) for pair in zip(kept.train.read(positions), streamed.train.read(positions), strict=True))
    assert kept.info == streamed.info


def test_a_second_reading_comes_from_the_cache_until_a_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    first = load("data.name=folder", f"data.root={folder}")
    opened: list[str] = []
    read_picture = picture_reader(monkeypatch, opened)
    again = load("data.name=folder", f"data.root={folder}")
    assert (opened, again.sha256) == ([], first.sha256)
    changed = next((folder / "train").rglob("*.png"))
    os.utime(changed, ns=(time.time_ns(), time.time_ns() + 10**9))
    load("data.name=folder", f"data.root={folder}")
    assert str(changed) in opened
    assert len(opened) == 160  # the split that it belongs to
    assert read_picture


def picture_reader(monkeypatch: pytest.MonkeyPatch, opened: list[str]) -> Callable[[str], bytes]:
    """Notes in `opened` each picture that is read."""
    from digitdist.data import folder_set

    read = folder_set.read_picture
    monkeypatch.setattr(folder_set, "read_picture", lambda path: opened.append(path) or read(path))
    return read


def test_a_damaged_cache_is_made_anew(folder: Path, tmp_path: Path):
    first = load("data.name=folder", f"data.root={folder}")
    for file in (tmp_path / "cache/digitdist").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert load("data.name=folder", f"data.root={folder}").sha256 == first.sha256


def test_a_cache_that_cannot_be_written_is_said_and_done_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert len(load("data.name=folder", f"data.root={folder}").train) == 160
    assert "cannot be kept in /proc/nowhere/digitdist" in capfd.readouterr().out


def test_what_is_no_file_is_named_and_not_waited_for(folder: Path):
    (folder / "train/digit 0/link.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"link\.png is not a file, or a link to nowhere"):
        load("data.name=folder", f"data.root={folder}")
    (folder / "train/digit 0/link.png").unlink()
    os.mkfifo(folder / "train/digit 0/pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is not a file"):
        load("data.name=folder", f"data.root={folder}")
    (folder / "train/digit 0/pipe.png").unlink()
    (folder / "train/digit 0/circle").symlink_to(".")
    with pytest.raises(UserError, match=r"circle.*: Too many levels of symbolic links; remove it"):
        load("data.name=folder", f"data.root={folder}")


def test_a_files_or_a_classs_name_may_be_any_bytes(folder: Path):
    for split in (b"train", b"test"):
        place = os.fsencode(folder) + b"/" + split
        os.rename(place + b"/digit 0", place + b"/\xff")
        picture = next(os.scandir(place + b"/\xff")).name
        os.rename(place + b"/\xff/" + picture, place + b"/\xff/\xfe.png")
    splits = load("data.name=folder", f"data.root={folder}")
    assert len(splits.train) == 160
    assert splits.info.classes[-1] == "\udcff"
    assert DataSetInfo.from_json(splits.info.to_json()) == splits.info
    info = dataclasses.replace(splits.info, name="\udcff", classes=("\udcff", "\x1b[31m", "$\\frac{$"))
    named = dataclasses.replace(splits, info=info)
    plot(named, str(folder / "samples.png"))
    assert describe(DataConfig(), named).replace("\n", "").isprintable()


def test_every_bad_file_is_named_once(folder: Path):
    bad = [folder / "train/digit 1/no.png", folder / "train/digit 3/short.png", folder / "test/digit 2/blank.png"]
    bad[0].write_bytes(b"no picture")
    bad[1].write_bytes(next((folder / "train").rglob("*.png")).read_bytes()[:-30])
    Image.new("L", (40, 40), 255).save(bad[2])
    with pytest.raises(UserError) as error:
        load("data.name=folder", f"data.root={folder}")
    assert sorted(mistake.partition(": ")[0] for mistake in error.value.mistakes) == sorted(map(str, bad))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "train").rename(root / "training"), "DIR/train/CLASS"),
        (lambda root: (root / "test").rename(root / "check"), "DIR/test/CLASS"),
        (lambda root: (root / "train/none").mkdir(), "train/none has no picture"),
        (lambda root: (root / "test/digit 0").rename(root / "test/zero"), "no class in .*train has the name of zero"),
    ],
)
def test_a_folder_that_is_laid_out_otherwise_is_refused(folder: Path, change: Callable[[Path], object], message: str):
    change(folder)
    with pytest.raises(UserError, match=message):
        load("data.name=folder", f"data.root={folder}")


@pytest.mark.parametrize(
    "override", ["data.size=40", "data.channels=3", "data.in_memory=false", "data.args.x=1", "data.image=resize"]
)
def test_keys_of_a_folder_are_refused_where_they_have_no_effect(override: str):
    if override == "data.image=resize":
        with pytest.raises(UserError, match=r"data\.channels=2"):
            load("data.name=folder", override, "data.channels=2")
    else:
        with pytest.raises(UserError, match=override.split("=")[0].removesuffix(".x")):
            load(override)


# A class


def test_a_users_class_is_read_into_memory_where_it_is_small_and_fixed():
    read = user("Blocks", "data.args.count=30")
    assert read.train.images.shape == (30, 3, 32, 30)
    assert len(read.test) == 10
    assert read.info.classes == ("left", "middle", "right")
    assert read.info.image_size == (32, 30)
    assert len(read.info.mean) == 3


def test_a_class_that_takes_split_and_has_no_names_is_numbered():
    read = user("BySplit")
    assert read.info.classes == ("0", "1", "2", "3")
    assert [int(images.images[1, 0, 0]) for images in (read.train, read.test)] == [60, 61]
    assert user("BySplit", "data.in_memory=false").info.classes == ("0", "1", "2", "3")


def test_a_class_whose_items_change_is_streamed_and_follows_seed_epoch_and_index():
    splits = user("Jittered", "data.workers=0")
    assert isinstance(splits.train, StreamedSet)

    def images(epoch: int, positions: list[int], seed: int = 0) -> torch.Tensor:
        return user("Jittered", seed=seed).train.__getitems__(Share(torch.tensor(positions), epoch)).images

    first = images(0, [4, 9])
    assert torch.equal(images(0, [9, 4]), first.flip(0))
    assert not torch.equal(images(1, [4, 9]), first)
    assert not torch.equal(images(0, [4, 9], seed=1), first)


def test_memory_may_be_asked_for():
    assert user("Jittered", "data.in_memory=true").train.images.shape == (120, 3, 32, 30)


def test_held_out_images_are_those_of_the_set_in_memory():
    kept, streamed = (user("Blocks", f"data.in_memory={m}", "data.workers=0", "data.validation=20") for m in ("true", "false"))
    assert torch.equal(kept.validation.indices, streamed.validation.indices)
    assert torch.equal(kept.validation.images, streamed.validation.read(torch.arange(20)).images)
    assert not set(streamed.validation.indices.tolist()) & set(streamed.train.indices.tolist())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nothing", "cannot be imported"),
        ("Normalised", r"pixels of float32 outside 0\.\.1"),
        ("Uneven", "item 17: the disk has gone"),
        ("Plain", "neither train=True/False nor split"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused(name: str, message: str):
    with pytest.raises(UserError, match=message):
        user(name)


def test_every_item_that_cannot_be_used_is_named():
    with pytest.raises(UserError) as error:
        user("Uneven")
    found = [re.search(r"(train|test): item (\d+): ", mistake).groups() for mistake in error.value.mistakes]
    assert found == [(split, item) for split in ("train", "test") for item in ("5", "17", "30")]


# Items


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4)
COLOUR = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)


@pytest.mark.parametrize(
    ("item", "wanted"),
    [
        (Image.fromarray(GREY), GREY),
        (Image.fromarray(GREY).convert("1"), np.asarray(Image.fromarray(GREY).convert("1").convert("L"))),
        (Image.fromarray(COLOUR), COLOUR.transpose(2, 0, 1)),
        (GREY, GREY),
        (GREY[..., None], GREY),
        (COLOUR, COLOUR.transpose(2, 0, 1)),
        (torch.from_numpy(GREY)[None], GREY),
        (torch.from_numpy(COLOUR.transpose(2, 0, 1).copy()), COLOUR.transpose(2, 0, 1)),
        (torch.from_numpy(GREY)[None] / 255, GREY),
        (torch.from_numpy(GREY).long(), GREY),
        (torch.from_numpy(GREY) > 5, 255 * (GREY > 5).astype(np.uint8)),
    ],
)
def test_items_of_every_usual_form_become_bytes(item: object, wanted: np.ndarray):
    image = to_image(item)
    assert image.dtype == torch.uint8
    assert np.array_equal(image.numpy(), wanted)


@pytest.mark.parametrize(
    "item",
    ["text", np.zeros(3), np.zeros((2, 3, 4, 5)), np.zeros((5, 6, 7)), np.full((2, 2), -1), torch.full((2, 2), 1.5),
     torch.full((2, 2), torch.nan), Image.new("I;16", (2, 2))],
)  # fmt: skip
def test_items_of_another_form_are_refused(item: object):
    with pytest.raises(ValueError, match="not allowed"):
        to_image(item)


def test_a_transparent_picture_is_resized_on_white():
    info = DataSetInfo("x", (0.5,) * 3, (0.5,) * 3, ("a", "b"), 4, 6, "resize")
    assert torch.equal(picture_form(Image.new("RGBA", (20, 20)), info), torch.full((3, 4, 6), 255, dtype=torch.uint8))


# What belongs to a data set


@pytest.mark.parametrize("info", [DataSetInfo("x", (0.1,), (0.2,)), DataSetInfo("ü", (0.1,) * 3, (0.2,) * 3, ("a", "b"), 3, 4)])
def test_the_form_of_a_data_set_survives_its_file(info: DataSetInfo):
    assert DataSetInfo.from_json(info.to_json()) == info
