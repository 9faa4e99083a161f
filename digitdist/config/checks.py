"""What no type and no range can check: names, folders, and keys that exclude each other."""

from __future__ import annotations

from pathlib import Path

from digitdist.config.schema import Config, DataConfig
from digitdist.world import is_main

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that replay recorded kernels


def check_combinations(config: Config) -> list[str]:
    """The mistakes in names, folders and combinations of keys."""
    mistakes = []
    name = config.run.name
    if name is not None and (not name.strip() or name in (".", "..") or set(name) & set("/\\\0\n")):
        mistakes.append(f"run.name={name!r} is not allowed; it names one folder in run.dir, so no slash and not empty")
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
    return mistakes + _check_data(config) + _check_folders(config)


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


def _check_folders(config: Config) -> list[str]:
    mistakes = []
    resume = config.checkpoint.resume
    folders = {"data.root": Path(config.data.root)}
    if is_main():  # its host holds the run
        folders["run.dir"] = Path(config.run.dir)
        if resume not in ("auto", "never") and not Path(resume).is_dir():
            mistakes.append(f"checkpoint.resume={resume}: there is no such folder; give auto, never or a checkpoint's folder")
    for label, folder in folders.items():
        existing = nearest_folder(folder)
        if not existing.is_dir():
            mistakes.append(f"{label}={folder}: {existing} is a file; give a folder")
    return mistakes


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest of the folders above it that exists."""
    return next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
