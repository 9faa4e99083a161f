"""What no type and no range can check: names, folders, and keys that exclude each other."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from digitdist.config.schema import Config, DataConfig
from digitdist.config.values import shown
from digitdist.world import is_main

MAX_NAME_BYTES = 255  # of a file's name, on every file system in use
MAX_SHARDS = 2**16  # of a global batch, in exact mode
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that replay recorded kernels


def check_combinations(config: Config) -> list[str]:
    """The mistakes in names, folders and combinations of keys."""
    mistakes = []
    name = config.run.name
    if name is not None and not _names_a_folder(name):
        mistakes.append(
            f"run.name={shown(repr(name))} is not allowed; it names one folder in run.dir, so no slash, no line break, not"
            f" empty, and at most {MAX_NAME_BYTES} bytes"
        )
    if config.sync.compress != "none" and config.sync.mode != "ddp":
        mistakes.append(
            f"sync.compress={config.sync.compress} is not allowed with sync.mode={config.sync.mode}; set it to none,"
            " or set sync.mode=ddp, the only mode whose gradients may be rounded"
        )
    if config.train.compile != "none" and config.sync.mode == "exact":
        mistakes.append(
            f"train.compile={config.train.compile} is not allowed with sync.mode=exact; set it to none: what is compiled,"
            " and so its rounding, depends on the batch sizes that a process has met"
        )
    train, shards = config.train, config.sync.shards if config.sync.mode == "exact" else 1
    if train.accumulate > config.data.batch_size:
        mistakes.append(
            f"train.accumulate={train.accumulate} is not allowed with data.batch_size={config.data.batch_size}; it takes at"
            " most that: a batch has no more micro-batches than images"
        )
    elif shards * train.accumulate > MAX_SHARDS:
        mistakes.append(
            f"train.accumulate={train.accumulate} is not allowed with sync.shards={shards}; their product is at most"
            f" {MAX_SHARDS}"
        )
    if config.train.compile in CUDA_GRAPHS and config.train.accumulate > 1:
        mistakes.append(
            f"train.compile={config.train.compile} is not allowed with train.accumulate={config.train.accumulate}; set compile"
            " to default, or accumulate to 1: a CUDA graph overwrites what it has computed from the micro-batch before"
        )
    if config.sync.batch_norm and config.sync.mode != "ddp":
        reason = {
            "exact": "there BatchNorm takes the statistics of each shard, the same on any world size",
            "local": "there ranks do not meet in a step",
        }[config.sync.mode]
        mistakes.append(f"sync.batch_norm=true is not allowed with sync.mode={config.sync.mode}: {reason}; set it to false")
    return mistakes + _check_data(config) + _check_patience(config) + _check_folders(config)


def _check_data(config: Config) -> list[str]:
    data, defaults = config.data, DataConfig()
    mistakes = []
    if data.args and data.target is None:
        mistakes.append(f"data.args={dict(data.args)} is not allowed without data.target, whose arguments they are")
    if data.channels == 2:
        mistakes.append("data.channels=2 is not allowed; it takes 1 (grey) or 3 (colour)")
    resizes = data.name == "folder" and data.target is None and data.image == "resize"
    for name in ("size", "channels"):
        if getattr(data, name) != getattr(defaults, name) and not resizes:
            mistakes.append(f"data.{name}={getattr(data, name)} needs data.name=folder and data.image=resize")
    return mistakes


def _check_patience(config: Config) -> list[str]:
    patience, needed = config.train.patience, []
    if patience and not config.data.validation:
        needed.append(
            "data.validation=0: it is judged by images that are held out; set data.validation=5000, or train.patience=0"
        )
    if patience and not config.train.eval_every:
        needed.append("train.eval_every=0: it counts evaluations; set train.eval_every=1, or train.patience=0")
    return [f"train.patience={patience} is not allowed with {reason}" for reason in needed]


def _names_a_folder(name: str) -> bool:
    """Whether `name` can be that of one folder, and be printed on one line."""
    plain = not set(name) & set("/\\") and not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)
    return plain and bool(name.strip()) and name not in (".", "..") and len(name.encode()) <= MAX_NAME_BYTES


def _check_folders(config: Config) -> list[str]:
    resume = config.checkpoint.resume
    folders = {"data.root": config.data.root}
    if is_main():  # its host holds the run
        folders["run.dir"] = config.run.dir
    mistakes = [f"{label}={shown(text)}: {why}; give a folder" for label, text in folders.items() if (why := _no_folder(text))]
    if is_main() and resume not in ("auto", "never") and not (resume and os.path.isdir(resume)):
        reason = "there is no such folder; give auto, never or a checkpoint's folder"
        mistakes.append(f"checkpoint.resume={shown(resume)}: {reason}")
    return mistakes


def _no_folder(text: str) -> str | None:
    """Why `text` is not a folder and cannot become one, if so."""
    if not text or "\0" in text:
        return "it is empty" if not text else "it holds a zero byte"
    try:
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may have to be made
    except OSError as error:
        return str(error.strerror)
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in Path(text).parts):
        return f"a name in it has more than {MAX_NAME_BYTES} bytes"
    existing = nearest_folder(Path(text))
    return None if existing.is_dir() else f"{shown(existing)} is a file"


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest of the folders above it that exists."""
    return next((p for p in (path, *path.absolute().parents) if os.path.exists(p)), Path("/"))


def expand_user(folder: str) -> str:
    """`folder` with ``~`` and ``~user`` at its beginning expanded.

    Raises:
        ValueError: there is no such user, or none has a home.
    """
    expanded = os.path.expanduser(folder)
    if folder.startswith("~") and expanded.startswith("~"):
        raise ValueError(f"no home of {folder.split('/')[0]} is known; ./{folder} is a folder of that name")
    return expanded
