"""Whether a training of this user has made a run here, known by a mark in the run's folder that this user alone can make.

The mark is an HMAC, under a secret in the user's state folder, over those values of the run's configuration that lead out of
its folder: what is imported, and where data are. It goes with a run that is moved or renamed; a run that was changed in these
values, or comes from somebody else, has none that fits.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path

from filelock import FileLock

from digitdist.config import Config, as_dict, read_stored_config
from digitdist.errors import in_one_line
from digitdist.files import atomic_write, read_plain
from digitdist.runs.folder import CONFIG
from digitdist.world import print_main

MARK = ".origin"
OUTWARD = ("model.target", "model.args", "data.target", "data.args", "data.root")
SECRET, LENGTH = "secret", 32  # its file, and how many bytes it has
MAX_MARK = 1000


def mark_run(folder: Path) -> None:
    """Marks the run in `folder`, whose configuration is stored, as made here; says so where that cannot be and matters."""
    config, _ = read_stored_config(folder / CONFIG)
    try:
        atomic_write(folder / MARK, _mark(_make_secret(), config).encode() + b"\n")
    except (OSError, RuntimeError) as error:
        if config.model.target or config.data.target or config.data.root != Config().data.root:
            print_main(
                f"origin     cannot be kept ({in_one_line(error)}): evaluate, predict and export will take this run for"
                " another user's, and ask for trust=true or data.root"
            )


def made_here(folder: Path, config: Config) -> bool:
    """Whether this user's training has made the run in `folder`, whose stored configuration is `config`."""
    try:
        mark, secret = read_plain(folder / MARK, MAX_MARK), _read_secret(_state_folder())
    except (OSError, RuntimeError):
        return False
    return hmac.compare_digest(mark.strip(), _mark(secret, config).encode())


def _mark(secret: bytes, config: Config) -> str:
    values = as_dict(config)
    text = repr([(name, values[name]) for name in OUTWARD])
    return hmac.new(secret, text.encode(errors="surrogatepass"), hashlib.sha256).hexdigest()


def _state_folder() -> Path:
    """Where this user's secret is kept: ``digitdist`` in XDG_STATE_HOME or ``~/.local/state``.

    Raises:
        RuntimeError: the user has no home.
    """
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "digitdist"


def _read_secret(folder: Path) -> bytes:
    secret = read_plain(folder / SECRET, LENGTH)
    if len(secret) != LENGTH:  # anybody could make marks with a secret that is empty
        raise FileNotFoundError(errno.ENOENT, "it is damaged", str(folder / SECRET))
    return secret


def _make_secret() -> bytes:
    """This user's secret, which is made once."""
    folder = _state_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        try:
            return _read_secret(folder)
        except FileNotFoundError:
            pass
        secret = secrets.token_bytes(LENGTH)
        descriptor, name = tempfile.mkstemp(dir=folder)  # which nobody else can read
        try:
            with open(descriptor, "wb") as file:
                file.write(secret)
                file.flush()
                os.fsync(descriptor)
            os.replace(name, folder / SECRET)
        finally:
            Path(name).unlink(missing_ok=True)
        return secret
