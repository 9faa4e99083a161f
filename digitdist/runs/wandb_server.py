"""Whether W&B can be used online, found out without a prompt and within seconds."""

from __future__ import annotations

import http.client
import netrc
import os
import urllib.error
import urllib.request
from urllib.parse import urlparse

from digitdist.errors import in_one_line
from digitdist.runs.wandb_settings import chosen_mode, wandb_setting

PROBE_TIMEOUT_S = 3.0  # for one HTTP answer of the server


def wandb_mode(requested: str) -> tuple[str, str | None]:
    """How W&B is used, ``online``, ``offline`` or ``disabled``, and why it is not online where it was meant to be.

    ``auto`` follows WANDB_MODE and wandb's settings files.
    """
    reason = None
    if requested == "auto":
        requested, reason = chosen_mode()
    if requested in ("offline", "disabled"):
        return requested, reason
    reason = why_offline()
    return ("offline", reason) if reason else ("online", None)


def why_offline() -> str | None:
    """Why W&B cannot be used online, or None where it can."""
    return _unreachable() if has_wandb_key() else "no key (wandb login)"


def has_wandb_key() -> bool:
    """True where wandb would find a key by itself; looked up without the network."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if file and netrc.netrc(os.path.expanduser(file)).authenticators(str(urlparse(_base_url()).hostname)):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _base_url() -> str:
    return wandb_setting("base_url") or "https://api.wandb.ai"


def _unreachable() -> str | None:
    """Why the server does not answer, or None where it does."""
    try:
        request = urllib.request.Request(
            f"{_base_url().rstrip('/')}/graphql", b'{"query": "{__typename}"}', {"Content-Type": "application/json"}
        )
        # An opener of its own, since the one behind urlopen keeps the proxies of its first use.
        with urllib.request.build_opener().open(request, timeout=PROBE_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:  # an answer, if perhaps an error
        return None if error.code < 500 else f"{_base_url()} answers {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{_base_url()} is out of reach ({in_one_line(getattr(error, 'reason', error))})"
