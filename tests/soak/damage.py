"""Damage to a file of a run's folder, and what it may cost.

| damaged | may cost |
| --- | --- |
| a file of a checkpoint | the steps since the newest checkpoint that is intact, which are repeated |
| `metrics.jsonl` | the lines that the damage hit, and those written to a file that has been taken away meanwhile, as far as a |
|                 | resumed run does not repeat their steps; a flipped byte that leaves a line of JSON is not noticed |
| `environment.json` | the record of earlier attempts |
| `wandb/` | what W&B keeps |
| the heartbeat of a running attempt | that attempt, as a kill does: its processes map the file |
| all else | nothing: it is written anew, and where a finished run lacks it, that is said |

A lock that nobody may open is refused, with exit code 2: another training may hold it. That damage is not done here.
Weights, predictions and counts are never the price, and no other file is touched. An extra file costs nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

OUTSIDE, OURS = "ours.txt", b"a file of the user's, outside the run"  # its name and content


@dataclass(frozen=True)
class Damage:
    """What was done to which files of the run (paths in its folder), and whether they are now others than those open."""

    kind: str
    files: tuple[str, ...]
    replaced: bool

    def hits(self, start: str) -> bool:
        return any(file.startswith(start) for file in self.files)

    def __str__(self) -> str:
        return f"{' and '.join(self.files)}: {self.kind}"


def _truncate(file: Path, drawn: random.Random) -> None:
    os.truncate(file, int(file.stat().st_size * drawn.random()))


def _empty(file: Path, drawn: random.Random) -> None:
    os.truncate(file, 0)


def _flip(file: Path, drawn: random.Random) -> None:
    content = file.read_bytes()
    place = drawn.randrange(max(1, len(content)))
    _overwrite(file, place, bytes([content[place] ^ 1 << drawn.randrange(8)]) if content else b"")


def _zero(file: Path, drawn: random.Random) -> None:
    size = file.stat().st_size
    begin = int(size * drawn.choice([0.0, drawn.random()]))
    _overwrite(file, begin, bytes(size - begin))


def _not_utf8(file: Path, drawn: random.Random) -> None:
    _overwrite(file, int(file.stat().st_size * drawn.random()), b"\xff\xfe\xc3\x28")


def _nest(file: Path, drawn: random.Random) -> None:
    _overwrite(file, 0, b"[" * 100_000 + b"\n")


def _overwrite(file: Path, begin: int, content: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(begin)
        opened.write(content)


def _delete(file: Path, drawn: random.Random) -> None:
    file.unlink()


def _make_folder(file: Path, drawn: random.Random) -> None:
    file.unlink()
    file.mkdir()
    if drawn.random() < 0.5:
        (file / "content").write_bytes(OURS)


def _make_fifo(file: Path, drawn: random.Random) -> None:
    file.unlink()
    os.mkfifo(file)


def _link(file: Path, drawn: random.Random) -> None:
    """To a file of the user's, to nothing, to itself (which is an error of its own), or to a device."""
    file.unlink()
    file.symlink_to(drawn.choice([outside(file), Path("nowhere"), Path(file.name), Path("/dev/null")]))


def _forbid(file: Path, drawn: random.Random) -> None:
    """Which stops root too, as the driver starts it."""
    file.chmod(0)


KINDS: dict[str, tuple[Callable[[Path, random.Random], None], bool]] = {  # how, and whether the file is then another one
    "truncated": (_truncate, False),
    "emptied": (_empty, False),
    "one bit flipped": (_flip, False),
    "zeros": (_zero, False),
    "not UTF-8": (_not_utf8, False),
    "nested deeply": (_nest, False),
    "deleted": (_delete, True),
    "a folder": (_make_folder, True),
    "a FIFO": (_make_fifo, True),
    "a link": (_link, True),
    "unreadable": (_forbid, False),
}
SWAPPED, EXTRA = "swapped", "an extra file"


def outside(file: Path) -> Path:
    """A file beside the folder of all runs, to which a link of the run may lead; it must never change."""
    folder = next(parent for parent in file.parents if parent.name == "runs").parent
    if not (folder / OUTSIDE).exists():  # or what was done to it would not be seen
        (folder / OUTSIDE).write_bytes(OURS)
    return (folder / OUTSIDE).resolve()


def choose(folder: Path, drawn: random.Random, without: frozenset[str]) -> Path | None:
    """A plain file of the run, of each sort with equal chances; a few may hold what no sort of file needs twice."""
    sorts: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).parts
        if file.is_symlink() or not file.is_file() or ".tmp" in str(file) or name[0] in without:
            continue
        sort = {"checkpoints": f"checkpoints/{file.name}", "wandb": "wandb"}.get(name[0], name[0].partition("-")[0])
        sorts.setdefault(sort, []).append(file)
    return drawn.choice(sorts[drawn.choice(sorted(sorts))]) if sorts else None


def do(folder: Path, drawn: random.Random, without: frozenset[str] = frozenset()) -> Damage | None:
    """Damages a file of the run as `drawn` has it, on a full disk as far as that goes; None where there is none, it has gone
    meanwhile, or an extra one does not fit."""
    kind = drawn.choice([kind for kind in (*KINDS, SWAPPED, EXTRA, EXTRA) if kind not in without])
    file = choose(folder, drawn, without)
    if file is None or (file.name == ".lock" and kind == "unreadable"):  # refused: another training may hold it
        return None
    try:
        return _do(kind, folder, file, drawn, without)
    except FileNotFoundError:
        return None


def _do(kind: str, folder: Path, file: Path, drawn: random.Random, without: frozenset[str]) -> Damage | None:
    if kind == EXTRA:
        with _full_disk_borne():
            return Damage(kind, (_add_extra(folder, file, drawn),), replaced=False)
        return None
    names: tuple[Path, ...] = (file,)
    if kind == SWAPPED:
        other = choose(folder, drawn, without)
        if other is None or other == file:
            return None
        names, aside = (file, other), folder.parent / "aside"
        os.replace(file, aside)
        os.replace(other, file)
        os.replace(aside, other)
    else:
        with _full_disk_borne():
            KINDS[kind][0](file, drawn)
    return Damage(kind, tuple(str(name.relative_to(folder)) for name in names), kind == SWAPPED or KINDS[kind][1])


@contextlib.contextmanager
def _full_disk_borne() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def _add_extra(folder: Path, file: Path, drawn: random.Random) -> str:
    """Something that the run does not know: of a desktop, of a user, or left by a program that was killed."""
    stale = f".{file.name}.tmp"
    kind = drawn.choice([".DS_Store", "keep", "copy", stale, f"{stale}/", "lost+found/", "step-000000099/", "step-x"])
    if kind == "keep":
        kept = sorted(folder.glob("checkpoints/step-?????????"))
        target = kept[0].with_name(f"{kept[0].name}-keep") if kept else folder / "step-keep"
        if kept and not target.exists():
            shutil.copytree(kept[0], target, symlinks=True, copy_function=_copy_plain)
        else:
            target.mkdir(exist_ok=True)
    elif kind.endswith("/"):
        parent = folder / "checkpoints" if "-" in kind and (folder / "checkpoints").is_dir() else file.parent
        target = parent / kind.rstrip("/")
        target.mkdir(exist_ok=True)
    else:
        target = file.with_name(f"{file.name} copy" if kind == "copy" else kind)
        target.write_bytes(file.read_bytes() if kind == "copy" else OURS)
    return str(target.relative_to(folder))


def _copy_plain(source: str, target: str) -> None:
    if Path(source).is_file():  # a FIFO would wait for a writer
        shutil.copy(source, target)


def intact_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints of the run in which every file of the manifest is as it was written, least first."""
    return sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step-?????????") if _is_intact(path))


def _is_intact(path: Path) -> bool:
    try:
        listed = json.loads(read(path / "manifest.json"))["files"]
        sums = {name: hashlib.sha256(read(path / name)).hexdigest() for name in listed}
        step = json.loads(read(path / "state.json"))["step"]
        return path.name == f"step-{step:09d}" and all(sums[name] == listed[name]["sha256"] for name in listed)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def read(file: Path) -> bytes:
    """A plain file that its owner may read.

    Raises:
        OSError: it is another thing.
    """
    if file.is_symlink() or not file.is_file() or not file.stat().st_mode & 0o400:
        raise OSError(f"{file} is no readable file")
    return file.read_bytes()


def lines(folder: Path) -> list[str]:
    """The metric lines of a run that are events, each without its times, as text that can be compared."""
    found = []
    for event in _events(folder):
        if event is not None:
            kept = {k: v for k, v in event.items() if k not in ("time", "train/images_per_second")}
            found.append(json.dumps({k: v for k, v in kept.items() if not k.startswith("time/")}, sort_keys=True))
    return found


def are_all_events(folder: Path) -> bool:
    """Whether `metrics.jsonl` is a file of nothing but events, at least one."""
    found = _events(folder)
    return bool(found) and None not in found


def _events(folder: Path) -> list[dict | None]:
    """One a line of ``metrics.jsonl``: the event, or None for what is no event."""
    try:
        content = read(folder / "metrics.jsonl").decode(errors="replace")
    except OSError:
        return []
    found: list[dict | None] = []
    for line in content.removesuffix("\n").split("\n"):
        try:
            event = json.loads(line)
            found.append(event if isinstance(event["step"], int) else None)
        except (ValueError, TypeError, KeyError, RecursionError):
            found.append(None)
    return found


def step_of(line: str) -> int:
    return json.loads(line)["step"]
