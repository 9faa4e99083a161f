"""Where a model may be: in a run, in a folder that ``export --format card`` has made, or on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from digitdist.config import shown
from digitdist.distributed import generators_kept
from digitdist.errors import UserError, in_one_line
from digitdist.files import read_plain
from digitdist.loading.folder import CARD_FILES, CONFIG, load_folder
from digitdist.loading.trained import TrainedModel
from digitdist.runs import CONFIG as RUN_CONFIG
from digitdist.runs import find_run, holds_runs, load_run

HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def load(source: str | os.PathLike[str], *, checkpoint: str | int = "last", trust: bool = False) -> TrainedModel:
    """The model of a run, of a folder that ``export --format card`` has made, or of a repository on the Hugging Face Hub that
    holds the files of such a folder.

    `source`: a folder, the name of a run in ``runs``, or a Hub id, ``USER/NAME``; what is on the disk comes first, and a name
    that begins with a folder's is not asked of the Hub. `checkpoint`: of a run, ``last``, ``best`` or a step. `trust`: whether
    the network that a run or a folder of somebody else's names may be executed, where it is not one of this package's; it must
    be on ``PYTHONPATH``, since nothing that comes with the weights is executed.

    Raises:
        UserError: there is no such model, it is damaged, or it needs `trust`.
    """
    with generators_kept():  # a network's initial weights are drawn before the stored ones take their place
        return _load(os.fspath(source), str(checkpoint), trust)


def _load(name: str, checkpoint: str, trust: bool) -> TrainedModel:
    places = _places(name)
    for folder in places:
        if os.path.isfile(folder / RUN_CONFIG):  # a name may be too long for any folder
            return _load_run(folder, checkpoint, trust)
        if os.path.isfile(folder / CONFIG):
            return load_folder(folder, trust)
    study = next((folder for folder in places if holds_runs(folder)), None)
    if study:
        return _load_run(find_run(str(study)), checkpoint, trust)  # which says what to name instead
    found = ""
    if HUB_ID.fullmatch(name):
        here = [folder for folder in _places(name.partition("/")[0]) if os.path.isdir(folder)]
        if not here:
            return _load_from_hub(name, trust)
        found = f", and the Hub is not asked for what would be in the folder {here[0]}"
    files = f"a run has a {RUN_CONFIG}, an exported model a {CONFIG}"
    raise UserError(
        f"{shown(name)}: no model there{found}; give a run, a folder of export --format card, or USER/NAME ({files})"
    )


def _places(name: str) -> tuple[Path, Path]:
    """Where a model of this name may be on the disk, the first place first."""
    return Path(os.path.expanduser(name)), Path("runs") / name


def _load_run(folder: Path, checkpoint: str, trust: bool) -> TrainedModel:
    run = load_run(str(folder), ["data.root=.", *(["trust=true"] if trust else [])], needs_data=False)
    stored = run.checkpoint(checkpoint)
    return TrainedModel(run.model(stored), run.info, run.precision(stored, "cpu"))


def _load_from_hub(name: str, trust: bool) -> TrainedModel:
    """The model of a repository, all of whose files are of one commit; the Hub's own library keeps them in its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*CARD_FILES], library_name="digitdist"))
    except Exception as error:  # of the Hub's, the network's or the disk's
        reason = in_one_line(error)[:300]
        raise UserError(f"{name}: nothing of that name is here, and the Hub does not give it: {reason}") from None
    # The cache names its files by links.
    return load_folder(Path(name), trust, lambda file: read_plain((folder / file).resolve(), CARD_FILES[file]))
