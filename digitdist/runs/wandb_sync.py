"""Sends to W&B what it has not got of a run, from what the run's folder holds."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from digitdist.checkpoint import folder_name
from digitdist.errors import UserError, in_one_line
from digitdist.files import parse_json, read_plain
from digitdist.runs.attempts import read_attempts
from digitdist.runs.folder import LOCK, RESULT
from digitdist.runs.metrics import METRICS
from digitdist.runs.wandb_record import read_options, stored_rows
from digitdist.runs.wandb_server import why_offline
from digitdist.runs.wandb_session import Session, prepare_environment, remove_service_folder

UNSENT = "unsent"  # a folder in the run's, of charts and tables that the server has not shown yet
ACKNOWLEDGE_TIMEOUT_S = 20.0  # until the server shows what it was sent
API_TIMEOUT_S = 10  # for one of its answers
SETTINGS = {
    "init_timeout": 30.0,
    "finish_timeout": 600.0,
    "x_disable_stats": True,
    "x_disable_meta": True,
    "disable_git": True,  # those of this process are not the run's
}


def sync_wandb(folder: Path, report: Callable[[str], None]) -> None:
    """Sends what W&B has not got of the run in `folder`: steps, charts, tables, result, weights. It can be repeated.

    Raises:
        UserError: there is nothing to send, the run is being trained, there is no key or no server, or the server does not
            show afterwards that it has all of it.
    """
    options = read_options(folder)
    if options is None:
        older = sorted((folder / "wandb").glob("offline-run-*"))
        advice = f"an earlier version made {older[0]}: wandb sync it" if older else "train with tracking.wandb=offline or auto"
        raise UserError(f"{folder}: there is no offline W&B run to send; {advice}")
    reason = why_offline()
    if reason:
        raise UserError(f"{folder} cannot be sent to W&B: {reason}")
    with _not_training(folder), _own_environment() as place:
        import wandb

        try:
            report(f"{folder}: {_send(wandb, folder, place, options, report)}")
        except UserError:
            raise
        except Exception as error:  # wandb raises all kinds
            raise UserError(f"{folder} cannot be sent to W&B: {in_one_line(error)}; nothing is lost, send it again") from None
        finally:
            with contextlib.suppress(Exception):  # as where its own process has ended
                wandb.teardown()
            remove_service_folder()


@contextlib.contextmanager
def _not_training(folder: Path) -> Iterator[None]:
    """Keeps a training out of the run, which would send to the same run of W&B's.

    Raises:
        UserError: one works in it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder} is being trained, and is not sent to W&B now; send it when the training has ended") from None
    except OSError:  # a folder that cannot be written: nobody trains in it
        pass
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _own_environment() -> Iterator[Path]:
    """Has wandb work in a temporary folder, which it gives, and puts the environment back."""
    before = dict(os.environ)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
            os.environ |= {"WANDB_DIR": place, "WANDB_DATA_DIR": place}
            prepare_environment(Path(place), "online")
            yield Path(place)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _send(wandb: Any, folder: Path, place: Path, options: Mapping[str, Any], report: Callable[[str], None]) -> str:
    """Sends the run, and returns what was sent; `report` gets a line where damage is left out.

    Raises:
        UserError: the server does not show that it has it.
    """
    unsent = folder / "wandb" / UNSENT
    if not unsent.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{unsent} leads out of the run's folder; remove that link")
    rows, result = stored_rows(folder, report), _read_result(folder)
    attempts = read_attempts(folder)
    stopped = not result and bool(attempts) and bool(attempts[-1].get("stopped"))
    weights, lost = _weights_file(folder, options.get("config") or {}, result)
    if are_lines_lost(rows, result):
        report(f"{folder / METRICS} lacks its last lines, which W&B does not get either")
    session = Session(wandb, place, "online", options, SETTINGS)
    path, url = session.run.path, session.run.url
    session.replay(rows)
    session.finish(result, weights, stopped)
    if session.num_media:
        shutil.copytree(session.files / "media", unsent / "media", dirs_exist_ok=True)
    deadline = time.monotonic() + ACKNOWLEDGE_TIMEOUT_S
    while missing := _missing(wandb, path, max(rows, default=-1), result.get("weights_sha256"), unsent):
        if time.monotonic() > deadline:
            raise UserError(f"{folder} is not all at W&B: {missing}; nothing is lost, send it again")
        time.sleep(1)
    shutil.rmtree(unsent, ignore_errors=True)
    parts = [f"{session.num_rows} of {len(rows)} steps", f"{session.num_media} charts and tables"]
    parts += ["the result"] * bool(result) + ["the weights"] * bool(weights)
    return f"sent {', '.join(parts)}; W&B has every step{f' ({lost})' if lost else ''}: {url}"


def are_lines_lost(rows: Mapping[int, tuple[Mapping[str, Any], Any]], result: Mapping[str, Any]) -> bool:
    """Whether a run that has ended has no metrics of its last step: charts may be there without them."""
    last = max((step for step, (metrics, _) in rows.items() if metrics), default=-1)
    return isinstance(result.get("steps"), int) and last < result["steps"]


def _missing(wandb: Any, path: str, last_step: int, weights_sha256: str | None, unsent: Path) -> str | None:
    """What the server does not show of a run that was sent to it; None where it shows all. Files of charts and tables in the
    folder `unsent` that it does not show are sent again: their steps would not be."""
    try:
        run = wandb.Api(timeout=API_TIMEOUT_S).run(path)
        if run.lastHistoryStep < last_step:
            return f"the server shows steps up to {run.lastHistoryStep}, not {last_step}"
        if weights_sha256 and run.summary.get("weights_sha256") != weights_sha256:
            return "the server does not show the result"
        files = {str(file.relative_to(unsent)) for file in unsent.glob("media/**/*") if _is_own_file(file, unsent)}
        absent = sorted(files - {file.name for file in run.files(per_page=1000)}) if files else []
        for name in absent:
            with contextlib.suppress(Exception):  # the next look shows whether it has come
                run.upload_file(str(unsent / name), root=str(unsent))
        return f"the server does not show {absent[0]}" if absent else None
    except Exception as error:  # wandb raises all kinds
        return in_one_line(error)


def _read_result(folder: Path) -> dict[str, Any]:
    """What ``result.json`` holds; nothing where the run has not ended, or the file is damaged."""
    try:
        result = parse_json(read_plain(folder / RESULT))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def _weights_file(folder: Path, config: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[Path | None, str]:
    """The file of the final weights, where it was to be an artifact; and a word where it is gone."""
    if not config.get("tracking.artifacts") or not isinstance(result.get("steps"), int):
        return None, ""
    name = "ema" if config.get("optim.ema") else "model"
    file = folder / "checkpoints" / folder_name(result["steps"]) / f"{name}.safetensors"
    return (file, "") if _is_own_file(file, folder) else (None, f"without the weights: {file} is gone")


def _is_own_file(file: Path, folder: Path) -> bool:
    """Whether it is a file in `folder`, and no link that leads elsewhere: a run may come from somebody else."""
    return file.is_file() and file.resolve().is_relative_to(folder.resolve())
