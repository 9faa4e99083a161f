from __future__ import annotations

import gzip
import itertools
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launching import CLEAN, python

from digitdist import data
from digitdist.config import AugmentConfig, UserError, load
from digitdist.data import Order, Sharding, Splits, cut, load_splits


def config(root: Path, *overrides: str):
    return load((), [f"data.root={root}", *overrides]).data


def test_mnist_is_the_real_one(splits: Splits):
    assert splits.train.images.shape == (60000, 28, 28)
    assert splits.test.images.shape == (10000, 28, 28)
    assert splits.train.images.dtype == torch.uint8
    assert splits.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert torch.bincount(splits.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_torchvision_reads_what_was_unpacked(mnist_root: Path, splits: Splits):
    import torchvision

    theirs = torchvision.datasets.MNIST(str(mnist_root), train=False)
    assert torch.equal(theirs.data, splits.test.images)
    assert torch.equal(theirs.targets, splits.test.labels)


def test_four_processes_that_start_cold_unpack_once(tmp_path: Path):
    code = f"""
import sys
from digitdist import config, data
plain = data.lzma.decompress
data.lzma.decompress = lambda packed: print('unpacked', flush=True) or plain(packed)
splits = data.load_splits(config.load((), ['data.root={tmp_path}/cold']).data, 0)
print(len(splits.train), len(splits.test))
"""
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=CLEAN) for _ in range(4)]
    outputs = [process.communicate(timeout=100)[0] for process in started]
    assert "".join(outputs).count("unpacked") == 4, "each of the four files once, by whichever process came first"
    assert all(output.endswith("60000 10000\n") for output in outputs)
    left = {path.name for path in (tmp_path / "cold/MNIST/raw").iterdir()}
    assert left == {name for names in data.MNIST_FILES.values() for name in names} | {".digitdist.lock"}


@pytest.mark.parametrize("damage", [b"", b"wrong", None], ids=["empty", "other content", "a flipped bit"])
def test_a_wrong_file_is_named_and_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: bytes | None):
    load_splits(config(tmp_path), 0)
    file = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte"
    right = file.read_bytes()
    file.write_bytes(right[:-1] + bytes([right[-1] ^ 1]) if damage is None else damage)
    capfd.readouterr()
    load_splits(config(tmp_path), 0)
    assert str(file) in capfd.readouterr().out
    assert file.read_bytes() == right


def test_what_is_there_already_is_used_and_not_written(tmp_path: Path, mnist_root: Path):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for names in data.MNIST_FILES.values():
        for name in names:
            (raw / name).write_bytes((mnist_root / "MNIST/raw" / name).read_bytes())
    raw.chmod(0o555)
    before = {path: path.stat().st_mtime_ns for path in raw.iterdir()}
    load_splits(config(tmp_path), 0)
    assert {path: path.stat().st_mtime_ns for path in raw.iterdir()} == before


def test_the_package_names_origin_and_licence():
    assert "Creative Commons" in data._packaged("README.md").decode()


def test_a_place_that_cannot_be_written_to_is_the_users_mistake():
    with pytest.raises(UserError, match=r"data\.root.*give a folder"):
        load_splits(config(Path("/proc/nowhere")), 0)


def idx(array: np.ndarray) -> bytes:
    kind = {"uint8": 8, "int32": 12}[str(array.dtype)]
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
        + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )


def put(folder: Path, prefixes: tuple[str, str], labels: np.ndarray, suffix: str = "labels-idx1-ubyte") -> np.ndarray:
    """A small data set in torchvision's layout, as a person would put it there."""
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
    for prefix in prefixes:
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}-{suffix}").write_bytes(idx(labels))
    return images


@pytest.mark.parametrize(("name", "folder"), [("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_other_data_sets_are_read_through_torchvision(tmp_path: Path, name: str, folder: str):
    images = put(tmp_path / folder / "raw", ("train", "t10k"), np.arange(20, dtype=np.uint8) % 10)
    read = load_splits(config(tmp_path, f"data.name={name}"), 0)
    assert np.array_equal(read.test.images.numpy(), images)
    assert read.train.labels.tolist() == [*range(10), *range(10)]


def test_qmnist_labels_are_its_classes(tmp_path: Path):
    labels = np.tile(np.arange(20, dtype=np.int32)[:, None] % 10, (1, 8))
    labels[:, 1:] = 77
    put(tmp_path / "QMNIST/raw", ("qmnist-train", "qmnist-test"), labels, "labels-idx2-int")
    assert load_splits(config(tmp_path, "data.name=qmnist"), 0).train.labels.tolist() == [*range(10), *range(10)]


def test_emnist_is_turned_upright(tmp_path: Path):
    labels = np.arange(20, dtype=np.uint8) % 10
    images = put(tmp_path / "EMNIST/raw", ("emnist-digits-train", "emnist-digits-test"), labels)
    read = load_splits(config(tmp_path, "data.name=emnist_digits"), 0)
    assert np.array_equal(read.test.images.numpy(), images.transpose(0, 2, 1))


def test_usps_is_brought_to_mnists_form(tmp_path: Path):
    import bz2

    (tmp_path / "USPS").mkdir()
    row = b"3 " + b" ".join(f"{i + 1}:{1.0}".encode() for i in range(256)) + b"\n"
    for name in ("usps.bz2", "usps.t.bz2"):
        (tmp_path / "USPS" / name).write_bytes(bz2.compress(row * 3))
    read = load_splits(config(tmp_path, "data.name=usps"), 0)
    assert read.test.images.shape == (3, 28, 28)
    assert read.test.labels.tolist() == [2, 2, 2]
    assert read.test.images[0, 4:24, 4:24].min() == 255
    assert read.test.images[0, :4].max() == 0


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist", "qmnist", "emnist_digits", "usps"])
def test_a_data_set_out_of_reach_is_told_with_addresses_and_files(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        load_splits(config(tmp_path, f"data.name={name}"), 0)
    (told,) = caught.value.mistakes
    assert "tried http" in told
    assert str(tmp_path) in told.rpartition("put ")[2]


def test_a_damaged_file_that_somebody_put_there_is_the_users_mistake(tmp_path: Path):
    put(tmp_path / "KMNIST/raw", ("train", "t10k"), np.arange(20, dtype=np.uint8) % 10)
    (tmp_path / "KMNIST/raw/train-images-idx3-ubyte").write_bytes(gzip.compress(b"no images"))
    with pytest.raises(UserError, match="kmnist cannot be had"):
        load_splits(config(tmp_path, "data.name=kmnist"), 0)


def test_held_out_images_are_a_fixed_choice_and_not_trained_on(mnist_root: Path):
    held = config(mnist_root, "data.validation=5000")
    first, again, other = load_splits(held, 0), load_splits(held, 0), load_splits(held, 1)
    assert torch.equal(first.validation.indices, again.validation.indices)
    assert not torch.equal(first.validation.indices, other.validation.indices)
    together = torch.cat([first.train.indices, first.validation.indices])
    assert torch.equal(together.sort().values, torch.arange(60000))
    with pytest.raises(UserError, match="59999"):
        load_splits(config(mnist_root, "data.validation=60000"), 0)


@given(count=st.integers(0, 500), parts=st.integers(1, 40))
def test_a_cut_is_whole_and_even(count: int, parts: int):
    bounds = cut(count, parts)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, count, parts)
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True), "rank 0, whose buffers count, is never the one left without images"


@given(
    count=st.integers(1, 300),
    batch_size=st.integers(1, 350),
    world_size=st.integers(1, 5),
    accumulate=st.integers(1, 4),
    epoch=st.integers(0, 2),
    seed=st.integers(0, 3),
)
def test_each_image_is_seen_exactly_once_an_epoch(
    count: int, batch_size: int, world_size: int, accumulate: int, epoch: int, seed: int
):
    images = data.ImageSet(torch.zeros(count, 28, 28, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))
    order = Order(count, batch_size, seed)
    start = epoch * order.steps_per_epoch
    shardings = [Sharding.of(world_size * accumulate, rank, world_size) for rank in range(world_size)]
    by_rank = [list(order.batches(images, start, sharding)) for sharding in shardings]
    assert {len(batches) for batches in by_rank} == {order.steps_per_epoch}
    one_process = list(order.batches(images, start, Sharding.of(1, 0, 1)))
    for at in range(order.steps_per_epoch):
        together = torch.cat([batches[at][2] for batches in by_rank])
        assert torch.equal(together, one_process[at][2]), "the ranks' shares in turn are the global batch"
        assert len(together) == order.batch_count(start + at)
        for sharding, batches in zip(shardings, by_rank, strict=True):
            parts = [batches[at][2][place] for _, place in sharding.slices(len(together))]
            assert len(parts) == accumulate
            assert torch.equal(torch.cat(parts), batches[at][2])
    assert torch.cat([batch[2] for batch in one_process]).sort().values.tolist() == list(range(count))
    assert order.images_seen(start + order.steps_per_epoch) == (epoch + 1) * count


@given(count=st.integers(1, 200), batch_size=st.integers(1, 50), step=st.integers(0, 400))
def test_the_order_from_the_middle_is_the_rest_of_the_order(count: int, batch_size: int, step: int):
    images = data.ImageSet(torch.zeros(count, 28, 28, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))
    order, whole = Order(count, batch_size, 0), Sharding.of(1, 0, 1)
    first = step - step % order.steps_per_epoch
    all_batches = [batch[2].tolist() for batch in order.batches(images, first, whole)]
    assert [batch[2].tolist() for batch in order.batches(images, step, whole)] == all_batches[step - first :]


@given(count=st.integers(1, 300), focus=st.integers(1, 9), step=st.integers(0, 200))
def test_a_focused_pass_has_the_hardest_images_and_others_none_of_them_twice(count: int, focus: int, step: int):
    images = data.ImageSet(torch.zeros(count, 28, 28, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))
    order, whole, hardest = Order(count, 10, 0, focus), Sharding.of(1, 0, 1), data.permutation(count, "by loss")
    start, stop = order.stretch(step)
    assert start <= step < stop
    assert {order.stretch(other) for other in range(start, stop)} == {(start, stop)}
    batches = [batch[2].tolist() for batch in order.batches(images, start, whole, hardest)]
    assert [len(batch) for batch in batches] == [order.batch_count(other) for other in range(start, stop)]
    seen = list(itertools.chain(*batches))
    assert len(set(seen)) == len(seen)
    assert set(hardest[: 3 * len(seen) // 4].tolist()) <= set(seen)
    assert [batch[2].tolist() for batch in order.batches(images, step, whole, hardest)] == batches[step - start :]


def test_the_first_epoch_is_one_stretch_and_later_ones_are_focus_of_them():
    order = Order(60000, 256, 0, focus=4)
    assert order.stretch(0) == order.stretch(234) == (0, 235)
    assert [order.stretch(step)[0] for step in range(235, 471)] == [235] * 59 + [294] * 59 + [353] * 59 + [412] * 58 + [470]


def test_the_others_of_a_focused_pass_are_drawn_anew_for_each():
    hardest = data.permutation(3000, "by loss")
    passes = [data.focused(hardest, 600, 0, start).tolist() for start in range(10)]
    others = {tuple(sorted(set(one) - set(hardest[:450].tolist()))) for one in passes}
    assert [len(drawn) for drawn in others] == [150] * 10
    assert len({tuple(one) for one in passes}) == 10


def test_the_order_depends_on_seed_and_epoch():
    drawn = {tuple(data.permutation(1000, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(drawn) == 9


def test_loading_draws_nothing_from_the_global_generator(splits: Splits):
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    next(iter(Order(60000, 100, 0).batches(splits.train, 0, Sharding.of(1, 0, 1))))
    assert torch.equal(torch.rand(3), wanted)


def test_normalised_training_images_have_mean_0_and_deviation_1(splits: Splits):
    pixels = data.normalise(splits.train.images, data.SPECS["mnist"])
    assert pixels.shape == (60000, 1, 28, 28)
    assert abs(pixels.mean().item()) < 1e-3
    assert abs(pixels.std().item() - 1) < 1e-3


def test_augmentation_moves_images_and_keeps_the_background(splits: Splits):
    pixels = data.normalise(splits.train.images[:50], data.SPECS["mnist"])
    background = pixels.min().item()
    assert data.augment(pixels, AugmentConfig(), background) is pixels
    torch.manual_seed(0)
    moved = data.augment(pixels, AugmentConfig(shift=2, rotate=10, scale=0.1), background)
    assert moved.shape == pixels.shape
    assert not torch.equal(moved, pixels)
    assert torch.allclose(moved[:, :, 0, 0], torch.tensor(background), atol=1e-5)
    ink, moved_ink = (pixels - background).sum((1, 2, 3)), (moved - background).sum((1, 2, 3))
    assert ((moved_ink / ink - 1).abs() < 0.4).all()


def test_a_sheared_image_has_its_rows_where_they_were(splits: Splits):
    pixels = splits.train.images[:50].unsqueeze(1).float()
    torch.manual_seed(0)
    moved = data.augment(pixels, AugmentConfig(shear=0.2), 0.0)
    assert torch.allclose(moved.sum(3), pixels.sum(3), rtol=1e-3, atol=1)
    columns = torch.arange(28.0)
    shift = ((moved * columns).sum(3) / moved.sum(3) - (pixels * columns).sum(3) / pixels.sum(3))[:, 0]
    inked = pixels[:, 0].sum(2) > 500
    slant = (shift / (torch.arange(28) - 13.5)).masked_fill(~inked, torch.nan)
    of_image = slant.nanmean(1, keepdim=True)
    assert of_image.abs().max() <= 0.201
    assert of_image.std() > 0.08
    assert ((slant - of_image).abs().nan_to_num() < 0.01).all()


def test_an_augmented_image_is_the_affine_map_of_what_was_drawn():
    images, config = torch.rand(50, 1, 28, 28), AugmentConfig(shift=2, rotate=20, scale=0.2, shear=0.3)
    torch.manual_seed(0)
    moved = data.augment(images, config, -0.4)
    torch.manual_seed(0)
    angle, scale, shear, *shift = (2 * torch.rand(5, 50) - 1).unbind()
    angle = torch.deg2rad(config.rotate * angle)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(50, 2, 2)
    slant = torch.eye(2).repeat(50, 1, 1)
    slant[:, 0, 1] = config.shear * shear
    matrix = rotation @ slant / (1 + config.scale * scale)[:, None, None]
    theta = torch.cat([matrix, torch.stack(shift, 1)[..., None] * config.shift * 2 / 28], 2)
    grid = torch.nn.functional.affine_grid(theta, [50, 1, 28, 28], align_corners=False)
    wanted = torch.nn.functional.grid_sample(images + 0.4, grid, align_corners=False) - 0.4
    assert torch.allclose(moved, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["shift", "rotate", "scale", "shear"])
def test_each_augmentation_works_alone(kind: str, splits: Splits):
    pixels = splits.train.images[:5].unsqueeze(1).float()
    assert not torch.equal(data.augment(pixels, AugmentConfig(**{kind: 0.5}), 0.0), pixels)


def test_a_whole_shift_is_a_whole_shift(splits: Splits):
    pixels = splits.train.images[:5].unsqueeze(1).float()
    theta = torch.tensor([[1.0, 0, 2 / 28 * 3], [0, 1, 0]]).expand(5, 2, 3)
    grid = torch.nn.functional.affine_grid(theta, [5, 1, 28, 28], align_corners=False)
    moved = torch.nn.functional.grid_sample(pixels, grid, align_corners=False)
    assert torch.allclose(moved[..., :-3], pixels[..., 3:], atol=1e-3)


def test_the_command_shows_what_a_data_set_is(place: Path):
    shown = python("-m", "digitdist.data", "data.validation=5000", "--plot", "samples.png", cwd=place)
    assert shown.code == 0, shown.err
    for part in ("55,000", "5,000", "10,000", "(28, 28)", "uint8", "mean 0.13", "deviation 0.30"):
        assert part in shown.out
    assert (place / "samples.png").read_bytes().startswith(b"\x89PNG")
