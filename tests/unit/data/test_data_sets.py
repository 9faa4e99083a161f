from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.launching import CLEAN, python

from digitdist.config import load_config
from digitdist.data import Splits, load_splits
from digitdist.data.packaged_mnist import FILES, _packaged
from digitdist.errors import UserError


def config(root: Path, *overrides: str):
    return load_config((), [f"data.root={root}", *overrides]).data


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


@pytest.mark.slow
def test_four_processes_that_start_cold_unpack_once(tmp_path: Path):
    code = f"""
import sys
from digitdist import config, data
from digitdist.data.packaged_mnist import lzma
plain = lzma.decompress
lzma.decompress = lambda packed: print('unpacked', flush=True) or plain(packed)
splits = data.load_splits(config.load_config((), ['data.root={tmp_path}/cold']).data, 0)
print(len(splits.train), len(splits.test))
"""
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=CLEAN) for _ in range(4)]
    outputs = [process.communicate(timeout=100)[0] for process in started]
    assert "".join(outputs).count("unpacked") == 4, "each of the four files once, by whichever process came first"
    assert all(output.endswith("60000 10000\n") for output in outputs)
    left = {path.name for path in (tmp_path / "cold/MNIST/raw").iterdir()}
    assert left == {name for names in FILES.values() for name in names} | {".digitdist.lock"}


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


def test_existing_files_are_used_and_not_written(tmp_path: Path, mnist_root: Path):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for names in FILES.values():
        for name in names:
            (raw / name).write_bytes((mnist_root / "MNIST/raw" / name).read_bytes())
    raw.chmod(0o555)
    before = {path: path.stat().st_mtime_ns for path in raw.iterdir()}
    load_splits(config(tmp_path), 0)
    assert {path: path.stat().st_mtime_ns for path in raw.iterdir()} == before


def test_the_package_names_origin_and_licence():
    assert "Creative Commons" in _packaged("README.md").decode()


def test_a_folder_that_cannot_be_written_to_is_the_users_mistake():
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


def test_svhn_has_colours_and_its_digit_ten_is_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import scipy.io
    import torchvision

    (tmp_path / "SVHN").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)  # as published: the number comes last
    parts = {}
    for split, (address, name, _) in torchvision.datasets.SVHN.split_list.items():
        file = tmp_path / "SVHN" / name
        if not file.exists():
            scipy.io.savemat(file, {"X": images, "y": np.arange(1, 11)[:, None]})
        parts[split] = [address, name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", parts)
    read = load_splits(config(tmp_path, "data.name=svhn"), 0)
    assert np.array_equal(read.test.images.numpy(), images.transpose(3, 2, 0, 1))
    assert read.train.labels.tolist() == [*range(1, 10), 0]
    assert (read.info.image_shape, read.info.classes) == ((3, 32, 32), tuple("0123456789"))


def test_cifar10_has_colours_and_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    def put_pickle(name: str, content: dict[str, object]) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    batch = {"data": images.reshape(20, -1), "labels": [*range(10), *range(10)]}
    for split in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, split, [(name, put_pickle(name, batch)) for name, _ in getattr(CIFAR10, split)])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": put_pickle(CIFAR10.meta["filename"], {"label_names": names})})
    read = load_splits(config(tmp_path, "data.name=cifar10"), 0)
    assert np.array_equal(read.test.images.numpy(), images)
    assert (len(read.train), read.train.labels[:20].tolist()) == (100, [*range(10), *range(10)])
    assert (read.info.image_shape, read.info.classes) == ((3, 32, 32), tuple(names))


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist", "qmnist", "emnist_digits", "usps", "svhn", "cifar10"])
def test_a_data_set_out_of_reach_is_reported_with_addresses_and_files(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        load_splits(config(tmp_path, f"data.name={name}"), 0)
    (reported,) = caught.value.mistakes
    assert "tried http" in reported
    assert str(tmp_path) in reported.rpartition("put ")[2]


def test_a_damaged_file_that_somebody_put_there_is_the_users_mistake(tmp_path: Path):
    put(tmp_path / "KMNIST/raw", ("train", "t10k"), np.arange(20, dtype=np.uint8) % 10)
    (tmp_path / "KMNIST/raw/train-images-idx3-ubyte").write_bytes(gzip.compress(b"no images"))
    with pytest.raises(UserError, match="kmnist cannot be downloaded"):
        load_splits(config(tmp_path, "data.name=kmnist"), 0)


def test_held_out_images_are_a_fixed_choice_and_not_trained_on(mnist_root: Path):
    held = config(mnist_root, "data.validation=5000")
    first, again, other = load_splits(held, 0), load_splits(held, 0), load_splits(held, 1)
    assert torch.equal(first.validation.indices, again.validation.indices)
    assert not torch.equal(first.validation.indices, other.validation.indices)
    fixed = load_splits(config(mnist_root, "data.validation=5000", "data.validation_seed=1"), 0)
    assert torch.equal(fixed.validation.indices, other.validation.indices)
    together = torch.cat([first.train.indices, first.validation.indices])
    assert torch.equal(together.sort().values, torch.arange(60000))
    with pytest.raises(UserError, match="59999"):
        load_splits(config(mnist_root, "data.validation=60000"), 0)


def test_the_command_shows_what_a_data_set_is(place: Path):
    shown = python("-m", "digitdist.data", "data.validation=5000", "--plot", "samples.png", cwd=place)
    assert shown.code == 0, shown.err
    for part in ("55,000", "5,000", "10,000", "(28, 28)", "uint8", "mean 0.13", "deviation 0.30"):
        assert part in shown.out
    assert (place / "samples.png").read_bytes().startswith(b"\x89PNG")
