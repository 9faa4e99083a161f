"""``--push``: the folder of a model sent to the Hugging Face Hub, by the Hub's own library."""

from __future__ import annotations

import re
from pathlib import Path

from digitdist.errors import UserError, in_one_line
from digitdist.loading import CARD_FILES

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
MAX_REASON = 300


def check_push(repository: str) -> None:
    """Refuses, before any work is done, what cannot be sent.

    Raises:
        UserError: `repository` is no name of the Hub's, or there is no token to write there.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
        if not REPOSITORY.fullmatch(repository):
            raise HFValidationError("it takes USER/NAME")
    except HFValidationError as error:
        raise UserError(f"--push {repository} is not allowed: {in_one_line(error)}") from None
    if not get_token():
        raise UserError(f"--push {repository} needs a token that may write there: run hf auth login, or set HF_TOKEN")


def push(folder: Path, repository: str, public: bool) -> str:
    """Sends the files of a card's folder in one commit; returns where they are. A repository that is not there yet is made,
    `public` or private.

    Raises:
        UserError: the Hub refuses it, is out of reach, or has the repository as `public` is not.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api, kind = HfApi(library_name="digitdist"), "public" if public else "private"
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        is_public = not api.repo_info(repository).private
        if is_public == public:
            api.upload_folder(
                repo_id=repository, folder_path=folder, allow_patterns=list(CARD_FILES), commit_message="A model by digitdist"
            )
    except Exception as error:  # the Hub's, the network's or the disk's
        reason = in_one_line(error)[:MAX_REASON]
        raise UserError(f"--push {repository}: not sent ({reason}); the folder {folder} is there: try again") from None
    if is_public != public:
        advice = "add --public to send it there all the same" if is_public else "leave --public out, or make it public there"
        raise UserError(f"--push {repository}: that repository is {'public' if is_public else 'private'}; {advice}")
    return f"{url}: sent, {kind}"
